"""Images that are in the training part and in the test part: files of the same bytes."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_MOST_FILES = 100_000
"""Files to open at most: seconds from a fast disk, and less than an epoch reads in any case."""
_HEAD = 4096  # bytes that tell almost all different images of one size apart


class Copies(NamedTuple):
    """Test images that are training images too."""

    number: int
    looked_at: int
    """Test images that were looked for; all of them but in a large data set, where they are spread evenly."""
    example: tuple[str, str] | None
    """The first such test image, and a training image of the same bytes."""


def find_copies(train: Sequence[str], test: Sequence[str]) -> Copies:
    """Test files that have the bytes of a training file, whatever their names.

    Only files of equal size are opened, and read as a whole only where they begin alike. Where that are more than
    100,000 files, a part of the test files is looked for. Files that cannot be read are copies of none.
    """
    sizes = [_size(path) for path in test]
    wanted = {size for size in sizes if size}
    by_size = defaultdict[int, list[str]](list)
    for path in train:
        if (size := _size(path)) in wanted:
            by_size[size].append(path)
    stride = 1
    while (chosen := range(0, len(test), stride)) and _files_to_open(sizes, by_size, chosen) > _MOST_FILES:
        if len(chosen) == 1:
            return Copies(0, 0, None)
        stride *= 2
    digests = _Digests()
    by_head = defaultdict[tuple[int, bytes], list[str]](list)
    for size in {sizes[index] for index in chosen}:
        for path in by_size.get(size, ()):
            by_head[size, digests.of_head(path)].append(path)
    count, example = 0, None
    for index in chosen:
        path = test[index]
        if sizes[index] not in by_size:
            continue
        candidates = by_head.get((sizes[index], digests.of_head(path)), ())
        same = next((other for other in candidates if digests.are_same(path, other)), None)
        if same is not None:
            count, example = count + 1, example or (path, same)
    return Copies(count, len(chosen), example)


def _size(path: str) -> int:
    """0 where there is nothing to compare."""
    with suppress(OSError):
        return os.stat(path).st_size
    return 0


def _files_to_open(sizes: Sequence[int], by_size: dict[int, list[str]], chosen: range) -> int:
    some = [sizes[index] for index in chosen if sizes[index] in by_size]
    return len(some) + sum(len(by_size[size]) for size in set(some))


class _Digests:
    """Digests of files, each read once; a file that cannot be read is like no other."""

    def __init__(self) -> None:
        self._whole: dict[str, bytes] = {}

    def of_head(self, path: str) -> bytes:
        try:
            with open(path, "rb", buffering=0) as file:
                return hashlib.blake2b(file.read(_HEAD), digest_size=16).digest()
        except OSError:
            return path.encode(errors="surrogateescape")

    def are_same(self, path: str, other: str) -> bool:
        return self._of_whole(path) == self._of_whole(other)

    def _of_whole(self, path: str) -> bytes:
        if path not in self._whole:
            try:
                self._whole[path] = hashlib.sha256(Path(path).read_bytes()).digest()
            except OSError:
                self._whole[path] = path.encode(errors="surrogateescape")
        return self._whole[path]
