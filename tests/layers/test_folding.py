"""The default fold against brute force, the paper's pictures, and errors that say what would fit."""

import re
from fractions import Fraction

import pytest
import torch

from cmpe_se.layers.folding import default_columns, fold, picture_size, possible_columns, unfold


def brute_force(channels: int) -> list[int]:
    """Every width of a picture of 2C pixels with both sides at least 3 whose rows come in whole pairs."""
    return [
        width
        for width in range(3, 2 * channels + 1)
        for height in range(3, 2 * channels // width + 1)
        if height * width == 2 * channels and height % 2 == 0
    ]


FOLDABLE = {channels: widths for channels in range(1, 601) if (widths := brute_force(channels))}
UNFOLDABLE = [channels for channels in range(1, 601) if channels not in FOLDABLE]


def test_default_is_the_most_nearly_square_picture():
    for channels, widths in FOLDABLE.items():

        def ratio(width, channels=channels):
            height = Fraction(2 * channels, width)
            return max(height / width, width / height)

        best = min(ratio(width) for width in widths)
        equals = [width for width in widths if ratio(width) == best]
        expected = 16 if 16 in equals else max(equals)
        assert default_columns(channels) == expected, channels
        assert picture_size(channels, expected) == (2 * channels // expected, expected)


def test_possible_columns():
    for channels in range(1, 601):
        assert possible_columns(channels) == FOLDABLE.get(channels, []), channels


@pytest.mark.parametrize(
    ("channels", "columns", "size"),
    [
        (64, None, (8, 16)),  # ResNet-164
        (128, None, (16, 16)),
        (256, None, (32, 16)),
        (160, 16, (20, 16)),  # wide, k = 10
        (320, 32, (20, 32)),
        (640, 64, (20, 64)),
        (6, None, (4, 3)),
        (8, None, (4, 4)),
        (9, None, (6, 3)),
        (16, None, (4, 8)),
        (32, None, (8, 8)),
    ],
)
def test_sizes(channels, columns, size):
    assert picture_size(channels, columns or default_columns(channels)) == size


@pytest.mark.parametrize(("channels", "columns"), [(64, 16), (6, 3), (160, 16), (40, 20), (12, 4)])
def test_fold_puts_each_channel_where_the_method_says(channels, columns):
    residual, identity = torch.randn(2, 3, channels, generator=torch.Generator().manual_seed(0))
    picture = fold(residual, identity, columns)
    assert picture.shape == (3, 1, 2 * channels // columns, columns)
    for c in range(channels):
        group, column = divmod(c, columns)
        assert torch.equal(picture[:, 0, 2 * group, column], residual[:, c])
        assert torch.equal(picture[:, 0, 2 * group + 1, column], identity[:, c])


def test_fold_takes_tensors_that_are_not_contiguous():
    residual, identity = torch.randn(2, 12, 3).transpose(1, 2)
    assert torch.equal(fold(residual, identity, 4), fold(residual.contiguous(), identity.contiguous(), 4))


def test_the_error_names_the_nearest_channels_that_fold_and_the_other_views():
    assert {1, 2, 3, 4, 5, 7, 11, 599} <= set(UNFOLDABLE)
    assert all(channels < 6 or not any(channels % d == 0 for d in range(2, channels)) for channels in UNFOLDABLE)
    for channels in UNFOLDABLE:
        with pytest.raises(ValueError, match="cannot fold") as refusal:
            default_columns(channels)
        message = str(refusal.value)
        nearest = [max((c for c in FOLDABLE if c < channels), default=None)]
        nearest += [min((c for c in FOLDABLE if c > channels), default=None)]
        assert f"fold {channels} channels" in message
        assert re.search(r"use (.*) channels", message)[1] == " or ".join(str(c) for c in nearest if c), message
        for view in ("'se'", "'double_fc'", "'pair_view_2x1'", "'pair_view_1x1'"):
            assert view in message
        assert "\n" not in message


@pytest.mark.parametrize(
    ("channels", "columns", "sentence"),
    [
        (64, 12, "cannot fold 64 channels into 12 columns: columns must divide the channels"),
        (64, 128, "columns must divide the channels"),
        (64, 0, "columns must divide the channels"),
        (64, -16, "columns must divide the channels"),
        (64, 64, "the picture would be 2x64, and a 3x3 convolution needs both sides to be at least 3"),
        (64, 2, "the picture would be 64x2, and a 3x3 convolution needs both sides to be at least 3"),
        (64, 1, "the picture would be 128x1"),
    ],
)
def test_columns_that_do_not_fit(channels, columns, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        picture_size(channels, columns)


def test_unfold_is_the_inverse():
    residual, identity = torch.randn(2, 5, 24)
    for columns in possible_columns(24):
        assert all(map(torch.equal, unfold(fold(residual, identity, columns)), (residual, identity)))
