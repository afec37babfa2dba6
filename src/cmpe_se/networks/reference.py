"""Parameters of the paper's reference implementation, into our networks.

The authors' MXNet code names a parameter by its place, ``features.2.0.bn1.gamma``: these are the names that its
``save_parameters`` writes. :func:`load_reference_parameters` knows which of our tensors each of them is, so that both
programs can be run on the same numbers. The parity tests do.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from cmpe_se.layers.attention import CompetitiveSE
from cmpe_se.layers.views import PAPER_VIEWS
from cmpe_se.networks.blocks import PreActBlock, PreActBottleneck, Stage
from cmpe_se.networks.residual import ResidualNetwork, WideResNet

_NORM_NAMES = {"gamma": "weight", "beta": "bias", "running_mean": "running_mean", "running_var": "running_var"}
_LISTED = 8  # names that an error spells out


class Target(NamedTuple):
    """Where one reference parameter goes."""

    tensor: Tensor | None  # None: frozen in the reference at a value that our layer has built in
    shape: tuple[int, ...]  # in the reference
    frozen_value: float | None = None


@torch.no_grad()
def load_reference_parameters(model: ResidualNetwork | PreActBlock, parameters: Mapping[str, Any]) -> None:
    """Fill a network, or a single block of one, from the reference implementation's parameters.

    Args:
        model: any :class:`PreActResNet` or :class:`WideResNet`, or one of their blocks, on any device, of any dtype.
        parameters: parameter path to array, all of them: trainable ones, running statistics, and the input norm's
            frozen gamma = 1 and beta = 0.

    Raises:
        ValueError: entries are missing, surplus or misshapen, or the frozen ones are not frozen at those values (the
            message names them), or gates of a view that the reference lacks. The model is left as it was.
    """
    targets = reference_targets(model, parameters)
    arrays, unusable = {}, []
    for path, value in parameters.items():
        array = value.detach().cpu().double().numpy() if isinstance(value, Tensor) else np.asarray(value)
        if array.dtype.kind in "fiu":
            array = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
            array = array.reshape(np.shape(value))  # a scalar has become a vector of one
        else:
            unusable.append(f"{path} of {array.dtype}")
        arrays[path] = array
    problems = []
    if unusable:
        problems.append(f"not real numbers: {_listed(unusable)}")
    if missing := [path for path in targets if path not in arrays]:
        problems.append(f"missing: {_listed(missing)}")
    if surplus := [path for path in arrays if path not in targets]:
        problems.append(f"surplus: {_listed(surplus)}")
    known = {path: array for path, array in arrays.items() if path in targets}
    if misshapen := [
        f"{path} is {array.shape}, should be {targets[path].shape}"
        for path, array in known.items()
        if array.shape != targets[path].shape
    ]:
        problems.append(f"misshapen: {_listed(misshapen)}")
    if changed := [
        f"{path} must be {targets[path].frozen_value:g} everywhere"
        for path, array in known.items()
        if targets[path].frozen_value is not None and not np.all(array == targets[path].frozen_value)
    ]:
        problems.append(f"not frozen: {_listed(changed)}")
    if problems:
        raise ValueError(f"the reference parameters do not fit this {type(model).__name__}; {'; '.join(problems)}")

    for path, target in targets.items():
        if target.tensor is not None:
            target.tensor.copy_(torch.from_numpy(arrays[path]).reshape(target.tensor.shape))


def reference_targets(
    model: ResidualNetwork | PreActBlock, names: Mapping[str, Any] | None = None
) -> dict[str, Target]:
    """Every parameter path of the reference implementation, in its order of places, to our tensor.

    Args:
        model: a network or a block.
        names: the paths at hand. The reference spells the projection of a basic block in two ways; the one that
            occurs here is taken.
    """
    if isinstance(model, PreActBlock):
        return dict(_block(model, "", names or {}))
    if not isinstance(model, ResidualNetwork):
        raise ValueError(f"the reference has no {type(model).__name__}; give a PreActResNet or a WideResNet")
    return dict(_network(model, names or {}))


def _network(model: ResidualNetwork, names: Mapping[str, Any]) -> Iterator[tuple[str, Target]]:
    channels = (model.stem.input_norm.num_features,)
    yield "features.0.gamma", Target(None, channels, 1.0)
    yield "features.0.beta", Target(None, channels, 0.0)
    for statistic in ("running_mean", "running_var"):
        yield f"features.0.{statistic}", _same(getattr(model.stem.input_norm, statistic))
    yield "features.1.weight", _same(model.stem.conv.weight)
    index = 2
    if isinstance(model, WideResNet):
        yield from _norm(cast(nn.BatchNorm2d, model.stem.norm), "features.2.")
        index, names = 3, {}  # its projections have one name only
    for stage in model.stages:
        for position, block in enumerate(cast(Stage, stage).blocks):
            yield from _block(cast(PreActBlock, block), f"features.{index}.{position}.", names)
        index += 1
    if isinstance(model.norm, nn.BatchNorm2d):  # a pruned network has none
        yield from _norm(model.norm, f"features.{index}.")
    if isinstance(model.head.fc, nn.Linear):  # nor one without classes a classifier
        yield "output.weight", _same(model.head.fc.weight)
        yield "output.bias", _same(model.head.fc.bias)


def _block(block: PreActBlock, prefix: str, names: Mapping[str, Any]) -> Iterator[tuple[str, Target]]:
    for name, child in block.named_children():
        if isinstance(child, nn.BatchNorm2d):
            yield from _norm(child, f"{prefix}{name}.")
        elif isinstance(child, nn.Conv2d) and name != "shortcut":
            yield f"{prefix}{name}.weight", _same(child.weight)
    if block.shortcut is not None:
        path = f"{prefix}shortcut.0.weight"
        if not isinstance(block, PreActBottleneck) and path not in names:
            path = f"{prefix}downsample.weight"  # as the wide networks have it
        yield path, _same(block.shortcut.weight)
    if block.attention is not None:
        yield from _attention(block.attention, prefix)


def _attention(attention: CompetitiveSE, prefix: str) -> Iterator[tuple[str, Target]]:
    last = cast(nn.Linear, attention.fc2)
    if attention.view == "se":
        yield f"{prefix}net_se_conv.1.weight", _same(attention.fc1.weight)
        yield f"{prefix}net_se_conv.3.weight", _same(last.weight)
    elif attention.view == "double_fc":
        yield f"{prefix}net_se_input_conv.1.weight", _as_convolution(attention.fc_residual.weight)
        yield f"{prefix}net_se_input_x.1.weight", _as_convolution(attention.fc_identity.weight)
        yield f"{prefix}net_se.0.weight", _as_convolution(last.weight)
    elif attention.view not in PAPER_VIEWS:
        raise ValueError(f"the reference has no view '{attention.view}'; it has {', '.join(PAPER_VIEWS)}")
    else:
        yield f"{prefix}Multi_Map.0.weight", _same(attention.map_conv.weight)
        yield from _norm(attention.map_norm, f"{prefix}Multi_Map.1.")
        yield f"{prefix}net_SE.1.weight", _same(attention.fc1.weight)
        yield f"{prefix}net_SE.2.weight", _same(last.weight)


def _norm(norm: nn.BatchNorm2d, prefix: str) -> Iterator[tuple[str, Target]]:
    for theirs, ours in _NORM_NAMES.items():
        yield prefix + theirs, _same(getattr(norm, ours))


def _same(tensor: Tensor) -> Target:
    return Target(tensor, tuple(tensor.shape))


def _as_convolution(weight: Tensor) -> Target:
    """The reference writes the fully connected layers of its double squeeze as 1x1 convolutions."""
    return Target(weight, (*weight.shape, 1, 1))


def _listed(entries: list[str]) -> str:
    more = f" and {len(entries) - _LISTED} more" if len(entries) > _LISTED else ""
    return ", ".join(entries[:_LISTED]) + more
