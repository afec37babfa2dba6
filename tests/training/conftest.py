"""Runs that several tests look at, and small sets of real images as files."""

from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
from PIL import Image

from tests.training.processes import SHORT, trained_run


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("CMPE_SE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def digits_run() -> Path:
    """Three epochs of digits: enough to be right about most of them."""
    return trained_run("--epochs=3")


# All that draws random numbers or keeps state between steps.
EVERYTHING = [
    "--drop-rate=0.2",
    "--drop-path-rate=0.2",
    "--mask=0.2",
    "--mixup=0.4",
    "--cutmix=0.5",
    "--label-smoothing=0.1",
    "--ema=0.9",
    "--ema-batch-size=32",
    "--repeated-augmentation=2",
    "--accumulate=2",
    "--clip-grad=1",
    "--momentum=0.8",
    "--warmup-epochs=1",
    "--cutout=2",
    *SHORT,
]


@pytest.fixture(scope="session")
def everything_run() -> Path:
    """Two epochs with everything on, never interrupted."""
    return trained_run(*EVERYTHING)


def write_digits(
    root: Path, counts: dict[str, int], *, digits=(0, 1, 2, 3), side: int = 8, colour: bool = False
) -> Path:
    """Write scikit-learn's digits as PNG files, root/PART/DIGIT/NUMBER.png, no digit twice.

    Args:
        root: folder to make.
        counts: part to its images of each digit.
        digits: the classes.
        side: of the images in pixels.
    """
    images, targets = sklearn.datasets.load_digits(return_X_y=True)
    for digit in digits:
        own = iter(np.rint(images[targets == digit].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8))
        for part, count in counts.items():
            folder = root / part / str(digit)
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                image = Image.fromarray(next(own)).resize((side, side), Image.Resampling.NEAREST)
                image.save(folder / f"{number:03d}.png")
    return root


@pytest.fixture(scope="session")
def digit_folder(tmp_path_factory) -> Path:
    """Class folders of 8x8 PNGs: four digits, 160 for training and 27 + 1 for the test."""
    return write_digits(tmp_path_factory.mktemp("digits") / "images", {"train": 40, "test": 7})
