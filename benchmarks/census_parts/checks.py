"""What the census asks of one network. Every answer is a cell of its row."""

import copy
import pickle
import re
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.census_parts.networks import Network
from benchmarks.census_parts.oracle import Sum, watch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cmpe_se import CompetitiveSE, conversion_report, convert, merge
from cmpe_se.conversion import ConversionReport
from cmpe_se.errors import UserError

CPU, META = torch.device("cpu"), torch.device("meta")
_WATCHED_WITH_NUMBERS = 100e6
"""Parameters of the largest network that is watched on the processor where the meta device does not do."""
TOLERANCE = 1e-3
"""Largest difference after merging, to the largest output; float32."""
TOLERANCE_FLOAT64 = 1e-9
"""The same in float64, asked where float32 is not enough."""


@dataclass(frozen=True)
class Limits:
    """Up to which size a network is run with numbers.

    Args:
        parameters: million.
        macs: billion multiply-adds of one forward with the batch of two.
    """

    parameters: float = 10.0
    macs: float = 2.0


COLUMNS = (
    *("library", "network", "family", "parameters", "run", "side", "additions", "joins", "gates", "pair_view"),
    *("skipped", "left", "unlisted", "false", "reasons"),
    *("equal", "keys", "gradient", "copies", "merged", "seconds", "fault"),
)
"""Cells of a row.

``run`` is real where the checks from ``equal`` to ``merged`` were made with numbers, on inputs of ``side`` pixels.
``additions`` and ``joins`` are residual additions by :mod:`oracle`, of branches from one input of their module or from
several; ``pair_view`` counts gates of channels that do not fold, ``skipped`` the blocks that the report lists, ``left``
residual additions without a gate, ``unlisted`` those of them whose block the report does not list, and ``false`` gates
where the oracle has no addition of branches. ``reasons`` has those for the additions that are left. ``seconds`` are of
processor time.
"""
_UNLISTED = "not listed"


def row_of(network: Network, limits: Limits) -> dict[str, Any]:
    """The row of one network. What it or its conversion raises is in the row.

    Args:
        network: to build, watch, convert and compare.
        limits: up to which a run with numbers is made.
    """
    started = time.process_time()
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
    row |= {"library": network.library, "network": network.name, "family": network.family}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _fill(row, network, limits)
        except Exception as error:  # whatever a network does
            row["fault"] = f"{row['fault'] or 'row'}: {_said(error)}"
    row["seconds"] = round(time.process_time() - started, 2)
    return row


def _fill(row: dict[str, Any], network: Network, limits: Limits) -> None:
    row["fault"] = "built"
    model = _build(network, META)
    row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    row["fault"] = "run"
    small_enough = row["parameters"] <= limits.parameters * 1e6
    try:
        sums = watch(model, *network.inputs(2, network.side, META))
    except Exception:  # it looks at numbers: a detector sorts boxes
        if row["parameters"] > _WATCHED_WITH_NUMBERS:
            raise
        model = _build(network, CPU)
        sums = watch(model, *network.inputs(2, network.side, CPU))
    residual = [addition for addition in sums.found if addition.residual]
    row["additions"] = sum(addition.inside for addition in residual)
    row["joins"] = len(residual) - row["additions"]

    row["fault"] = ""
    sides = _sides(network, sums.macs, limits) if small_enough and residual else []
    side, model = _with_numbers(network, sides) if sides else (None, model)
    row |= {"run": "real" if side else "meta", "side": side or network.side}
    before = {key: (value, value.clone()) for key, value in model.state_dict().items()}
    row["fault"] = "convert"
    try:
        converted = convert(model, **_example_inputs(network, model))
    except UserError as refusal:
        row["fault"] = ""
        blocks, listed = {addition.module for addition in residual}, _refused(str(refusal))
        unlisted = len(residual) if blocks and not listed else max(0, len(blocks) - listed)
        row |= {"gates": 0, "skipped": listed, "left": len(residual), "unlisted": unlisted, "false": 0}
        row["reasons"] = str(refusal) if residual else ""
        return
    report = conversion_report(converted)
    row["fault"] = ""
    row |= {"gates": len(report.gates), "skipped": len(report.skipped)}
    row["pair_view"] = sum(gate.view == "pair_view_1x1" for gate in report.gates)
    row |= _compared_with_oracle(sums.found, report)
    row["keys"] = _yes(_keeps_keys(before, converted))
    if side is not None:
        _run(row, network, model, converted, side)


def _run(row: dict[str, Any], network: Network, model: nn.Module, converted: nn.Module, side: int) -> None:
    """Equal outputs, gradients, copies and the merged form, with numbers."""
    args, kwargs = network.inputs(2, side, CPU)
    row["fault"] = "output"
    row["equal"] = _yes(_equal(_outputs(model, args, kwargs), _outputs(converted, args, kwargs)))
    row["fault"] = "gradient"
    gates = {name: module for name, module in converted.named_modules() if isinstance(module, CompetitiveSE)}
    with torch.no_grad():
        for gate in gates.values():
            gate.fc2.weight.normal_(0, 0.5)
    row["gradient"] = _gradients(network, converted, gates, args, kwargs)
    converted.zero_grad(set_to_none=True)
    converted.eval()
    row["fault"] = "copies"
    expected = _outputs(converted, args, kwargs)
    row["copies"] = _copies(model, converted, expected, args, kwargs)
    del model
    row["fault"] = "merge"
    row["merged"] = _merged(network, converted, args, kwargs)
    row["fault"] = ""


def _build(network: Network, device: torch.device) -> nn.Module:
    """The network in eval mode; on the meta device from the processor where its constructor needs numbers."""
    if device.type == "cpu":
        return network.build().eval()
    try:
        with torch.device(device):
            return network.build().eval()
    except Exception:  # whatever a constructor does with tensors without numbers
        return network.build().to(device).eval()


def _sides(network: Network, macs: int, limits: Limits) -> list[int]:
    """Sides of inputs to try, smallest first, with which a forward costs no more than is allowed."""
    sides = [side for side in network.small if side < network.side] + [network.side]
    return [side for side in sides if macs * (side / network.side) ** 2 <= limits.macs * 1e9]


def _with_numbers(network: Network, sides: list[int]) -> tuple[int, nn.Module]:
    """The first side that a network takes, and the network with nothing at its initial value."""
    for side in sides[:-1]:
        with suppress(Exception):  # it is too small for the network
            return side, _randomised(_build(network, CPU), network, side)
    return sides[-1], _randomised(_build(network, CPU), network, sides[-1])


@torch.no_grad()
def _randomised(model: nn.Module, network: Network, side: int) -> nn.Module:
    """Nothing at its initial value: no residual is zero, no norm or layer scale the identity, statistics of its own.

    The statistics of batch norms are those of one batch, times and plus random numbers, so that maps keep their size.
    """
    for parameter in model.parameters():
        if parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):  # as norms and scales begin
            if parameter.flatten()[0] == 0:
                parameter.normal_(0, 0.2 if parameter.ndim < 2 else parameter[0].numel() ** -0.5)
            else:
                parameter.uniform_(0.7, 1.3)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.running_mean is not None and norm.running_var is not None]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    args, kwargs = network.inputs(2, side, CPU)
    with suppress(ValueError):  # one number for each channel has no variance; what has been measured stays
        model(*args, **kwargs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_var.clamp_(1e-2).mul_(torch.empty_like(norm.running_var).uniform_(0.7, 1.3))
        norm.running_mean.add_(torch.empty_like(norm.running_mean).normal_(0, 0.2) * norm.running_var.sqrt())
    return model.eval()


def _example_inputs(network: Network, model: nn.Module) -> dict[str, Any]:
    """What ``convert`` is told of a network whose inputs it does not know by itself."""
    if network.knows_its_input:
        return {}
    args, kwargs = network.inputs(2, network.side, next(model.parameters()).device)
    return {"example_inputs": kwargs or args}


def _compared_with_oracle(sums: list[Sum], report: ConversionReport) -> dict[str, Any]:
    """The cells ``left``, ``unlisted``, ``false`` and ``reasons``."""
    gates = Counter(gate.block for gate in report.gates)
    everything = Counter(addition.module for addition in sums)
    left = Counter(addition.module for addition in sums if addition.residual) - gates
    blocks = defaultdict(list)
    for name in left:
        blocks[report.skipped.get(name, _UNLISTED)].append(name or "the network itself")
    return {
        "left": left.total(),
        "unlisted": sum(left[name] for name in left if name not in report.skipped),
        "false": (gates - everything).total(),
        "reasons": " | ".join(f"{reason} [{len(names)}, {names[0]}]" for reason, names in blocks.items()),
    }


def _refused(message: str) -> int:
    """How many blocks a refusal lists."""
    if "that can be converted" not in message:
        return 0
    more = re.search(r", and (\d+) more\)", message)
    return 1 + int(more[1] if more else 0)


def _keeps_keys(before: dict[str, tuple[Tensor, Tensor]], converted: nn.Module) -> bool:
    """Whether the state dict has the original's keys and values, and beside them gates alone."""
    after = converted.state_dict()
    added = after.keys() - before.keys()
    if before.keys() - after.keys() or not all(re.search(r"(^|\.)competition(_\d+)?\.", key) for key in added):
        return False
    for key, (original, value) in before.items():
        same_form = after[key].shape == value.shape and after[key].dtype == value.dtype
        if not same_form or not (value.is_meta or (_same(after[key], value) and _same(original, value))):
            return False
    return True


def _gradients(network: Network, converted: nn.Module, gates: dict[str, Any], args: Any, kwargs: Any) -> str:
    """``yes``, or how many gates have a parameter whose gradient is zero, not finite or none, and the first of them."""
    converted.train()
    for module in converted.modules():
        if re.search("Drop|StochasticDepth", type(module).__name__):  # it may drop the residual of both images
            module.eval()
    torch.manual_seed(2)
    if network.loss is not None:
        loss = network.loss(converted)
    else:
        loss = torch.stack(
            [_random_sum(value) for value in _tensors(converted(*args, **kwargs)) if value.requires_grad]
        ).sum()
    loss.backward()
    without = [
        name
        for name, gate in gates.items()
        for parameter in gate.parameters()
        if parameter.grad is None or not 0 < float(parameter.grad.abs().sum()) < float("inf")
    ]
    names = list(dict.fromkeys(without))
    return f"{len(names)} without, {names[0]}" if names else "yes"


def _copies(model: nn.Module, converted: nn.Module, expected: list[Tensor], args: Any, kwargs: Any) -> str:
    """Whether a pickled deep copy gives the same; ``deepcopy``: a deep copy does, the original cannot be pickled."""
    again = copy.deepcopy(converted)
    pickled = _can_be_pickled(model)
    if pickled:
        again = pickle.loads(pickle.dumps(again))
    if not _equal(expected, _outputs(again, args, kwargs)):
        return "NO"
    return "yes" if pickled else "deepcopy"


def _can_be_pickled(model: nn.Module) -> bool:
    """Whether a network itself can be; one with a lambda among its attributes cannot."""
    try:
        pickle.dumps(model)
    except Exception:
        return False
    return True


def _random_sum(value: Tensor) -> Tensor:
    return (value * torch.randn(value.shape, dtype=value.dtype)).sum()


def _merged(network: Network, converted: nn.Module, args: Any, kwargs: Any) -> str:
    """Largest difference of the merged form, to the largest output; in float64 where float32 says nothing."""
    merged = merge(converted)
    difference = _difference(network, converted, merged, args, kwargs)
    if difference <= TOLERANCE:
        return f"{difference:.0e}"
    del merged
    double = copy.deepcopy(converted).double()
    args, kwargs = _as_float64(args), _as_float64(kwargs)
    difference = _difference(network, double, merge(double), args, kwargs)
    return f"{difference:.0e} in float64" + (" NOT EQUAL" if not difference <= TOLERANCE_FLOAT64 else "")


def _difference(network: Network, one: nn.Module, other: nn.Module, args: Any, kwargs: Any) -> float:
    with _captured(one, network.merged_part) as first, _captured(other, network.merged_part) as second:
        _outputs(one, args, kwargs)
        _outputs(other, args, kwargs)
    pairs = [(x.double(), y.double()) for x, y in zip(first, second, strict=True) if x.numel()]
    return max(float((x - y).abs().max() / x.abs().max()) for x, y in pairs)


@contextmanager
def _captured(model: nn.Module, part: str) -> Iterator[list[Tensor]]:
    outputs: list[Tensor] = []
    handle = model.get_submodule(part).register_forward_hook(lambda _, __, output: outputs.extend(_tensors(output)))
    try:
        yield outputs
    finally:
        handle.remove()


def _as_float64(value: Any) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, value)


@torch.no_grad()
def _outputs(model: nn.Module, args: Any, kwargs: Any) -> list[Tensor]:
    torch.manual_seed(3)  # a variational autoencoder draws
    return _tensors(model(*args, **kwargs))


def _tensors(output: Any) -> list[Tensor]:
    return [value for value in tree_leaves(output) if isinstance(value, Tensor) and value.is_floating_point()]


def _equal(first: list[Tensor], second: list[Tensor]) -> bool:
    finite = all(bool(value.isfinite().all()) for value in first)
    return finite and len(first) == len(second) and all(map(_same, first, second))


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(torch.equal(one, other))


def _yes(true: bool) -> str:
    return "yes" if true else "NO"


def _said(error: Exception) -> str:
    """The first line of an exception and the place that it came from."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {frame.name}: {(str(error).splitlines() or [''])[0][:200]}"
