"""Progressive resizing: what is trained on, against Pillow, and a resumed run."""

import numpy as np
import pytest
import torch
from PIL import Image

from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.resizing import ProgressiveResizing


def test_sides_by_epoch():
    resizing = ProgressiveResizing({4: 2, 6: 1}, (8, 16))
    images = torch.rand(2, 3, 8, 16)
    assert [resizing.side(epoch) for epoch in range(5)] == [4, 4, 6, 8, 8]
    assert [tuple(resizing(images, epoch).shape[2:]) for epoch in (1, 2, 3)] == [(4, 8), (6, 12), (8, 16)]
    assert resizing(images, 3) is images


@pytest.mark.parametrize("side", [16, 24])
def test_pixels_are_those_of_an_image_library(side):
    pixels = np.random.default_rng(0).random((32, 32), dtype=np.float32)
    expected = np.asarray(Image.fromarray(pixels, mode="F").resize((side, side), Image.Resampling.BILINEAR))
    found = ProgressiveResizing({side: 1}, (32, 32))(torch.from_numpy(pixels)[None, None], 0)
    torch.testing.assert_close(found[0, 0], torch.from_numpy(expected.copy()), atol=1e-5, rtol=0)


def test_a_file_of_settings_keeps_it():
    config = TrainingConfig.from_recipe("digits", progressive_resizing={4: 2, 6: 1}, epochs=4)
    assert config.progressive_resizing == {4: 2, 6: 1}
    assert "progressive_resizing:\n  4: 2\n  6: 1" in config.to_yaml()
