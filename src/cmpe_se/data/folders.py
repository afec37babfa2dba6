"""Class folders: their images and classes, for training and for the test."""

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image
from timm.utils.misc import natural_key
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from cmpe_se.data.large import FileSource
from cmpe_se.data.reading import read_image
from cmpe_se.errors import UserError

TEST_NAMES = ("test", "val", "validation")
_PEEKED = 256

_log = logging.getLogger(__name__)

ImageFile = tuple[str, int]
"""A path and the index of its class."""


class ClassFolders(NamedTuple):
    """The image files of a folder, in a fixed order."""

    root: Path
    classes: tuple[str, ...]
    train: list[ImageFile]
    test: list[ImageFile]


def scan_class_folders(root: Path, test_names: tuple[str, ...] = TEST_NAMES) -> ClassFolders:
    """Lists the images of ``root``/train/<class>/ and ``root``/<one of test_names>/<class>/.

    Where ``root`` holds class folders itself, a fixed fifth of each class becomes the test part, and a log message says
    so. Classes are in natural order (2 before 10), as timm has them. Hidden files and files that are no images by their
    ending are passed over. Raises UserError for anything that cannot be trained on.
    """
    names = _subfolders(root)
    test_name = next((name for name in test_names if name in names), None)
    layout = f"{root}/train/<class>/ and {root}/{'|'.join(test_names)}/<class>/"
    if "train" in names and test_name:
        classes, train = _scan_split(root / "train")
        test_classes, test = _scan_split(root / test_name)
        if classes != test_classes:
            only_train, only_test = (
                _names(set(a) - set(b)) for a, b in ((classes, test_classes), (test_classes, classes))
            )
            raise UserError(
                f"{root}: train and {test_name} have to have the same class folders, but only train has {only_train}, "
                f"and only {test_name} has {only_test}"
            )
        return ClassFolders(root, classes, train, test)
    if "train" in names and (_subfolders(root / "train") or len(names) == 1):
        raise UserError(f"{root} has a folder train but no folder for the test: expected {layout}")
    if test_name and (_subfolders(root / test_name) or len(names) == 1):
        raise UserError(f"{root} has a folder {test_name} but no folder train: expected {layout}")
    if not names:
        raise UserError(f"{root} holds no class folders: expected {layout}, or {root}/<class>/")
    classes, files = _scan_split(root)
    train, test = _split(root, classes, files)
    _log.warning(
        f"{root} has no train and test folders: a fixed fifth of each class becomes the test part, {len(test)} of "
        f"{len(files)} images"
    )
    return ClassFolders(root, classes, train, test)


def _names(names: Iterable[str]) -> str:
    """At most five of ``names``, in order, for a message."""
    names = sorted(names, key=natural_key)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "none"


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_dir()]
    return sorted((name for name in names if not name.startswith((".", "__"))), key=natural_key)


def _scan_split(folder: Path) -> tuple[tuple[str, ...], list[ImageFile]]:
    classes = tuple(_subfolders(folder))
    if len(classes) < 2:
        found = f"only the class folder {classes[0]}" if classes else "no class folders"
        raise UserError(f"{folder} holds {found}: expected at least two folders of images, one for each class")
    skip = len(str(folder))
    files = make_dataset(
        folder,
        {name: index for index, name in enumerate(classes)},
        is_valid_file=lambda path: path.lower().endswith(IMG_EXTENSIONS) and f"{os.sep}." not in path[skip:],
        allow_empty=True,
    )
    files.sort(key=lambda file: file[1])  # make_dataset goes through the classes in plain order
    empty = set(classes) - {classes[label] for _, label in files}
    if empty:
        raise UserError(
            f"{folder}: no images ({', '.join(IMG_EXTENSIONS)}) in the class folder {_names(empty)}; "
            "put some there or remove the folder"
        )
    return classes, files


def _split(root: Path, classes: tuple[str, ...], files: list[ImageFile]) -> tuple[list[ImageFile], list[ImageFile]]:
    by_class: list[list[ImageFile]] = [[] for _ in classes]
    for file in files:
        by_class[file[1]].append(file)
    train, test = [], []
    for name, members in zip(classes, by_class, strict=True):
        if len(members) < 2:
            raise UserError(f"{root}: the class {name} has one image; two are needed to split off a test part")
        held_out = np.random.default_rng(0).permutation(len(members))[: max(1, round(len(members) / 5))]
        test += [members[index] for index in sorted(held_out)]
        train += [file for index, file in enumerate(members) if index not in set(held_out.tolist())]
    return train, test


def common_size(files: FileSource) -> tuple[int, int] | None:
    """(height, width) if the headers of some of the files, spread evenly, all agree; else None.

    Raises the UserError of the first of them if none can be read.
    """
    places = range(0, len(files), max(1, len(files) // _PEEKED))
    sizes = {size for place in places if (size := _header_size(files[place][0]))}
    if not sizes:
        read_image(files[0][0])
    return sizes.pop() if len(sizes) == 1 else None


def _header_size(path: str | BinaryIO) -> tuple[int, int] | None:
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except Exception:  # broken files are reported where they are decoded, all of them together
        return None
