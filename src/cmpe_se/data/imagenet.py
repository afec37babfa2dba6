"""What the classes of ImageNet are called: synsets, class indices and words, by timm's lists."""

import re
from collections import Counter
from collections.abc import Collection, Sequence
from functools import cache
from importlib.resources import files

from timm.data import ImageNetInfo

SYNSETS, INDICES, WORDS = "synsets", "class indices", "words"
"""Kinds of names."""
_CLASSES = 1000
_SUBSETS = {"ImageNet-A": "imagenet_a_synsets.txt", "ImageNet-R": "imagenet_r_synsets.txt"}


def imagenet_indices(names: Sequence[str]) -> tuple[list[int], str] | None:
    """ImageNet's class index of each name, and what the names are; None for other names, or some of each kind.

    Args:
        names: all of them synsets (``n01440764``), class indices (``0``, ``000``) or WordNet's words (``tench, Tinca
            tinca``). Words of two classes, such as ``crane``, count where ``names`` are the words of all classes in
            the order of their indices.

    Returns:
        Indices from 0 to 999, no one twice, and which of SYNSETS, INDICES and WORDS the names are.
    """
    kind = _kind(names)
    if kind == SYNSETS:
        found = [_synsets().get(name, -1) for name in names]
    elif kind == INDICES:
        found = [int(name) for name in names]
    elif tuple(names) == _words():
        found = list(range(_CLASSES))
    else:
        counts = Counter(_words())
        places = {name: index for index, name in enumerate(_words()) if counts[name] == 1}
        found = [places.get(name, -1) for name in names]
    if not names or len(set(found)) < len(found) or min(found) < 0 or max(found) >= _CLASSES:
        return None
    return found, kind


def indices_of_network(classes: Sequence[str]) -> list[int] | None:
    """ImageNet's class index of each of a network's classes; None where they are not all 1,000, in any order."""
    if len(classes) != _CLASSES or (found := imagenet_indices(classes)) is None:
        return None
    return found[0]


def places_by_imagenet(names: Sequence[str], known: Sequence[str]) -> tuple[list[int], str] | None:
    """The index in ``known``, a network's classes, of each of ``names`` by the class of ImageNet that it stands for.

    Numbers are class indices for a network of all 1,000 classes alone. They are read as numbers: sorted as text they
    would be 0, 1, 10, 100.

    Returns:
        Indices and what ``names`` are; None where that is not clear, or where a class is not among ``known``.
    """
    if _kind(known) == INDICES and len(known) != _CLASSES:
        return None
    own, others = imagenet_indices(known), imagenet_indices(names)
    if own is None or others is None:
        return None
    if others[1] == INDICES and len(known) != _CLASSES:
        return None
    places = {index: place for place, index in enumerate(own[0])}
    if any(index not in places for index in others[0]):
        return None
    return [places[index] for index in others[0]], others[1]


def descriptions(classes: Sequence[str]) -> tuple[str, ...] | None:
    """Words for classes that are synsets of ImageNet; None for others: numbers can be any data set's classes."""
    if _kind(classes) != SYNSETS or (found := imagenet_indices(classes)) is None:
        return None
    return tuple(_words()[index] for index in found[0])


def subset_of(classes: Collection[str], known: Sequence[str]) -> str | None:
    """``ImageNet-A`` or ``ImageNet-R`` where ``classes``, some of those of a network of ImageNet, are its 200."""
    indices = indices_of_network(known)
    if indices is None:
        return None
    names = list(_synsets())
    present = {names[index] for index, name in zip(indices, known, strict=True) if name in classes}
    return next((subset for subset, file in _SUBSETS.items() if present == set(_lines(file))), None)


def _kind(names: Sequence[str]) -> str:
    if all(re.fullmatch(r"n\d{8}", name) for name in names):
        return SYNSETS
    return INDICES if all(name.isascii() and name.isdigit() for name in names) else WORDS


@cache
def _info() -> ImageNetInfo:
    return ImageNetInfo()


@cache
def _synsets() -> dict[str, int]:
    return {name: index for index, name in enumerate(_info().label_names())}


@cache
def _words() -> tuple[str, ...]:
    return tuple(_info().label_descriptions())


def _lines(file: str) -> list[str]:
    return (files("timm.data") / "_info" / file).read_text(encoding="utf-8").split()
