"""Which axis of a tensor holds its channels: the second behind a convolution, the last behind a linear map.

Networks of both kinds add maps of one shape. A gate for the one would take rows of pixels for channels in the other.
"""

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_SECOND = ("batch_norm", "group_norm", "instance_norm")
_LAST = ("linear", "layer_norm", "rms_norm", "embedding", "bilinear")
_UNKNOWN = ("matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention")
_SWAPS = ("transpose", "transpose_", "swapaxes", "swapdims")
_RESHAPES = ("view", "reshape", "flatten", "unflatten", "_unsafe_view", "view_as", "reshape_as")


class Seen(NamedTuple):
    """What is known of a tensor.

    Args:
        shape: its shape.
        axis: of its channels; None where it is not known.
    """

    shape: tuple[int, ...]
    axis: int | None


class ChannelAxes(TorchFunctionMode):
    """Notes of each tensor that PyTorch's functions put out which axis holds its channels, as far as that is known."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, tuple[Tensor, int]] = {}  # with the tensor, so that no other one gets its id

    def of(self, tensor: Tensor) -> int | None:
        """The axis of a tensor's channels; None where it is not known."""
        known = self._known.get(id(tensor))
        return known and known[1]

    def seen(self, tensor: Tensor) -> Seen:
        """Shape and channels' axis of a tensor."""
        return Seen(tuple(tensor.shape), self.of(tensor))

    def note(self, tensor: Tensor, axis: int | None) -> None:
        """Take a tensor's channels to be at an axis; None to forget it."""
        if axis is None:
            self._known.pop(id(tensor), None)
        else:
            self._known[id(tensor)] = tensor, axis

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [value for value in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        shapes = [tuple(value.shape) for value in inputs]  # an operation in place may change them
        result = function(*args, **kwargs)
        for output in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(output, Tensor):
                self.note(output, self._axis(getattr(function, "__name__", ""), args, kwargs, inputs, shapes, output))
        return result

    def _axis(
        self, name: str, args: Any, kwargs: Any, inputs: list[Tensor], shapes: list[tuple[int, ...]], output: Tensor
    ) -> int | None:
        if "conv" in name or name in _SECOND:
            return 1
        pairs = zip(inputs, shapes, strict=True)
        known = [(shape, axis) for value, shape in pairs if (axis := self.of(value)) is not None]
        if name in _LAST:
            axis = self.of(inputs[0]) if name.endswith("norm") else None
            return output.ndim - 1 if axis is None else axis
        if name in _UNKNOWN or not known:
            return None
        shape, axis = known[0]
        if name in _SWAPS:
            swapped = [value % len(shape) for value in (*args[1:], *kwargs.values()) if isinstance(value, int)][:2]
            return swapped[1 - swapped.index(axis)] if axis in swapped else axis
        if name == "permute":
            order = kwargs.get("dims", args[1] if len(args) == 2 else args[1:])
            return [value % len(shape) for value in order].index(axis)
        if name in _RESHAPES:
            return _kept(shape, axis, tuple(output.shape))
        if name == "unsqueeze":
            new = kwargs.get("dim", args[1] if len(args) > 1 else 0) % output.ndim
            return axis + (new <= axis)
        # Anything else: where an input has the same axes. Of several (a product with a gate), the largest tells.
        for before, place in sorted(known, key=lambda item: -prod(item[0])):
            if len(before) == output.ndim and (before[place] == output.shape[place] or name in ("cat", "concat")):
                return place
        return None


def _kept(shape: tuple[int, ...], axis: int, new: tuple[int, ...]) -> int | None:
    """Where an axis is after a reshape, if all before it or all behind it stays as it is."""
    if axis < len(new) and shape[: axis + 1] == new[: axis + 1]:
        return axis
    behind = len(shape) - axis
    if behind <= len(new) and shape[axis:] == new[len(new) - behind :]:
        return len(new) - behind
    return None
