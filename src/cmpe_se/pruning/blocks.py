"""The residual blocks of a network that is to be pruned: what they add, and which of them can go as a whole."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cmpe_se.conversion.convert import convert
from cmpe_se.errors import UserError
from cmpe_se.finetuning.gates import gates_of
from cmpe_se.inspecting.forcing import can_hold, forced_gates
from cmpe_se.inspecting.inspect import find_gates, look
from cmpe_se.networks.blocks import PreActBlock
from cmpe_se.pruning.criteria import Batches, BlockWorth
from cmpe_se.pruning.widths import channels_of
from cmpe_se.utils.copying import copy_network


def with_gates(model: nn.Module) -> nn.Module:
    """A copy whose blocks have gates: the network's own, or such as are always 1 in one that has none.

    Raises:
        UserError: a merged network, or one without a residual block.
    """
    if gates_of(model):
        return copy_network(model, "take a network that can be copied")
    try:
        return convert(model, view="static")
    except UserError as error:
        raise UserError(f"pruning looks for residual blocks, and there are none: {error}") from None


@torch.no_grad()
def measure_blocks(model: nn.Module, batches: Batches) -> dict[str, BlockWorth]:
    """What each block adds, over images.

    Args:
        model: of :func:`with_gates`, in eval mode.
        batches: one image at least.

    Returns:
        Name of each block to its mean gates and its residual share; of a block that holds several gates, the mean gates
        of the last one, and the mean of the shares.
    """
    sums: dict[str, Tensor] = {}
    shares: dict[str, list[Tensor]] = {}
    count = 0
    like = next(model.parameters())
    made = _makers(model, batches[0][0][:1].to(like))
    for images, _ in batches:
        _, views = look(model, images)
        count += len(images)
        for view in views:
            block = _block(model, view.name)
            sums[view.name] = sums.get(view.name, 0) + view.gate.double().cpu().sum(0)
            if view.residual_share is not None:
                shares.setdefault(block, []).append(view.residual_share.double().cpu())
    worth = {}
    for name, total in sums.items():
        block = _block(model, name)
        share = torch.cat(shares[block]).mean().item() if block in shares else 1.0
        worth[block] = BlockWorth(total / count, share, made.get(name))
    return worth


def _makers(model: nn.Module, image: Tensor) -> dict[str, str]:
    """Name of each gate, as ``look`` has it, to the layer whose output is its residual, where one is seen to be.

    Args:
        model: with gates, in eval mode.
        image: (1, C, H, W).
    """
    gates = find_gates(model)
    makers: dict[str, str] = {}
    given: dict[int, tuple[str, Tensor]] = {}  # the tensors too, so that no number is used again
    handles = []

    def after(name: str) -> Any:
        def note(_: nn.Module, __: object, output: Any) -> None:
            if isinstance(output, Tensor):
                given[id(output)] = name, output

        return note

    def before(name: str) -> Any:
        def note(_: nn.Module, inputs: Sequence[Any]) -> None:
            if inputs and id(inputs[0]) in given:
                makers[name] = given[id(inputs[0])][0]

        return note

    for name, gate in gates.items():
        block = model.get_submodule(_block(model, name))
        if isinstance(block, PreActBlock):
            makers[name] = next(full for full, part in model.named_modules() if part is block.last_conv)
        else:
            handles.append(gate.register_forward_pre_hook(before(name)))
    for name, layer in model.named_modules():
        if channels_of(layer) is not None and layer not in gates.values():
            handles.append(layer.register_forward_hook(after(name)))
    try:
        model(image)
    finally:
        for handle in handles:
            handle.remove()
    return makers


@torch.no_grad()
def removable(model: nn.Module, image: Tensor) -> list[str]:
    """Blocks that hand on exactly what they get where their residual adds nothing, and so can go as a whole.

    Args:
        model: of :func:`with_gates`, in eval mode.
        image: (1, C, H, W).
    """
    gates = find_gates(model)
    blocks = [_block(model, name) for name in gates]
    found = []
    for name, gate in gates.items():
        block = _block(model, name)
        if not block or blocks.count(block) > 1 or not can_hold(gate):
            continue
        seen: list[tuple[Any, Any]] = []
        handle = model.get_submodule(block).register_forward_hook(
            lambda _, inputs, output, seen=seen: seen.append((inputs, output))
        )
        try:
            with forced_gates(model, name, 0.0):
                model(image)
        finally:
            handle.remove()
        if len(seen) == 1 and _hands_on(*seen[0]):
            found.append(block)
    return found


def _hands_on(inputs: Sequence[Any], output: Any) -> bool:
    """Whether a block, of ours or one that takes and gives a single map, gave what it got."""
    given = output[0] if isinstance(output, tuple) else output
    alone = isinstance(output, tuple) or len(inputs) == 1
    return (
        alone and isinstance(given, Tensor) and given.shape == inputs[0].shape and bool(torch.equal(given, inputs[0]))
    )


def _block(model: nn.Module, name: str) -> str:
    """The block of a gate, which goes by the block's name or, where a block has several, by its own."""
    return name.rpartition(".")[0] if name and model.get_submodule(name) is find_gates(model)[name] else name
