"""What the folders below a folder are: parts of a data set, such as train and test, or classes."""

import os
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from cmpe_se.data.splits import role_of, with_role
from cmpe_se.errors import UserError

_WORDS = {("test", "val"): "test|val|validation", ("val",): "val|validation"}
Subfolders = Callable[[Path], list[str]]


class Parts(NamedTuple):
    """Folders of a data set: what is trained on, what is tested, and the others."""

    train: str
    test: str
    left_out: list[str]


def choose_parts(
    root: Path,
    names: Sequence[str],
    test_roles: Sequence[str],
    train_split: str | None,
    test_split: str | None,
    subfolders: Subfolders,
) -> Parts | None:
    """The training and the test part among ``names``, the folders of ``root``; None where those are classes.

    A folder that is named like a part is one if a second one is, if it holds folders, or if there are no others.
    Raises UserError where a part is missing, or where several folders could be it.
    """
    layout = f"{root}/train/<class>/ and {root}/{{{_WORDS[tuple(test_roles)]}}}/<class>/"
    for flag, split in (("train", train_split), ("test", test_split)):
        if split is not None and split not in names:
            raise UserError(f"{root} has no folder {split} as the {flag} split; choose one of {', '.join(names)}")
    if not names:
        raise UserError(f"{root} holds no class folders: expected {layout}, or {root}/<class>/")
    trains = [train_split] if train_split else with_role(names, "train")
    tests = [test_split] if test_split else with_role(names, *test_roles)
    named = train_split is not None or test_split is not None
    if not named and not _are_parts(root, names, trains, tests, subfolders):
        return None
    if not trains:
        raise UserError(f"{root} has a folder {(tests or names)[0]} but no folder train: expected {layout}")
    train = _only_one(root, trains, "train", subfolders)
    tests = [name for name in tests if name != train]
    if not tests:
        raise UserError(
            f"{root} has a folder {train} but no folder for the test: expected {layout}; of class folders alone, such "
            f"as those in {root / train}, a fifth of each class is tested"
        )
    test = _best(root, tests, set(subfolders(root / train)), test_roles, subfolders)
    left_out = [
        name if subfolders(root / name) else f"{name} (no class folders in it)"
        for name in names
        if name not in (train, test)
    ]
    return Parts(train, test, left_out)


def part_to_test(
    root: Path,
    names: Sequence[str],
    test_roles: Sequence[str],
    test_split: str | None,
    known: Collection[str],
    subfolders: Subfolders,
) -> str | None:
    """The part to test among ``names``, where nothing is trained on; None where they are classes.

    ``known`` are the classes of the network: a folder of such a name is a class.
    """
    if test_split is not None:
        if test_split not in names:
            raise UserError(f"{root} has no folder {test_split}; choose one of {', '.join(names)}")
        return test_split
    names = [name for name in names if name not in known]
    trains, tests = with_role(names, "train"), with_role(names, *test_roles)
    if not names or not _are_parts(root, names, trains, tests, subfolders):
        return None
    if not tests:
        raise UserError(
            f"{root} has a folder {(trains or names)[0]} but no folder for the test; name one by "
            "--test-split, or give the folder that holds the class folders"
        )
    return _best(root, tests, set(known), test_roles, subfolders)


def refuse_likely_parts(root: Path, classes: Sequence[str], images: Sequence[list[str]]) -> None:
    """Raise UserError where the class folders look like parts of a data set with other names than usual.

    They do where most of them hold images in folders of the same names, at least two of those. Folders inside a class
    that are named like parts are refused too.
    """
    inside = [
        {os.path.relpath(folder, root / name) for folder in set(map(os.path.dirname, paths))} - {"."}
        for name, paths in zip(classes, images, strict=True)
    ]
    split = [name for name, folders in zip(classes, inside, strict=True) if any(map(role_of, folders))]
    if len(split) > max(1, len(classes) / 2):
        raise UserError(
            f"{root}: the classes {_few(split)} are split inside their folders; the folders of the splits have to be "
            f"outside: expected {root}/train/<class>/ and {root}/test/<class>/"
        )
    for name, folders in zip(classes, inside, strict=True):
        first = sorted({folder.split(os.sep)[0] for folder in folders})
        if any(role_of(part) == "train" for part in first) and len(first) > 1 and all(map(role_of, first)):
            raise UserError(
                f"{root}: the folder {name} holds {', '.join(first)}, so it looks like a data set of its own "
                f"and not like a class; give {root / name} as data_dir"
            )
    counts = Counter(folder for folders in inside for folder in folders)
    shared = sorted(folder for folder, count in counts.items() if count > max(1, len(classes) / 2))
    if len(shared) < 2:
        return
    parts = [name for name, folders in zip(classes, inside, strict=True) if folders & set(shared)]
    raise UserError(
        f"{root}: {len(parts)} folders hold folders of the same names, {_few(shared)}, so they look like splits "
        f"named {' and '.join(parts[:5])} and not like classes; name them by --train-split {parts[0]} --test-split "
        f"{parts[1]}, or put the images of each class directly into its folder"
    )


def _are_parts(
    root: Path, names: Sequence[str], trains: Sequence[str], tests: Sequence[str], subfolders: Subfolders
) -> bool:
    candidates = [name for name in names if role_of(name)]
    return bool(candidates) and (
        bool(trains and tests) or len(names) == len(candidates) or any(subfolders(root / name) for name in candidates)
    )


def _only_one(root: Path, names: list[str], role: str, subfolders: Subfolders) -> str:
    """The one of ``names`` that holds folders, or else the first."""
    full = [name for name in names if subfolders(root / name)]
    if len(full) > 1:
        raise UserError(
            f"{root} has several folders for one part, {' and '.join(full)}; name the one to take by --{role}-split"
        )
    return (full or names)[0]


def _best(
    root: Path, names: Sequence[str], classes: set[str], test_roles: Sequence[str], subfolders: Subfolders
) -> str:
    """The first part that holds some of ``classes``, or else any folder, or else the first of all."""
    for is_good in (lambda name: classes & set(subfolders(root / name)), lambda name: subfolders(root / name)):
        for role in test_roles:
            if good := [name for name in names if role_of(name) in (role, None) and is_good(name)]:
                return _only_one(root, good, "test", subfolders)
    return names[0]


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
