"""Folding: how two squeezed vectors become one small picture of the network's inside.

The channels of a block are split into groups of as many channels as the picture has columns. Each group fills two rows
of the picture, the residual squeezes above the identity squeezes::

    row 2g    : residual squeezes of channels g*k ... g*k + k-1
    row 2g + 1: identity squeezes of the same channels

so a 3x3 convolution over it sees neighbouring channels of both flows at once (arXiv 1807.08920, folded inner-imaging).
"""

import torch
from torch import Tensor

SMALLEST_SIDE = 3  # of a picture that a 3x3 convolution without padding can read
PAPER_COLUMNS = 16  # the fold of the paper's bottleneck networks


def fold(residual: Tensor, identity: Tensor, columns: int) -> Tensor:
    """Lay residual and identity squeezes out as one picture.

    Args:
        residual: squeezed residual, (N, C).
        identity: squeezed identity, (N, C).
        columns: width k of the picture, a divisor of C.

    Returns:
        Picture of shape (N, 1, 2C/k, k).
    """
    batch, channels = residual.shape
    groups = (batch, channels // columns, columns)
    rows = torch.stack((residual.reshape(groups), identity.reshape(groups)), dim=2)  # (N, C/k, 2, k)
    return rows.reshape(batch, 1, 2 * channels // columns, columns)


def unfold(picture: Tensor) -> tuple[Tensor, Tensor]:
    """The two vectors (N, C) that a picture (N, 1, 2C/k, k) shows: the inverse of :func:`fold`."""
    batch, _, height, columns = picture.shape
    rows = picture.reshape(batch, height // 2, 2, columns)  # (N, C/k, 2, k)
    return rows[:, :, 0].reshape(batch, -1), rows[:, :, 1].reshape(batch, -1)


def picture_size(channels: int, columns: int) -> tuple[int, int]:
    """Height and width of the picture that ``channels`` channels fold to with ``columns`` columns.

    Raises:
        ValueError: ``columns`` does not divide ``channels``, or a side of the picture would be less than 3.
    """
    if columns < 1 or channels % columns:
        raise ValueError(f"cannot fold {channels} channels into {columns} columns: columns must divide the channels")
    height, width = 2 * channels // columns, columns
    if min(height, width) < SMALLEST_SIDE:
        raise ValueError(
            f"cannot fold {channels} channels into {columns} columns: the picture would be {height}x{width}, "
            f"and a 3x3 convolution needs both sides to be at least {SMALLEST_SIDE}"
        )
    return height, width


def possible_columns(channels: int) -> list[int]:
    """Every number of columns into which ``channels`` channels can fold, ascending; empty where there is none."""
    return [k for k in range(SMALLEST_SIDE, channels // 2 + 1) if channels % k == 0]


def default_columns(channels: int) -> int:
    """Columns of the most nearly square picture of ``channels`` channels, both sides at least 3.

    A picture and its transpose are equally square. Of the two, the one with the paper's 16 columns is taken (so 64,
    128 and 256 channels fold to the paper's 8x16, 16x16 and 32x16), or else the wider one.

    Raises:
        ValueError: no picture has both sides of at least 3 (``channels`` is prime or less than 6). The message names
            the nearest numbers of channels that fold and the views that need no fold.
    """
    choices = possible_columns(channels)
    if not choices:
        nearest = " or ".join(str(c) for c in _nearest_foldable(channels))
        raise ValueError(
            f"a folded view cannot fold {channels} channels into a picture with both sides at least "
            f"{SMALLEST_SIDE}; use {nearest} channels, or a view that needs no fold, such as 'se', 'double_fc', "
            "'pair_view_2x1' or 'pair_view_1x1'"
        )

    def preference(columns: int) -> tuple[float, bool, int]:
        height, width = picture_size(channels, columns)
        return max(height, width) / min(height, width), columns != PAPER_COLUMNS, -columns

    return min(choices, key=preference)


def _nearest_foldable(channels: int) -> list[int]:
    """The nearest smaller and the nearest larger number of channels that fold, those that exist."""
    smaller = next((c for c in range(channels - 1, 0, -1) if possible_columns(c)), None)
    larger = next(c for c in range(max(channels, 0) + 1, 2 * max(channels, 0) + 8) if possible_columns(c))
    return [c for c in (smaller, larger) if c is not None]
