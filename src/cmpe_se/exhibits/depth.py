"""Exhibits of a network's competition over its depth, from statistics over the test images."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from cmpe_se.exhibits.drawing import (
    draw_channels,
    draw_class_differences,
    draw_closing,
    draw_effects,
    draw_gates_over_depth,
    draw_shares,
)
from cmpe_se.exhibits.exhibit import Exhibit
from cmpe_se.inspecting.statistics import ALWAYS, CLOSED, DEAD, MOVED, OPEN, BlockStatistics
from cmpe_se.utils.text import counted

_CLASSES = 32  # rows of a plot of classes
_CHANNELS = 36  # columns of the plot of channels
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def standstill(blocks: Sequence[BlockStatistics]) -> str | None:
    """A sentence on gates none of which depends on the image; None where one does."""
    if any(block.varies for block in blocks):
        return None
    constant = all(block.constant for block in blocks)
    if not any(block.moved for block in blocks):
        moved = "are learned constants, and none has moved" if constant else "have hardly moved: none has moved"
        start = f"its initial value, {blocks[0].neutral:g}"
        return f"The gates {moved} by as much as {MOVED:g} of its largest value from {start}; train longer."
    if constant:
        return "The gates are learned constants, the same for every image and class."
    return (
        "No gate depends on the image: over the test images, the deviation of each is below "
        f"{DEAD:g} of its largest value."
    )


def gates_over_depth(blocks: Sequence[BlockStatistics]) -> Exhibit:
    """Distribution of the gates of each block, over channels and test images."""
    quantiles = np.array([block.quantiles(*_QUANTILES) for block in blocks])
    low, high = quantiles[:, 0], quantiles[:, 4]
    spread = high - low
    wide, narrow = int(spread.argmax()), int(spread.argmin())
    most, least = (_both(low[place], high[place], "to") for place in (wide, narrow))
    title = (
        f"Gates range most in {blocks[wide].name} (middle 90 % from {most}), least in {blocks[narrow].name} ({least})"
    )
    if most == least:
        title = f"Gates range alike in {_all(blocks)} (middle 90 % from {most})"
    largest = max(blocks, key=lambda block: block.gain)
    gain, neutral = largest.gain, largest.neutral
    undecided = "a gate is neutral (its initial value)" if gain == 1 else "the block is as one without a gate"
    return Exhibit(
        "gates-over-depth",
        title,
        "Each bar is one block's gates, over all its channels and all test images. At "
        f"{neutral:g} {undecided}; a higher gate passes more of the residual, a lower one less.",
        draw_gates_over_depth(title, _names(blocks), quantiles, neutral=neutral, gain=gain),
        ["block", "channels", *(f"quantile_{part:g}" for part in _QUANTILES)],
        [[block.name, block.channels, *row.tolist()] for block, row in zip(blocks, quantiles, strict=True)],
    )


def shares_over_depth(blocks: Sequence[BlockStatistics]) -> Exhibit | None:
    """How much of each block's sum is residual; None where no block's sum was recorded."""
    seen = [(block, shares) for block in blocks if (shares := block.residual_shares) is not None]
    if not seen:
        return None
    blocks = [block for block, _ in seen]
    parts = torch.tensor((0.1, 0.5, 0.9), dtype=torch.float64)
    quantiles = torch.stack([shares.quantile(parts) for _, shares in seen]).numpy()
    most, least = _extremes(quantiles[:, 1])
    high, low = _percent(quantiles[most, 1]), _percent(quantiles[least, 1])
    title = f"The gated residual has {high} of the energy in {blocks[most].name} (most) and {low} in "
    title += f"{blocks[least].name} (least)"
    if high == low:
        title = f"The gated residual has {high} of the energy in {_all(blocks)}"
    return Exhibit(
        "shares-over-depth",
        title,
        "Energy is the mean square over channels and pixels, of the identity and of the residual after gating. Bars "
        "are the median image. Where both point in the same direction, their sum has more energy than both together.",
        draw_shares(title, _names(blocks), quantiles),
        ["block", "residual_share_10", "residual_share_median", "residual_share_90", "residual_share_mean"],
        [
            [block.name, *row.tolist(), shares.mean().item()]
            for (block, shares), row in zip(seen, quantiles, strict=True)
        ],
    )


def closing_over_depth(blocks: Sequence[BlockStatistics]) -> Exhibit:
    """How often gates close, and saturate."""
    closed = np.array([100 * block.closed.mean().item() for block in blocks])
    opened = np.array([100 * block.open.mean().item() for block in blocks])
    weights = np.array([block.channels for block in blocks])
    overall = [float((values * weights).sum() / weights.sum()) for values in (closed, opened)]
    most, _ = _extremes(closed)
    title = f"{_percent(overall[0] / 100)} of all gates are closed, {_percent(overall[1] / 100)} are saturated"
    if not any(overall):
        title = "No gate closes its channel, and none is saturated"
    elif closed[most] >= 0.05:
        title += f"; most close in {blocks[most].name} ({_percent(closed[most] / 100)})"
    rows = []
    for block, shut, full in zip(blocks, closed.tolist(), opened.tolist(), strict=True):
        kinds = block.kinds
        rows.append([block.name, block.channels, shut, full, *(len(kinds[kind]) for kind in kinds)])
    return Exhibit(
        "closing-over-depth",
        title,
        f"A gate below {CLOSED:g} of its largest value closes its channel: only the identity passes. A gate above "
        f"{OPEN:g} is saturated. Counted over channels and test images.",
        draw_closing(title, _names(blocks), closed, opened),
        ["block", "channels", "closed_percent", "saturated_percent", "always_closed", "always_open", "dead"],
        rows,
    )


def effects_over_depth(names: Sequence[str], effects: Mapping[str, float], images: int) -> Exhibit:
    """What freezing each gate at its mean does to the output.

    Args:
        names: of all blocks with gates, in order.
        effects: of those that can be frozen, one at least, as :meth:`cmpe_se.static_gates.Calibration.effects` has
            them.
        images: that they were measured on.
    """
    values = np.array([100 * effects.get(name, np.nan) for name in names])
    most, least = int(np.nanargmax(values)), int(np.nanargmin(values))
    high, low = (_percent(values[place] / 100) for place in (most, least))
    title = f"The gate of {names[most]} is worth most: at its mean, the output changes by {high} of its variance"
    title += f"; that of {names[least]} least ({low})" if len(effects) > 1 else ""
    if high == low:
        title = f"With its gate at its mean the output changes by {high} of its variance, in {_places(names)}"
    return Exhibit(
        "effects-over-depth",
        title,
        f"Each gate alone was held at its mean, whatever the image: what the network loses where that gate is static. "
        f"Squared change of the output over its variance between {counted(images, 'test image')}. `cmpe-se freeze` "
        "makes the gates static that are worth least.",
        draw_effects(title, names, values),
        ["block", "effect_percent"],
        [[name, None if np.isnan(value) else value] for name, value in zip(names, values.tolist(), strict=True)],
    )


def class_differences(blocks: Sequence[BlockStatistics], classes: Sequence[str]) -> Exhibit:
    """Where the gates of different classes differ; one of the blocks is telling, at least."""
    means = np.stack([block.class_means.mean(1).numpy() for block in blocks], axis=1)  # (K, B)
    differences = means - np.array([block.mean.mean().item() for block in blocks])
    explained = np.array([block.explained for block in blocks])
    # A share of rounding noise, or one that chance would give, is no finding.
    most = int(np.where([block.telling for block in blocks], explained, -1).argmax())
    kept = _most_telling(differences)
    label, place = np.unravel_index(np.abs(differences).argmax(), differences.shape)
    way = "closed" if differences[label, place] < 0 else "open"
    title = (
        f"Classes differ most in {blocks[most].name}, where the class explains {_percent(explained[most])} of the "
        f"gates' variance; the farthest from the mean is '{classes[label]}', more {way} in {blocks[place].name}"
    )
    rows, shares = [], [block.class_residual_shares for block in blocks]
    for label, name in enumerate(classes):
        for place, block in enumerate(blocks):
            numbers = means[label, place].item(), differences[label, place].item()
            rows.append([name, block.name, int(block.images[label]), *numbers, shares[place][label]])
    more = f" Of {len(classes)} classes the {len(kept)} that differ most are shown." if len(kept) < len(classes) else ""
    return Exhibit(
        "class-differences",
        title,
        "Above: how much of the variance of a block's gates, from image to image, lies between the classes. Below: "
        f"each class's mean gate less that of all images; purple means more open, orange more closed.{more}",
        draw_class_differences(title, _names(blocks), [classes[k] for k in kept], differences[kept], explained),
        ["class", "block", "images", "mean_gate", "difference", "residual_share"],
        rows,
    )


def telling_channels(blocks: Sequence[BlockStatistics], classes: Sequence[str]) -> Exhibit:
    """The channels that distinguish classes best, in the block whose gates the class explains best.

    Args:
        blocks: one of which is telling, at least.
        classes: names.
    """
    block = max((block for block in blocks if block.telling), key=lambda block: block.explained)
    order = block.between.argsort(descending=True, stable=True).tolist()
    shown, means = order[:_CHANNELS], block.class_means.numpy()
    kept = _most_telling(means[:, shown] - means[:, shown].mean(0))
    best = means[:, order[0]]
    high, low = int(best.argmax()), int(best.argmin())
    span = _both(best[high], best[low], f"for '{classes[high]}' and")
    title = f"In {block.name}, channel {order[0]} separates classes best: its mean gate is {span} for '{classes[low]}'"
    return Exhibit(
        "telling-channels",
        title,
        "Mean gate of each class, in the block in which classes differ most. Bright: open; dark: closed.",
        draw_channels(title, shown, [classes[k] for k in kept], means[np.ix_(kept, shown)]),
        ["class", "channel", "mean_gate"],
        [[name, channel, means[k, channel].item()] for k, name in enumerate(classes) for channel in shown],
    )


CHANNEL_COLUMNS = ("block", "channel", "mean", "std", "closed_percent", "saturated_percent", "between_classes", "kind")


def channel_rows(blocks: Sequence[BlockStatistics]) -> list[list]:
    """Every channel of every block; its kinds are any of closed, open and dead."""
    rows = []
    for block in blocks:
        numbers = torch.stack((block.mean, block.std, 100 * block.closed, 100 * block.open, block.between), dim=1)
        kinds = block.kinds
        for channel, row in enumerate(numbers.tolist()):
            own = " ".join(kind for kind, channels in kinds.items() if channel in channels)
            rows.append([block.name, channel, *row, own])
    return rows


def definitions(*, constant: bool) -> str:
    """The terms of the page, with their thresholds; gates that are ``constant`` by design are never dead."""
    dead = (
        ""
        if constant
        else f"; dead: standard deviation over them below {DEAD:g}, so the gate does not depend on the image"
    )
    return (
        f"Thresholds, as parts of a gate's largest value: closed below {CLOSED:g}, saturated above {OPEN:g}; always "
        f"closed or open: for {100 * ALWAYS:.0f} % of the test images{dead}."
    )


def _all(blocks: Sequence[BlockStatistics]) -> str:
    return _places(_names(blocks))


def _places(names: Sequence[str]) -> str:
    return "every block" if len(names) > 1 else names[0]


def _names(blocks: Sequence[BlockStatistics]) -> list[str]:
    return [block.name for block in blocks]


def _extremes(values: np.ndarray) -> tuple[int, int]:
    return int(values.argmax()), int(values.argmin())


def _both(first: float, second: float, between: str) -> str:
    """Two numbers with a word between them, with as many digits as show that they differ."""
    digits = 2 if abs(first - second) >= 0.02 else 4
    return f"{first:.{digits}f} {between} {second:.{digits}f}"


def _percent(part: float) -> str:
    if 0 < part < 0.0005:
        return "less than 0.1 %"
    return f"{100 * part:.0f} %" if part >= 0.0995 or part == 0 else f"{100 * part:.1f} %"


def _most_telling(differences: np.ndarray) -> list[int]:
    """Classes that a plot has room for, those that differ most, in their own order."""
    order = np.abs(differences).max(1).argsort(kind="stable")[::-1][:_CLASSES]
    return sorted(order.tolist())
