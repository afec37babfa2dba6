"""Tensors whose parts are on several processes (``DTensor``, of FSDP2), as whole ones and back."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a process's part of a larger one."""
    return hasattr(tensor, "full_tensor")  # an import of DTensor takes half a second


def whole(tree: Any) -> Any:
    """A tree of dicts, lists and tensors with all tensors whole; those that were sharded are on the CPU.

    All processes call this at once, with trees that are alike.
    """
    if isinstance(tree, Tensor):
        return tree.full_tensor().cpu() if is_sharded(tree) else tree  # type: ignore[attr-defined]  # of DTensor
    if isinstance(tree, Mapping):
        return {key: whole(value) for key, value in tree.items()}
    if isinstance(tree, tuple):
        return tuple(map(whole, tree))
    if isinstance(tree, list):
        return [whole(value) for value in tree]
    return tree


def shared_out_like(tensors: Mapping[str, Tensor], examples: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors, shared out as those of the same name in ``examples`` are; those that are not stay as they are.

    Each process takes its part of what it has, so all of them have to have the same.
    """
    return {name: part_like(tensor, examples[name]) for name, tensor in tensors.items()}


def part_like(tensor: Tensor, example: Tensor) -> Tensor:
    """The part of a whole tensor that a process has where ``example`` is sharded; else the tensor."""
    if not is_sharded(example):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = example.device_mesh, example.placements  # type: ignore[attr-defined]  # of DTensor
    return distribute_tensor(tensor.to(mesh.device_type).contiguous(), mesh, placements, src_data_rank=None)
