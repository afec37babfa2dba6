"""Progressive resizing: what is trained on, against Pillow, and a resumed run."""

import numpy as np
import pytest
import torch
from PIL import Image

from cmpe_se.training import train
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.resizing import ProgressiveResizing
from tests.training.runs import assert_same_tensors, weights


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


@pytest.mark.slow
def test_a_run_trains_at_its_sizes_and_resumes(tmp_path, monkeypatch):
    """Interrupted within its first size, and resumed, it ends with the weights of one that was not."""
    sides = []
    inner = ProgressiveResizing.__call__

    def noted(self, images, epoch):
        made = inner(self, images, epoch)
        sides.append((epoch, made.shape[-1]))
        return made

    monkeypatch.setattr(ProgressiveResizing, "__call__", noted)
    settings = {"recipe": "digits", "epochs": 3, "progressive_resizing": {4: 1, 6: 1}, "mixup": 0.2, "accumulate": 2}
    train(output=tmp_path / "whole", **settings)
    assert sorted(set(sides)) == [(0, 4), (1, 6), (2, 8)]

    def stop_in_the_second(self, images, epoch):
        if epoch == 1:
            raise KeyboardInterrupt
        return inner(self, images, epoch)

    monkeypatch.setattr(ProgressiveResizing, "__call__", stop_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        train(output=tmp_path / "parts", **settings)
    sides.clear()
    monkeypatch.setattr(ProgressiveResizing, "__call__", noted)
    train(resume=tmp_path / "parts")
    assert sorted(set(sides)) == [(1, 6), (2, 8)]
    assert_same_tensors(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
