"""Class folders: their images and classes, for training and for the test."""

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from timm.utils.misc import natural_key
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from cmpe_se.data.class_files import ClassFolders, ImageFile, Listing, name_in
from cmpe_se.data.image_files import broken_link, find_images, image_suffixes, is_hidden, notes_on
from cmpe_se.data.large import FileSource
from cmpe_se.data.layout import choose_parts, part_to_test, refuse_likely_parts
from cmpe_se.data.reading import read_image
from cmpe_se.data.splits import places_of, role_of
from cmpe_se.errors import UserError

_PEEKED = 256
_FIRST_TEST_NAMES = ("test", "val", "validation")  # that runs with a ``Listing`` of version 1 looked for, in this order

_log = logging.getLogger(__name__)


def scan_class_folders(
    root: Path,
    test_roles: Sequence[str] = ("test", "val"),
    *,
    train_split: str | None = None,
    test_split: str | None = None,
    listing: Listing | None = None,
    skip_broken: bool = False,
    log: Callable[[str], None] | None = None,
) -> ClassFolders:
    """Lists the images of ``root``/train/<class>/ and ``root``/test/<class>/ (or val).

    A part may have any of its usual names, in any case (``splits.role_of``), or the name that is given. Of several
    parts to test on, the first one of ``test_roles`` that holds classes of the training part is taken, and a log
    message says what is left out.

    Where ``root`` holds class folders itself, a fixed fifth of each class becomes the test part, and a log message says
    so. Classes are in natural order (2 before 10), as timm has them. Hidden files and files that are no images by their
    ending are passed over; the log says how many.

    Args:
        root: the folder.
        test_roles: roles of the parts that may be tested.
        train_split: folder of the training part.
        test_split: folder of the test part.
        listing: of a run, to list its images again.
        skip_broken: list links that lead nowhere instead of refusing them.
        log: takes the messages; a warning of the package's log if left out.

    Raises UserError for anything that cannot be trained on.
    """
    listing, log = listing or Listing(), log or _log.warning
    names = _subfolders(root)
    if listing.version == 1 and train_split is None and test_split is None and "train" in names:
        found = [name for name in _FIRST_TEST_NAMES if name in names and role_of(name) in test_roles]
        train_split, test_split = ("train", found[0]) if found else (None, None)
    parts = choose_parts(root, names, test_roles, train_split, test_split, _subfolders)
    if parts:
        train_name, test_name, left_out = parts
        if left_out:
            log(f"{root}: {test_name} is tested; not used: {', '.join(left_out)}")
        classes, train, _ = _scan_part(root / train_name, listing, log)
        test_classes, test, broken = _scan_part(root / test_name, listing, log, skip_broken=skip_broken)
        if classes != test_classes:
            only_train, only_test = (
                _names(set(a) - set(b)) for a, b in ((classes, test_classes), (test_classes, classes))
            )
            raise UserError(
                f"{root}: {train_name} and {test_name} have to have the same class folders, but only {train_name} has "
                f"{only_train}, and only {test_name} has {only_test}"
            )
        return ClassFolders(root, classes, train, test, f"the images in {root / test_name}", False, broken)
    classes, files, broken = _scan_part(root, listing, log, skip_broken=skip_broken, refuse=refuse_likely_parts)
    if listing.test_files is not None:
        train, test = _split_again(root, files, listing.test_files, log)
    else:
        train, test = _split(root, classes, files)
        log(
            f"{root} has no train and test folders: a fixed fifth of each class becomes the test part, {len(test)} of "
            f"{len(files)} images"
        )
    tested = f"the images in {root} that are held out from training"
    return ClassFolders(root, classes, train, test, tested, True, broken)


def scan_hold_out(
    root: Path, known: Sequence[str], test_roles: Sequence[str] = ("test", "val"), *, test_split: str | None = None
) -> ClassFolders:
    """Lists all images of a folder that is only tested on: of ``root``/test/<class>/ (or val), or ``root``/<class>/.

    Args:
        root: the folder.
        known: classes of the network. A folder that is named like one of them is no part of the data, and of several
            parts to test on, the first one of ``test_roles`` that holds some of them is taken.
        test_roles: roles of the parts that may be tested.
        test_split: folder of the test part.

    The classes are ``known``, and a label is an index into them. Raises UserError where there are no images, and for
    images of other classes.
    """
    names = _subfolders(root)
    part = part_to_test(root, names, test_roles, test_split, known, _subfolders)
    folder = root / part if part else root
    classes = tuple(_subfolders(folder))
    images, broken = _list_images(folder, classes, _log.warning)
    found = [(name, paths) for name, paths in zip(classes, images, strict=True) if paths]
    if not found:
        raise UserError(
            f"{folder} holds no class folders with images: expected {folder}/<class>/; `cmpe-se predict` takes images "
            "without classes"
        )
    if empty := set(classes) - {name for name, _ in found}:
        _log.warning(f"{folder}: no images in {_names(empty)}")
    places = places_of([name for name, _ in found], known, str(folder), of_folders=True)
    test = [(path, place) for place, (_, paths) in zip(places, found, strict=True) for path in paths]
    return ClassFolders(root, tuple(known), [], test, f"all images in {folder}", False, broken)


def _names(names: Iterable[str]) -> str:
    """At most five of ``names``, in order, for a message."""
    names = sorted(names, key=natural_key)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "none"


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_dir()]
    return sorted((name for name in names if not is_hidden(name) and not name.startswith("__")), key=natural_key)


def _scan_part(
    folder: Path,
    listing: Listing,
    log: Callable[[str], None],
    *,
    skip_broken: bool = False,
    refuse: Callable[[Path, Sequence[str], Sequence[list[str]]], None] | None = None,
) -> tuple[tuple[str, ...], list[ImageFile], list[str]]:
    """Classes, images, and links that lead nowhere; ``refuse`` looks at the images of each class first."""
    classes = tuple(_subfolders(folder))
    if len(classes) < 2:
        found = f"only the class folder {classes[0]}" if classes else "no class folders"
        below = [name for name in classes if any(map(role_of, _subfolders(folder / name)))]
        hint = f"; for the data set in it, give {folder / below[0]}" if below else ""
        raise UserError(f"{folder} holds {found}: expected at least two folders of images, one for each class{hint}")
    if listing.version == 1:
        images, broken = _list_as_first(folder, classes), list[str]()
    else:
        images, broken = _list_images(folder, classes, log)
        if refuse:
            refuse(folder, classes, images)
    if broken and not skip_broken:
        raise UserError(_describe_broken(broken))
    if empty := [name for name, paths in zip(classes, images, strict=True) if not paths]:
        raise UserError(
            f"{folder}: no images of its own (.png, .jpg, ...) in the class folder {_names(empty)}; put some there or "
            "remove the folder"
        )
    return classes, [(path, index) for index, paths in enumerate(images) for path in paths], broken


def _list_images(folder: Path, classes: Sequence[str], log: Callable[[str], None]) -> tuple[list[list[str]], list[str]]:
    """The images of each class and the links that lead nowhere; ``log`` is told what else there is."""
    found = find_images([str(folder / name) for name in classes])
    notes = list(notes_on(found))
    suffixes = image_suffixes()
    stray = sum(not name.startswith(".") and name.lower().endswith(tuple(suffixes)) for name in os.listdir(folder))
    if stray:
        notes.append(f"{stray:,} {'image is' if stray == 1 else 'images are'} in no class folder, and not used")
    for note in notes:
        log(f"{folder}: {note}")
    return found.images, found.broken


def _list_as_first(folder: Path, classes: Sequence[str]) -> list[list[str]]:
    """The images of each class as they were listed by the first runs, which knew fewer kinds and no links."""
    skip = len(str(folder))
    files = make_dataset(
        folder,
        {name: index for index, name in enumerate(classes)},
        is_valid_file=lambda path: path.lower().endswith(IMG_EXTENSIONS) and f"{os.sep}." not in path[skip:],
        allow_empty=True,
    )
    images: list[list[str]] = [[] for _ in classes]
    for path, label in files:
        images[label].append(path)
    return images


def _describe_broken(links: Sequence[str]) -> str:
    if len(links) == 1:
        return broken_link(links[0])
    return f"{len(links)} links lead nowhere; the first: {broken_link(links[0])}"


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


def _split_again(
    root: Path, files: list[ImageFile], test_files: frozenset[str], log: Callable[[str], None]
) -> tuple[list[ImageFile], list[ImageFile]]:
    """The same test images as before, whatever has come to the folder or gone from it since."""
    train, test = list[ImageFile](), list[ImageFile]()
    for file in files:
        (test if name_in(root, file[0]) in test_files else train).append(file)
    if not test:
        raise UserError(
            f"{root}: none of the {len(test_files)} images that the run was tested on is there any more; put them "
            "back, or test other images by --data-dir"
        )
    if len(test) < len(test_files):
        log(f"{root}: {len(test_files) - len(test)} of the {len(test_files)} test images of the run are gone")
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
