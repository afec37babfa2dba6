"""Names of the parts of a data set: which one is trained on, and which one is tested."""

import logging
from collections.abc import Collection, Sequence

from cmpe_se.data.imagenet import indices_of_network, places_by_imagenet
from cmpe_se.errors import UserError

_log = logging.getLogger(__name__)

_ROLES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("validation", "val", "valid"), "val"),
}


def role_of(name: str) -> str | None:
    """``train``, ``val`` or ``test`` for the usual names of such a part, in any case; None for other names."""
    return _ROLES.get(name.lower())


def with_role(names: Sequence[str], *roles: str) -> list[str]:
    """Those of ``names`` that are parts of these roles, in the order of ``roles`` and of the usual names."""
    usual = list(_ROLES)
    known = sorted((name for name in names if role_of(name)), key=lambda name: usual.index(name.lower()))
    return [name for role in roles for name in known if role_of(name) == role]


def choose_splits(
    name: str,
    splits: Sequence[str],
    train_split: str | None,
    test_split: str | None,
    *,
    hold_out: bool = False,
    slices: bool = False,
) -> tuple[str, list[str]]:
    """The split to train on, and those to test on, best first: the named ones, or those of the usual names.

    Args:
        name: of the data set, for messages.
        splits: that it has.
        train_split: to train on, by its name.
        test_split: to test on, by its name.
        hold_out: the data are only tested on. A split that is the only one is tested then, and there is none to train
            on: its name is empty.
        slices: named splits may be slices and sums of splits, as ``datasets`` has them: ``train[:80%]``.

    Raises UserError, with the choices, where a named split is not there or none has a usual name.
    """
    for flag, split in (("train", train_split), ("test", test_split)):
        parts = [] if split is None else split.split("+") if slices else [split]
        if unknown := [part for part in parts if (part.partition("[")[0] if slices else part) not in splits]:
            raise UserError(f"{name} has no {flag} split {unknown[0]}; choose one of {', '.join(splits)}")
    if train_split is not None and train_split == test_split and not hold_out:
        raise UserError(f"{name}: {test_split} cannot be both the train split and the test split; name two")
    tests = [test_split] if test_split else [one for one in with_role(splits, "test", "val") if one != train_split]
    if hold_out:
        if not tests and len(splits) == 1:
            tests = list(splits)
        if not tests:
            raise UserError(f"{name} has the splits {', '.join(splits)}; name the one to test by --test-split")
        return "", tests
    trains = [train_split] if train_split else with_role(splits, "train")[:1]
    if not trains or not tests:
        hint = " or slices of one, such as --train-split 'train[:80%]' --test-split 'train[80%:]'" if slices else ""
        raise UserError(
            f"{name} has the splits {', '.join(splits)}; expected train and one of test, validation, val, valid: name "
            f"others by --train-split and --test-split{hint}"
        )
    return trains[0], tests


def places_of(
    classes: Sequence[str],
    known: Sequence[str],
    where: str,
    used: Collection[int] | None = None,
    *,
    of_folders: bool = False,
) -> list[int]:
    """The index in ``known``, a network's classes, of each of ``classes``, which are those of the data ``where``.

    Where a name is none of the network's, all of them can be ImageNet's in other words (``data/imagenet.py``), and the
    log says so. Numbers are taken for ImageNet's class indices where they name folders (``of_folders``), or all 1,000
    classes: else they are what labels without names are called, of any data set. Only the classes of the indices
    ``used`` have images, where that is known: the others get -1.

    Raises UserError, which names them, for classes that the network does not have.
    """
    if not of_folders and len(classes) != len(known) and _are_numbers(classes) and indices_of_network(known):
        raise UserError(
            f"{where} has {len(classes)} classes without names, numbered from 0, and the network has ImageNet's "
            f"{len(known)}: which of them these are cannot be told (ImageNet-A and -R number 200 of their own); give "
            "the data's class names, such as synsets"
        )
    indices = {name: index for index, name in enumerate(known)}
    needed = [index for index in range(len(classes)) if used is None or index in used]
    unknown = [classes[index] for index in needed if classes[index] not in indices]
    if not unknown:
        return [indices.get(name, -1) for name in classes]
    if found := places_by_imagenet([classes[index] for index in needed], known):
        _log.warning(f"{where}: its classes are read as ImageNet's {found[1]}")
        places = dict(zip(needed, found[0], strict=True))
        return [places.get(index, -1) for index in range(len(classes))]
    named, others = ", ".join(unknown[:5]), len(unknown) - 5
    more = f" and {others} more" if others > 0 else ""
    own = ", ".join(known[:5]) + (", ..." if len(known) > 5 else "")
    numbers = all(name.isascii() and name.isdigit() for name in unknown)
    hint = " (numbers stand for class indices, 0 to 999, only for a network of ImageNet's 1,000 classes)" * numbers
    raise UserError(
        f"{where} has images of {named}{more}, and the network was trained on {len(known)} other classes ({own}); "
        f"leave those out, or give the classes the same names: test on the same classes{hint}"
    )


def _are_numbers(classes: Sequence[str]) -> bool:
    return tuple(classes) == tuple(map(str, range(len(classes))))
