"""Images with a mask each: folders laid out as Pascal VOC's, or ``images/`` beside ``masks/``.

torchvision's ``VOCSegmentation`` reads the challenge's own years. This reader takes any folder of that layout, and the
plain one, and says in one line what is wrong with a pair.
"""

import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.models.segmentation import FCN_ResNet50_Weights

from cmpe_se.data.image_files import find_images, notes_on
from cmpe_se.data.reading import read_image
from cmpe_se.data.splits import choose_splits, with_role
from cmpe_se.data.voc import lines_of, listed_names, voc_folders
from cmpe_se.errors import UserError
from cmpe_se.utils.files import whole_path
from cmpe_se.utils.progress import with_progress
from cmpe_se.utils.text import in_one_line

IGNORED = 255
"""Value of mask pixels that belong to no class: VOC's object borders."""
_EXACT = (".png", ".tif", ".tiff", ".bmp", ".gif")
"""Suffixes of masks. JPEG changes pixels, and with them classes."""
_HELD_OUT = 5  # one pair in so many is tested, where there are no parts
_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width
_ORIENTATION = 0x0112
_log = logging.getLogger(__name__)

Transform = Callable[[tv_tensors.Image, tv_tensors.Mask], tuple[Tensor, Tensor]]


class Pair(NamedTuple):
    """Paths of an image and of its mask."""

    image: Path
    mask: Path


class MaskedImages(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Images uint8 (3, H, W) with their masks int64 (H, W), of class indices and 255 for what is ignored.

    Both are tensors of torchvision's ``tv_tensors``, so ``transforms.v2`` moves and scales the two alike.

    Args:
        pairs: of files.
        classes: names of the classes, in the order of their indices.
        transform: of image and mask, for example from ``torchvision.transforms.v2``.
    """

    def __init__(self, pairs: Sequence[Pair], classes: Sequence[str], transform: Transform | None = None):
        self.pairs, self.classes, self.transform = list(pairs), tuple(classes), transform

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Read a pair.

        Raises:
            UserError: a file that cannot be read, a mask of another size than its image, an index of no class.
        """
        pair = self.pairs[index]
        pixels, labels = np.array(read_image(pair.image)), read_mask(pair.mask)
        _check_sizes(pair, pixels.shape[:2], labels.shape)
        _check_classes(pair, labels, len(self.classes))
        image = tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1))
        mask = tv_tensors.Mask(torch.from_numpy(labels.astype(np.int64)))
        return self.transform(image, mask) if self.transform else (image, mask)


class SegmentationData(NamedTuple):
    """What :func:`load_segmentation` finds."""

    classes: tuple[str, ...]
    train: MaskedImages
    test: MaskedImages


def load_segmentation(
    root: str | Path,
    *,
    train_split: str | None = None,
    test_split: str | None = None,
    transform: Transform | None = None,
    test_transform: Transform | None = None,
) -> SegmentationData:
    """Find the images and masks of a folder, and look at every mask once.

    The folder is laid out as one of these:

    - Pascal VOC: ``JPEGImages/``, ``SegmentationClass/`` and the lists ``ImageSets/Segmentation/*.txt`` of names;
      also as ``VOCdevkit/VOC2012/`` below it.
    - ``images/`` and ``masks/``, with a mask of the same name and place for every image. Folders of parts (train and
      val) lie inside the two or around them; without any, a fixed fifth of the images is tested.

    Masks are PNG, TIFF, BMP or GIF files of class indices (palette or grey), where 255 is ignored. The names of the
    classes stand in ``classes.txt``, one a line. Without it a folder such as ``VOC2012`` has VOC's 21, and others as
    many as the training masks show, named by their indices.

    Args:
        root: the folder.
        train_split, test_split: names of the parts; the usual ones if left out, of which val comes before test, since
            VOC's test has no masks.
        transform, test_transform: of the images and masks of each part.

    Raises:
        UserError: no such folder, no images, a missing mask or part, a mask that is none, of another size than its
            image, or with an index of no class.
    """
    root = whole_path(root)
    if not root.is_dir():
        raise UserError(f"{root} is no folder; give one with JPEGImages/ and SegmentationClass/, or images/ and masks/")
    voc = _voc_folder(root)
    train, test = (_voc_parts if voc else _plain_parts)(voc or root, train_split, test_split)
    names = _class_names(voc or root)
    most = len(names) if names else IGNORED
    largest = max(_check_pairs(train, most, f"masks of {root}, training"), 0)
    classes = names or tuple(map(str, range(largest + 1)))
    if len(classes) < 2:
        raise UserError(
            f"the masks of {root} hold no class but 0 (and 255, which is ignored); give objects the indices from 1 up"
        )
    _check_pairs(test, len(classes), f"masks of {root}, test")
    return SegmentationData(
        classes, MaskedImages(train, classes, transform), MaskedImages(test, classes, test_transform)
    )


def read_mask(path: str | os.PathLike) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """Class indices uint8 (H, W) of a mask file: a palette's indices as they are, never its colours.

    Raises:
        UserError: a file that is missing, no image, or has colours in the place of indices.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in ("P", "L", "1"):
                raise UserError(
                    f"the mask {path} has pixels of the kind {image.mode}; write class indices as 8-bit grey or palette"
                )
            return np.array(image).astype(np.uint8)
    except FileNotFoundError:
        raise UserError(f"there is no mask {path}; add it, or remove its image") from None
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders fail on corrupt files in many ways
        raise UserError(f"the mask {path} cannot be read ({in_one_line(error)}); replace it by a good one") from None


def _check_sizes(pair: Pair, image: Sequence[int], mask: Sequence[int]) -> None:
    if tuple(image) != tuple(mask):
        sizes = [f"{width}x{height}" for height, width in (image, mask)]
        raise UserError(f"the mask {pair.mask} has {sizes[1]} pixels, and its image {pair.image} {sizes[0]}")


def _check_classes(pair: Pair, labels: "np.ndarray[Any, np.dtype[np.uint8]]", classes: int) -> int:
    """The largest index of a class in a mask, -1 where all is ignored."""
    largest = int(labels[labels != IGNORED].max(initial=0)) if (labels != IGNORED).any() else -1
    if largest >= classes:
        raise UserError(
            f"the mask {pair.mask} holds class {largest}, and there are {classes} classes, 0 to {classes - 1} (and "
            f"{IGNORED} for what is ignored)"
        )
    return largest


def _check_pairs(pairs: Sequence[Pair], classes: int, description: str) -> int:
    """Look at every mask, and at the size of every image; the largest index of a class."""
    largest = -1
    for pair in with_progress(pairs, description):
        labels = read_mask(pair.mask)
        _check_sizes(pair, _size_of(pair.image), labels.shape)
        largest = max(largest, _check_classes(pair, labels, classes))
    return largest


def _size_of(path: Path) -> tuple[int, ...]:
    """Height and width as ``read_image`` turns an image, from its header alone."""
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(_ORIENTATION) in _TURNED
            return image.size if turned else image.size[::-1]
    except Exception:
        read_image(path)  # which says what is wrong
        raise


def _class_names(root: Path) -> tuple[str, ...] | None:
    file = root / "classes.txt"
    if file.is_file():
        names = tuple(lines_of(file, advice="write the names of the classes, one a line"))
        if not 2 <= len(names) <= IGNORED:
            raise UserError(
                f"{file} names {len(names)} classes; write 2 to {IGNORED}, one a line, the background first"
            )
        return names
    if re.fullmatch(r"VOC20\d\d", root.name):
        return tuple(FCN_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1.meta["categories"])
    return None


def _voc_folder(root: Path) -> Path | None:
    """The folder with JPEGImages: itself, or the only one below VOCdevkit; None where there is none."""
    if (root / "JPEGImages").is_dir():
        return root
    found = [folder for folder in voc_folders(root) if (folder / "JPEGImages").is_dir()]
    if len(found) > 1:
        raise UserError(f"{root} holds several years of VOC; give one of {', '.join(map(str, found))}")
    return found[0] if found else None


def _voc_parts(root: Path, train_split: str | None, test_split: str | None) -> tuple[list[Pair], list[Pair]]:
    lists = {path.stem: path for path in sorted((root / "ImageSets" / "Segmentation").glob("*.txt"))}
    if not lists:
        raise UserError(f"{root / 'ImageSets' / 'Segmentation'} has no lists of names such as train.txt and val.txt")
    train, test = _choose(str(root), list(lists), train_split, test_split)
    return _listed(root, lists[train]), _listed(root, lists[test])


def _choose(where: str, names: list[str], train_split: str | None, test_split: str | None) -> tuple[str, str]:
    """The parts to train on and to test: the named ones, or train and the first of val and test."""
    if test_split is None:
        test_split = next((name for name in with_role(names, "val", "test") if name != train_split), None)
    train, tests = choose_splits(where, names, train_split, test_split)
    return train, tests[0]


def _listed(root: Path, file: Path) -> list[Pair]:
    names = listed_names(file)
    images = _by_stem(root / "JPEGImages")
    masks = _by_stem(root / "SegmentationClass", only=_EXACT)
    if missing := [name for name in names if name not in images]:
        raise UserError(f"{file} names {missing[0]}, of which {root / 'JPEGImages'} has no image")
    return _paired(((name, images[name]) for name in names), masks, root / "SegmentationClass", str(file))


def _plain_parts(root: Path, train_split: str | None, test_split: str | None) -> tuple[list[Pair], list[Pair]]:
    images, masks = root / "images", root / "masks"
    inside = images.is_dir() and masks.is_dir()
    around = sorted(path.name for path in root.iterdir() if (path / "images").is_dir() and (path / "masks").is_dir())
    names = sorted(path.name for path in images.iterdir() if path.is_dir()) if inside else around
    if not inside and not around:
        raise UserError(
            f"{root} holds no images that can be found; expected JPEGImages/, SegmentationClass/ and "
            "ImageSets/Segmentation/, or images/ and masks/"
        )
    if not inside or with_role(names, "train") or train_split or test_split:
        parts = _choose(str(root), names, train_split, test_split)
        train, test = (
            _in_folders(images / part, masks / part) if inside else _in_folders(*_both(root / part)) for part in parts
        )
        return train, test
    pairs = _in_folders(images, masks)
    held = set(np.random.default_rng(0).permutation(len(pairs))[: max(1, len(pairs) // _HELD_OUT)].tolist())
    if len(pairs) < 2:
        raise UserError(f"{images} holds one image; give at least two, one for training and one for the test")
    return [pair for index, pair in enumerate(pairs) if index not in held], [pairs[index] for index in sorted(held)]


def _both(part: Path) -> tuple[Path, Path]:
    return part / "images", part / "masks"


def _in_folders(images: Path, masks: Path) -> list[Pair]:
    if not masks.is_dir():
        raise UserError(f"there is no folder {masks} for the masks of {images}")
    return _paired(_by_stem(images).items(), _by_stem(masks, only=_EXACT), masks, str(images))


def _by_stem(folder: Path, *, only: Sequence[str] = ()) -> dict[str, Path]:
    """Image files by their path in a folder without the suffix, in order.

    Raises:
        UserError: two files of one name, of which nobody knows which is meant.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    found = find_images([str(folder)])
    for note in notes_on(found):
        _log.warning(f"{folder}: {note}")
    files: dict[str, Path] = {}
    for path in map(Path, [*found.images[0], *found.broken]):
        if only and path.suffix.lower() not in only:
            continue
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in files:
            raise UserError(f"{files[name]} and {path} have one name; remove one of them")
        files[name] = path
    return files


def _paired(images: Iterable[tuple[str, Path]], masks: dict[str, Path], folder: Path, where: str) -> list[Pair]:
    named = list(images)
    if not named:
        raise UserError(f"{where} holds no images")
    missing = [name for name, _ in named if name not in masks]
    if missing:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{folder / missing[0]}.png is missing: {where} has an image without a mask{more}")
    return [Pair(path, masks[name]) for name, path in named]
