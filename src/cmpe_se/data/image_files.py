"""Which files are images, and which of them lie in a folder: the same for training, tests and predictions."""

import os
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache
from typing import NamedTuple

from PIL import Image

from cmpe_se.errors import UserError

# Formats that Pillow recognises and does not decode by itself: documents, video, and containers of other programs.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
_PLUGINS = {  # suffix to the package that lets Pillow read it
    **dict.fromkeys((".heic", ".heif", ".hif"), "pillow-heif"),
    ".jxl": "pillow-jxl-plugin",
}
# What Synology, Windows and Unix put into folders of images; other systems' names begin with a dot.
_SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"}


@cache
def register_plugins() -> None:
    """Let Pillow read what installed plug-ins read; other formats come with Pillow, or the caller registers them."""
    Image.init()
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    with suppress(ImportError):
        import pillow_jxl  # noqa: F401  # importing it registers it


def image_suffixes() -> frozenset[str]:
    """Suffixes in lower case, with their dot, of the files that Pillow can read as images."""
    register_plugins()
    readable = Image.OPEN.keys() - _NOT_DECODED | {"MPO"}  # MPO is opened as the JPEG that it begins with
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in readable)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is the system's and no one's image, as AppleDouble's ``._x.jpg``."""
    return name.startswith(".") or name in _SYSTEM_FOLDERS


class FoundImages(NamedTuple):
    """The image files of some folders."""

    images: list[list[str]]
    """Paths for each of the folders, ordered by the folder that they lie in and their name."""
    passed_over: Counter[str]
    """Suffixes of the files that are no images here, with their number."""
    repeated: int
    """Number of links and hard links that lead to what is counted already."""
    broken: list[str]
    """Links with the name of an image, or of a folder, that lead nowhere."""


def find_images(folders: Sequence[str]) -> FoundImages:
    """The image files in ``folders`` and all folders below them, links followed.

    One real file counts once: at its own place, or else in the one of ``folders`` that is a link to it, or else at the
    first link. A link to a folder that it lies in is a loop and is not followed. Hidden files and folders are passed
    over, and so is all that is no regular file.

    Raises UserError for a folder that cannot be read.
    """
    search = _Search(len(folders))
    for index, folder in enumerate(map(os.fspath, folders)):
        (search.links if os.path.islink(folder) else search.folders).append((index, folder, os.path.realpath(folder)))
    while search.folders or search.links:
        if search.folders:
            search.enter(*search.folders.popleft())
        else:
            search.follow(*search.links.popleft())
    images = [[path for _, path in sorted(found)] for found in search.images]
    return FoundImages(images, search.passed_over, search.repeated, sorted(search.broken))


class _Search:
    """Folders and links yet to be looked into, each as (index, path, real path), and what has been found so far."""

    def __init__(self, count: int):
        self.images: list[list[tuple[str, str]]] = [[] for _ in range(count)]  # (folder, path)
        self.passed_over, self.repeated, self.broken = Counter[str](), 0, list[str]()
        self.folders, self.links = deque[tuple[int, str, str]](), deque[tuple[int, str, str]]()
        self._suffixes, self._seen = image_suffixes(), set[object]()

    def enter(self, index: int, folder: str, real: str) -> None:
        if self._is_repeated(real):
            return
        for entry in _entries(folder):
            inside = f"{real}{os.sep}{entry.name}"
            if entry.is_symlink():
                target = os.path.realpath(inside)
                if f"{real}{os.sep}".startswith(f"{target.rstrip(os.sep)}{os.sep}"):
                    self.repeated += 1  # a loop
                else:
                    self.links.append((index, entry.path, target))
            elif entry.is_dir():
                self.folders.append((index, entry.path, inside))
            elif entry.is_file():
                self._take(index, folder, entry.path, inside)

    def follow(self, index: int, link: str, real: str) -> None:
        if os.path.isdir(real):
            self.folders.append((index, link, real))
        elif os.path.isfile(real):
            self._take(index, os.path.dirname(link), link, real)
        elif not os.path.exists(real) and _suffix(link) in (*self._suffixes, ""):
            self.broken.append(link)

    def _take(self, index: int, folder: str, path: str, real: str) -> None:
        if (suffix := _suffix(path)) not in self._suffixes:
            self.passed_over[suffix] += 1
            return
        status = os.stat(path)
        # Some file systems give the same number to several files; they do not say of these that they have two names.
        identity = (status.st_dev, status.st_ino) if status.st_nlink > 1 and status.st_ino else real
        if not self._is_repeated(identity):
            self.images[index].append((folder, path))

    def _is_repeated(self, identity: object) -> bool:
        repeated = identity in self._seen
        self.repeated += repeated
        self._seen.add(identity)
        return repeated


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not is_hidden(entry.name)]
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be read ({error.strerror}); change its permissions") from None


def describe_passed_over(counts: Counter[str]) -> str:
    """A sentence without an end: how many files are no images, and of what kinds, with what would read them."""
    kinds = [
        f"{count:,} {suffix}" + (f" (pip install {_PLUGINS[suffix]})" if suffix in _PLUGINS else "")
        if suffix
        else f"{count:,} without a suffix"
        for suffix, count in counts.most_common(10)
    ]
    others = len(counts) - len(kinds)
    listed = ", ".join(kinds) + (f" and {others} other kinds" if others else "")
    total = counts.total()
    return f"{total:,} {'file is no image' if total == 1 else 'files are no images'} that can be read here: {listed}"


def broken_link(path: str) -> str:
    """A sentence on a link that leads nowhere."""
    return f"{path} is a link to {os.readlink(path)}, which is not there; restore it or remove the link"


def notes_on(found: FoundImages) -> Iterable[str]:
    """What a user should know of how a folder's images were found, each a sentence without an end."""
    if found.passed_over:
        yield describe_passed_over(found.passed_over)
    if found.repeated:
        links = "link leads" if found.repeated == 1 else "links lead"
        yield f"{found.repeated:,} {links} to images that are counted already, and each counts once"
