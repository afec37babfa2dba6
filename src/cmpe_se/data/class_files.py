"""The image files of class folders, and what a run keeps of them."""

from pathlib import Path
from typing import NamedTuple

ImageFile = tuple[str, int]
"""A path and the index of its class."""


class Listing(NamedTuple):
    """What a run has kept of how its images were listed, so that later commands list the same ones."""

    version: int = 2
    """2 for images as ``find_images`` finds them, 1 as torchvision lists them, for runs of that time."""
    test_files: frozenset[str] | None = None
    """Of class folders without a test part: the test images, by their paths in the folder, with slashes."""


class ClassFolders(NamedTuple):
    """The image files of a folder, in a fixed order."""

    root: Path
    classes: tuple[str, ...]
    train: list[ImageFile]
    test: list[ImageFile]
    tested: str
    """Which images the test part is, in words."""
    drawn: bool
    """Whether the test part was drawn from the classes, and is no folder of its own."""
    broken: list[str]
    """Links in the test part that lead nowhere; there are none elsewhere."""

    def test_names(self) -> list[str]:
        """The test images as a ``Listing`` has them."""
        return [name_in(self.root, path) for path, _ in self.test]


def name_in(root: Path, path: str) -> str:
    """A path in ``root`` as a ``Listing`` has it."""
    return Path(path).relative_to(root).as_posix()
