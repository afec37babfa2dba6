"""Which images of class folders a run is tested on, kept in its folder as ``data.json``.

A test part that was drawn from the class folders is kept by its file names: a folder that has changed since would be
split otherwise, and training images would be tested. Runs from before the file have their images listed as they were.
"""

import json
import logging
from pathlib import Path
from typing import Any

from cmpe_se.data import ImageData, Listing
from cmpe_se.data.copies import find_copies
from cmpe_se.errors import UserError
from cmpe_se.training.run_folder import RunFolder, write_text

_log = logging.getLogger(__name__)
_VERSION = "listing"
_TEST_FILES = "test_files"


def read_listing(run: RunFolder) -> Listing:
    """How the images of a run's class folders were listed.

    Raises:
        UserError: ``data.json`` cannot be read.
    """
    path = _file(run)
    if not path.exists():
        return Listing(version=1)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version, names = values[_VERSION], values[_TEST_FILES]
        if version not in (1, 2) or not (names is None or _are_names(names)):
            raise ValueError(f"{_VERSION} should be 1 or 2, and {_TEST_FILES} a list of names or null")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be used ({type(error).__name__}: {error}), and it says which images the run is tested on; "
            "put it back, or test other images by --data-dir"
        ) from None
    return Listing(version, None if names is None else frozenset(names))


def write_listing(run: RunFolder, data: ImageData, in_both: int | None) -> None:
    """Write ``data.json`` for a new run on class folders; others have none.

    Args:
        run: its folder, which exists.
        data: what it is trained on.
        in_both: number of test images that are training images too; None where they were not looked for.
    """
    if data.folders is None:
        return
    values = {
        _VERSION: Listing().version,
        "train_images": data.train_size,
        "test_images": data.test_size,
        "test_images_in_training": in_both,
        "tested": data.tested,
        _TEST_FILES: data.folders.test_names() if data.folders.drawn else None,
    }
    write_text(_file(run), json.dumps(values, indent=2) + "\n")


def warn_of_copies(data: ImageData) -> int:
    """Log how many test images are training images too, and return it; 0 for other data than class folders."""
    if data.folders is None:
        return 0
    train, test = ([path for path, _ in part] for part in (data.folders.train, data.folders.test))
    found = find_copies(train, test)
    if found.example:
        of = f"{found.looked_at:,}" + ("" if found.looked_at == len(test) else " (looked at)")
        _log.warning(
            f"{data.folders.root}: {found.number:,} of {of} test images are in the training part too, byte for byte, "
            f"such as {found.example[0]} and {found.example[1]}: the test accuracy will be too high; remove one of each"
        )
    elif not found.looked_at and test:
        _log.warning(f"{data.folders.root}: too many files of one size to look for test images in the training part")
    return found.number


def _file(run: RunFolder) -> Path:
    return run.path / "data.json"


def _are_names(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)
