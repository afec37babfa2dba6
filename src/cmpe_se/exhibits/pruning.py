"""Exhibits of a pruned run: what went where, and what it cost."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cmpe_se.exhibits.drawing.pruning import draw_along_the_way, draw_widths, draw_worth
from cmpe_se.exhibits.exhibit import Exhibit
from cmpe_se.utils.text import counted


def widths_over_depth(layers: Sequence[Mapping[str, Any]], blocks: Sequence[Mapping[str, Any]]) -> Exhibit:
    """Channels of each layer before and after.

    Args:
        layers: of ``pruning.json``, as :class:`cmpe_se.pruning.prune.Layer` has them.
        blocks: likewise, of :class:`cmpe_se.pruning.prune.Block`.
    """
    before, after = (np.array([layer[when] for layer in layers]) for when in ("before", "after"))
    names = [layer["name"] for layer in layers]
    gone = [block["name"] for block in blocks if block["gone"]]
    narrowed = sum(0 < new < old for new, old in zip(after, before, strict=True))
    title = f"{counted(narrowed, 'layer')} of {len(layers)} got narrower"
    title += f"; {_listed(gone)} went as a whole" if gone else ", and no block went as a whole"
    most = int((after / before).argmin())
    if not gone and after[most] < before[most]:
        title += f"; least is left of {names[most]}, {after[most]} of {before[most]} channels"
    return Exhibit(
        "widths-over-depth",
        title,
        "Channels that could only go together, by the first layer that makes them.",
        draw_widths(title, names, before, after),
        ["layer", "block", "stream", "before", "after"],
        [[layer[name] for name in ("name", "block", "stream", "before", "after")] for layer in layers],
    )


def worth_of_what_went(layers: Sequence[Mapping[str, Any]], criterion: str) -> Exhibit | None:
    """What the gates said of the channels that went, beside those that stayed; None where no layer has both."""
    kept, lost = (
        np.array([np.nan if layer[which] is None else layer[which] for layer in layers], dtype=float)
        for which in ("gate_kept", "gate_lost")
    )
    both = ~np.isnan(kept) & ~np.isnan(lost)
    if not both.any():
        return None
    lower = int((lost[both] < kept[both]).sum())
    title = (
        f"What went was worth less than what stayed in {lower} of {counted(int(both.sum()), 'layer')}, by weights, "
        "norms and mean gates"
    )
    some = ~np.isnan(lost)
    names = [layer["name"] for layer, shown in zip(layers, some, strict=True) if shown]
    return Exhibit(
        "worth-of-what-went",
        title,
        "The worth of a channel is what it adds to the residual stream through the layers behind it and the gate in "
        f"front of the addition, as a multiple of its layer's mean; layers that lost some. Pruned by {criterion}.",
        draw_worth(title, names, kept[some], lost[some]),
        ["layer", "gate_kept", "gate_lost"],
        [[layer["name"], layer["gate_kept"], layer["gate_lost"]] for layer in layers],
    )


def accuracy_along_the_way(multiply_adds: Sequence[int], top1: Sequence[float], trained: float | None) -> Exhibit:
    """Accuracy against multiply-adds, before, after each step and after the training.

    Args:
        multiply_adds: of an image, before and after each step.
        top1: of the test images, percent, likewise.
        trained: after the training; None where it has not ended.
    """
    part = multiply_adds[-1] / multiply_adds[0]
    title = f"{part:.0%} of the multiply-adds: test top-1 fell from {top1[0]:.2f} to {top1[-1]:.2f} %"
    title += f", and is {trained:.2f} % after training on" if trained is not None else ""
    steps = ["before", *(f"step {step}" for step in range(1, len(top1)))]
    rows: list[list[Any]] = [list(row) for row in zip(steps, multiply_adds, top1, strict=True)]
    if trained is not None:
        rows.append(["trained on", multiply_adds[-1], trained])
    return Exhibit(
        "accuracy-along-the-way",
        title,
        "Each step takes an equal part of the multiply-adds away.",
        draw_along_the_way(title, np.array(multiply_adds) / 1e6, np.array(top1), trained),
        ["when", "multiply_adds", "test_top1"],
        rows,
    )


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
