"""Predictions of a network with the gates of a block held at given values."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from cmpe_se.errors import UserError
from cmpe_se.inspecting.inspect import find_gates
from cmpe_se.layers.merged_gate import MergedGate


def can_hold(gate: nn.Module) -> bool:
    """Whether a gate, one of :func:`find_gates`, can be held to values: it is one number for each channel."""
    return not hasattr(gate, "map_gate")


@contextmanager
def forced_gates(model: nn.Module, block: str, gates: float | Tensor) -> Iterator[None]:
    """Hold a block's gates to given values, for as long as the context lasts.

    The last layer before the sigmoid puts out their logits instead of its own, so whatever follows it follows as
    always, and :func:`cmpe_se.inspect_gates` sees the forced gates. At 0 the block adds nothing to its identity.

    Args:
        model: network as :func:`cmpe_se.inspect_gates` takes it; it is left as it was.
        block: its name, one of :func:`gated_blocks`.
        gates: one value for all channels or one for each, (C,), from 0 to the gate's gain.

    Raises:
        UserError: no such block, as many values as there are no channels, or a value outside that range.
    """
    found = find_gates(getattr(model, "_orig_mod", model))
    if block not in found:
        raise UserError(f"no competitive block is called '{block}'; there are {', '.join(found)}")
    gate = found[block]
    if not can_hold(gate):
        raise UserError(
            f"the gates of {block} (view {gate.view}) rescale whole feature maps by themselves, and cannot be held"
        )
    last = _last_layer(gate)
    like = next(last.parameters())
    values = torch.as_tensor(gates, dtype=like.dtype, device=like.device)
    channels = gate.excite.out_features if isinstance(gate, MergedGate) else gate.channels
    if values.numel() not in (1, channels) or values.ndim > 1:
        raise UserError(f"{block} has {channels} channels; give one gate or one each, not {values.numel()}")
    if not bool(((values >= 0) & (values <= gate.gain)).all()):  # NaN is none of these either
        raise UserError(f"the gates of {block} are from 0 to {gate.gain:g}; {gates} is outside")
    logits = torch.logit(values / gate.gain)  # infinite at both ends, of which the sigmoid makes 0 and 1 exactly

    def instead(_: nn.Module, __: object, output: Tensor) -> Tensor:
        return torch.zeros_like(output) + logits.to(output.dtype)

    handle = last.register_forward_hook(instead)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def held_one_by_one(model: nn.Module, image: Tensor, gates: Mapping[str, Tensor]) -> Any:
    """What a network puts out for one image with the gates of one block after another held, in a single pass.

    The image goes through it in as many copies as there are blocks; in each copy one block's gates are held.

    Args:
        model: in eval mode, as :func:`forced_gates` takes it; it is left as it was.
        image: (C, H, W), on the network's device.
        gates: block to its held gates, (C,), from 0 to the gate's gain; blocks for which :func:`can_hold` is true.

    Returns:
        The output for the copies, in the order of ``gates``.
    """
    found = find_gates(getattr(model, "_orig_mod", model))
    handles = []

    def hold(row: int, gate: nn.Module, values: Tensor) -> Any:
        logits = torch.logit(values / cast(float, gate.gain))

        def instead(_: nn.Module, __: object, output: Tensor) -> Tensor:
            output = output.clone()
            output[row] = logits.to(output)
            return output

        return _last_layer(gate).register_forward_hook(instead)

    try:
        for row, (block, values) in enumerate(gates.items()):
            handles.append(hold(row, found[block], values))
        return model(image.expand(len(gates), *image.shape))
    finally:
        for handle in handles:
            handle.remove()


def _last_layer(gate: nn.Module) -> nn.Linear:
    return cast(nn.Linear, gate.get_submodule("excite" if hasattr(gate, "excite") else "fc2"))
