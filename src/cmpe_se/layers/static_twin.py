"""Gates of a network by the blocks that they are in, and a static gate in the place of another."""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from cmpe_se.errors import UserError
from cmpe_se.layers.attention import CompetitiveSE

_ENDS = 1e-30, 1 - 2**-53  # parts of a gate's largest value whose logits are numbers in any dtype


def by_block(gates: Mapping[str, nn.Module]) -> dict[str, str]:
    """The names that gates go by, to their full names: the block's, and the gate's own where a block has several.

    Args:
        gates: by their full names.
    """
    blocks = {name: name.rpartition(".")[0] for name in gates}
    counts = Counter(blocks.values())
    return {block if block and counts[block] == 1 else name: name for name, block in blocks.items()}


def dynamic_gates(model: nn.Module) -> dict[str, CompetitiveSE]:
    """Block names to the gates that depend on the image, in the network's order."""
    gates = _gates(model)
    return {block: gates[name] for block, name in by_block(gates).items() if gates[name].kind.form != "constant"}


def _gates(model: nn.Module) -> dict[str, CompetitiveSE]:
    return {name: module for name, module in model.named_modules() if isinstance(module, CompetitiveSE)}


@torch.no_grad()
def static_twin(gate: CompetitiveSE, values: Tensor | None = None) -> CompetitiveSE:
    """A gate of view ``static`` that fits in the place of another: same channels, start, factor, dtype and mode.

    Args:
        gate: of any view that has one number a channel.
        values: what the new gate is to be, (C,) from 0 to the largest value of the other; its start if left out.

    Raises:
        UserError: a gate that differs from position to position, or scales the identity too.
    """
    if gate.kind.by_position:
        raise UserError(
            f"view '{gate.view}' differs from position to position, and a static gate is one number a channel"
        )
    like = next(gate.parameters())
    twin = CompetitiveSE(gate.channels, view="static", start=gate.start, device=like.device, dtype=like.dtype)
    twin.gain = gate.gain  # which in a converted network may hold a factor of its addition
    if values is not None:
        parts = (values.double() / gate.gain).clamp(*_ENDS)
        twin.get_parameter("fc2.bias").copy_(parts.logit())
    return twin.train(gate.training)


def make_static(model: nn.Module, blocks: Sequence[str]) -> None:
    """Put static gates, at their start, in the place of those of some blocks; the network is changed.

    Args:
        model: a network with gates.
        blocks: names of blocks, as :func:`by_block` has them.

    Raises:
        ValueError: no such block, or one whose gate cannot be static.
    """
    gates = _gates(model)
    names = by_block(gates)
    if unknown := [block for block in blocks if block not in names]:
        raise ValueError(f"static names no block with a gate: {unknown[0]}; there are {', '.join(names)}")
    for block in dict.fromkeys(blocks):
        try:
            put_gate(model, gates[names[block]], static_twin(gates[names[block]]))
        except UserError as error:
            raise ValueError(f"block {block}: {error}") from None


def put_gate(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a gate in the place of another, wherever in the network that stands."""
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):
            if module is old:
                setattr(parent, child, new)
