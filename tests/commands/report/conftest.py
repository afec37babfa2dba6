"""Images of one's own to report on."""

from pathlib import Path

import pytest

from tests.training.conftest import write_digits
from tests.training.processes import empty_folder


@pytest.fixture(scope="session")
def digit_files() -> Path:
    """A folder of three digits as PNG files of 32x32."""
    return write_digits(empty_folder() / "images", {"some": 1}, digits=(0, 3, 4), side=32)
