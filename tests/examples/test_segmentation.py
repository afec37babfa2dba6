"""The example of dense prediction learns."""

import runpy
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "segmentation.py"


def test_loss_falls():
    losses = runpy.run_path(str(EXAMPLE))["train"](steps=12)
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


def test_scenes():
    images, labels = runpy.run_path(str(EXAMPLE))["digit_scenes"](3)
    assert images.shape == (3, 3, 64, 64)
    assert labels.shape == (3, 64, 64)
    assert len(labels.unique()) > 5
    assert ((labels > 0) == (images[:, 0] >= 0.5)).all()
