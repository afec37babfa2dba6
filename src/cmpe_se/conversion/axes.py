"""Which axis of a tensor holds channels and which hold positions, followed through a run on the meta device.

Shapes do not tell. Tokens (N, L, C) have as many axes as signals (N, C, L), images (N, H, W, C) as many as others, and
an attention block may convolve the channels themselves, laid out as a signal (ECA). The operations tell: a convolution
makes channels of its second axis, a linear map of its last one, and views, permutations and sums carry them on. Where
nothing tells, an axis stays unknown.
"""

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from operator import mul
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

CHANNELS, POSITIONS = "channels", "positions"
Axes = tuple[str | None, ...]
"""What each axis of a tensor holds, as far as it is known."""

_aten = torch.ops.aten
_NORMS_OF_THE_SECOND = (_aten.native_batch_norm, _aten.native_group_norm, _aten._native_batch_norm_legit_no_training)
_PRODUCTS = (_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm)
_RESHAPES = (_aten.view, _aten._unsafe_view, _aten.reshape, _aten._reshape_copy)


class Layout(NamedTuple):
    """Shape of a tensor, and what its axes hold."""

    shape: tuple[int, ...]
    axes: Axes

    @property
    def why_not_maps(self) -> str | None:
        """What is wrong with taking the tensor for feature maps (N, C, ...); None if nothing is."""
        if len(self.shape) < 3:
            return "they have no positions"
        if self.axes[1] == POSITIONS or CHANNELS in self.axes[2:]:
            return "their channels are not the second axis alone"
        if self.axes[1] is None:  # logits of attention, for example, have as many axes as images
            return "which of their axes holds the channels cannot be found"
        return None


def joined(first: Axes, second: Axes) -> Axes:
    """What two tensors of one shape tell together, the first one before the second."""
    return tuple(one or other for one, other in zip(first, second, strict=True))


class AxisTracker(TorchDispatchMode):
    """While it is active, what each tensor's axes hold is followed through the operations."""

    def __init__(self) -> None:
        super().__init__()
        self._known = WeakIdKeyDictionary()

    def mark_maps(self, x: Tensor) -> Tensor:
        """Say that a tensor has the axes of feature maps, (N, C, ...); returns it."""
        self._known[x] = (None, CHANNELS, *[POSITIONS] * (x.ndim - 2))
        return x

    def layout(self, x: Tensor) -> Layout:
        """Shape and axes of a tensor."""
        return Layout(tuple(x.shape), self._axes(x))

    def _axes(self, x: Tensor) -> Axes:
        return self._known.get(x, (None,) * x.ndim)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        inputs = [x for value in args for x in (value if isinstance(value, (list, tuple)) else [value])]
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        for output in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(output, Tensor) and tensors:
                self._known[output] = self._axes_of_result(function.overloadpacket, args, tensors, output)
        return result

    def _axes_of_result(self, operation: Any, args: Sequence[Any], tensors: list[Tensor], result: Tensor) -> Axes:
        x = tensors[0]
        axes = self._axes(x)
        if operation is _aten.convolution:
            return axes[0], CHANNELS, *(axis or POSITIONS for axis in axes[2:])
        if operation in _PRODUCTS:
            one, other = (self._axes(tensor) for tensor in tensors[-2:])
            of_weight = other[-1] or (None if operation in (_aten.bmm, _aten.baddbmm) else CHANNELS)
            return *one[:-1], of_weight
        if operation in (_aten.permute, _aten.transpose, _aten.t):
            return _permuted(operation, args, axes)
        if operation is _aten.unsqueeze:
            place = args[1] % (x.ndim + 1)
            return *axes[:place], None, *axes[place:]
        if operation in _RESHAPES:
            return _reshaped(tuple(x.shape), tuple(result.shape), axes)
        if result.ndim < x.ndim:
            return _without(args, axes, result.ndim)
        carried = self._carried(tensors, result)
        if operation in _NORMS_OF_THE_SECOND and result.ndim > 1:
            return joined(carried, (None, CHANNELS, *[None] * (result.ndim - 2)))
        if operation is _aten.native_layer_norm and len(args[1]) == 1:
            return joined(carried, (*[None] * (result.ndim - 1), CHANNELS))
        return carried

    def _carried(self, tensors: list[Tensor], result: Tensor) -> Axes:
        """Of an operation that leaves axes where they are; sizes of the first input's may change, others broadcast."""
        alike = [x for x in tensors if x.ndim == result.ndim]
        if not alike:
            return (None,) * result.ndim
        axes = self._axes(alike[0])
        for x in alike[1:]:
            same = (size == wanted for size, wanted in zip(x.shape, result.shape, strict=True))
            axes = joined(axes, tuple(axis if ok else None for axis, ok in zip(self._axes(x), same, strict=True)))
        return axes


def _permuted(operation: Any, args: Sequence[Any], axes: Axes) -> Axes:
    order = list(range(len(axes)))
    if operation is _aten.permute:
        order = [axis % len(axes) for axis in args[1]]
    elif operation is _aten.transpose:
        first, second = args[1] % len(axes), args[2] % len(axes)
        order[first], order[second] = second, first
    else:
        order.reverse()
    return tuple(axes[axis] for axis in order)


def _without(args: Sequence[Any], axes: Axes, number: int) -> Axes:
    """Of an operation that removes axes: a reduction, a selection."""
    gone = args[1] if len(args) > 1 else 0
    places = [gone] if isinstance(gone, int) else gone if isinstance(gone, (list, tuple)) else []
    left = tuple(axis for place, axis in enumerate(axes) if place not in (number % len(axes) for number in places))
    return left if len(left) == number else (None,) * number


def _reshaped(before: tuple[int, ...], after: tuple[int, ...], axes: Axes) -> Axes:
    """Of a view: axes that are split or merged hold what all of them held, if that is one thing.

    An axis begins where as many elements are before it as there; axes of size 1 are nobody's.
    """
    if before == after:
        return axes
    if 0 in before:
        return (None,) * len(after)
    cuts = _cuts(before) & _cuts(after)

    def groups(shape: tuple[int, ...]) -> list[int]:
        starts = [1, *accumulate(shape, mul)][:-1]
        return [sum(cut <= start for cut in cuts) for start in starts]

    held: dict[int, set[str | None]] = {}
    for group, axis, size in zip(groups(before), axes, before, strict=True):
        if size > 1:
            held.setdefault(group, set()).add(axis)
    what = {group: next(iter(axes)) if len(axes) == 1 else None for group, axes in held.items()}
    return tuple(what.get(group) if size > 1 else None for group, size in zip(groups(after), after, strict=True))


def _cuts(shape: tuple[int, ...]) -> set[int]:
    """Numbers of elements before which an axis ends."""
    return {prod(shape[:place]) for place in range(len(shape) + 1)}
