"""Trained runs to report on."""

from pathlib import Path

import pytest

from tests.training.conftest import write_digits
from tests.training.processes import empty_folder, trained_run


@pytest.fixture(scope="session")
def trained() -> Path:
    """Our network with folded_3x3, after three epochs: it has learnt something, and makes mistakes."""
    return trained_run("--epochs=3")


@pytest.fixture(scope="session")
def converted() -> Path:
    """A converted network of timm's with bottlenecks, after an epoch."""
    return trained_run("--epochs=1", "--model=test_resnet", "--convert=pair_view_1x1")


@pytest.fixture(scope="session")
def without_picture() -> Path:
    """Plain SE after an epoch."""
    return trained_run("--epochs=1", "--model=se_preact_resnet20")


@pytest.fixture(scope="session")
def plain() -> Path:
    """No competition at all."""
    return trained_run("--epochs=1", "--model=preact_resnet20")


@pytest.fixture(scope="session")
def digit_files() -> Path:
    """A folder of three digits as PNG files of 32x32."""
    return write_digits(empty_folder() / "images", {"some": 1}, digits=(0, 3, 4), side=32)
