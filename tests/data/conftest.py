"""Small real image files, in the formats that data sets come in."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("CMPE_SE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def make_folder(tmp_path):
    """make_folder({"train/cat": 3, ...}, size=(32, 32)) writes so many images of random pixels and returns the root."""

    def make(counts, *, size=(32, 32), suffix=".png", name="images", seed=0):
        random = np.random.default_rng(seed)
        for folder, count in counts.items():
            (tmp_path / name / folder).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / name / folder / f"{index:03d}{suffix}")
        return tmp_path / name

    return make


@pytest.fixture
def two_classes(make_folder):
    """A train/test folder of two classes: 12 and 5 training images, 4 and 3 for the test, 32x32."""
    return make_folder({"train/cat": 12, "train/dog": 5, "test/cat": 4, "test/dog": 3})
