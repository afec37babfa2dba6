"""Which axis of a tensor has its channels, by the operations that it went through."""

import math
from typing import Any, NamedTuple

CONVOLUTIONS = ("aten.convolution.default", "aten._convolution.default", "aten.mkldnn_convolution.default")
LINEAR = ("aten.mm.default", "aten.addmm.default", "aten.bmm.default", "aten.baddbmm.default", "aten.linear.default")
_SWAPPED = ("aten.transpose.int", "aten.t.default")
_RESHAPED = ("aten.view.default", "aten._unsafe_view.default", "aten.reshape.default", "aten._reshape_copy.default")


class Channels(NamedTuple):
    """Where a tensor has its channels, and how many; a tensor whose shape hides them knows where they were."""

    axis: int
    size: int
    dimensions: int
    hidden: bool = False


def channels_after(
    function: str, args: Any, known: list[tuple[tuple[int, ...], Channels]], result: tuple[int, ...]
) -> Channels | None:
    """The channels of a result, as far as its operands (shape, channels) say."""
    size = len(result)
    if function in CONVOLUTIONS:
        return Channels(1, result[1], size)
    if function in LINEAR:
        return Channels(size - 1, result[-1], size)
    if not known:
        return None
    shape, (axis, count, dimensions, hidden) = known[0]
    if function in _RESHAPED:
        if hidden:  # as an instance norm and a channel shuffle give back the shape that they were given
            back = size == dimensions and result[axis] == count
            return Channels(axis, count, dimensions, not back)
        ahead = math.prod(shape[:axis])
        places = [place for place in range(size) if result[place] == count and math.prod(result[:place]) == ahead]
        return Channels(places[0], count, size) if places else Channels(axis, count, dimensions, True)
    if hidden:
        return known[0][1]
    if function == "aten.permute.default":
        return Channels([place % len(shape) for place in args[1]].index(axis), count, size)
    if function in _SWAPPED:
        one, other = (args[1] % len(shape), args[2] % len(shape)) if len(args) == 3 else (0, 1)
        return Channels({one: other, other: one}.get(axis, axis), count, size)
    axes = {channels.axis for shape, channels in known if len(shape) == size and not channels.hidden}
    return Channels(axes.pop(), result[axis], size) if len(axes) == 1 else None
