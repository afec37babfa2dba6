"""Images with boxes, in the form that torchvision's detectors take."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cmpe_se.data.reading import read_image
from cmpe_se.errors import UserError
from cmpe_se.utils.text import counted

_TOLERANCE = 1.0  # pixels by which boxes may leave their image, since annotations are rounded


class Box(NamedTuple):
    """An annotated object."""

    where: str
    """What an error calls it, such as ``annotation 17``."""
    name: str
    """Of its class."""
    corners: tuple[float, float, float, float]
    """Left, top, right and bottom in pixels, from the upper left corner of the image's first pixel."""


class Annotations(NamedTuple):
    """The annotations of one image."""

    image: Path
    size: tuple[int, int]
    """Width and height in pixels."""
    boxes: list[Box]


class DetectionImages(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Images of one part of a data set; each is read when it is asked for.

    An item is an image, float32 (3, H, W) in [0, 1], and its target: ``boxes`` float32 (K, 4) as left, top, right and
    bottom in pixels, and ``labels`` int64 (K,) from 1, since 0 is torchvision's background. K may be 0.

    Args:
        source: file or folder of the annotations, for messages.
        images: in the order of the items.
        classes: names; the label of a class is its position and 1.
        left_out: kinds of objects that are not among the boxes, with their number.
        skip_invalid: leave boxes out that are empty or outside their image, instead of an error.

    Raises:
        UserError: a missing image, an unknown class, a box that is empty or outside its image.
    """

    def __init__(
        self,
        source: Path,
        images: Sequence[Annotations],
        classes: Sequence[str],
        left_out: Counter[str] | None = None,
        *,
        skip_invalid: bool = False,
    ):
        self.source, self.classes, self.left_out = source, tuple(classes), Counter(left_out or {})
        labels = {name: number for number, name in enumerate(self.classes, start=1)}
        _refuse_missing(source, [each.image for each in images])
        self.images: list[tuple[Path, tuple[int, int]]] = []
        self.targets: list[tuple[list[list[float]], list[int]]] = []
        for each in images:
            boxes, numbers = [], []
            for box in each.boxes:
                if box.name not in labels:
                    raise UserError(
                        f"{source}: {box.where} is of the class {box.name!r}; known are {', '.join(self.classes)}"
                    )
                if (fault := _fault(box, each.size)) is None:
                    boxes.append(_inside(box, each.size))
                    numbers.append(labels[box.name])
                elif skip_invalid:
                    self.left_out["invalid"] += 1
                else:
                    raise UserError(
                        f"{source}: {box.where} on {each.image.name} {fault}; correct it, or leave such boxes out "
                        "(skip_invalid)"
                    )
            self.images.append((each.image, each.size))
            self.targets.append((boxes, numbers))
        if not self.images:
            raise UserError(f"{source} has no images; give annotations of at least one")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        path, size = self.images[index]
        image = read_image(path)
        if image.size != size:
            raise UserError(
                f"{path} has {image.width}x{image.height} pixels, and its boxes are for {size[0]}x{size[1]}; "
                f"give the image that {self.source} describes"
            )
        boxes, labels = self.targets[index]
        target = {
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor(labels, dtype=torch.int64),
        }
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255, target

    def __str__(self) -> str:
        boxes = sum(len(labels) for _, labels in self.targets)
        text = f"{self.source}: {counted(len(self), 'image')}, {boxes:,} boxes of {len(self.classes)} classes"
        left_out = ", ".join(f"{count:,} {kind}" for kind, count in self.left_out.items())
        return f"{text} (left out: {left_out})" if left_out else text


def _refuse_missing(source: Path, images: Iterable[Path]) -> None:
    there: dict[Path, set[str]] = {}  # a folder is listed once: thousands of look-ups are slow on network drives
    for image in images:
        if image.parent not in there:
            folder = image.parent
            there[folder] = {each.name for each in folder.iterdir()} if folder.is_dir() else set()
        if image.name not in there[image.parent]:
            raise UserError(f"{source} names the image {image}, which is not there; restore it or take it out")


def _fault(box: Box, size: tuple[int, int]) -> str | None:
    left, top, right, bottom = box.corners
    shown = f"from ({left:g}, {top:g}) to ({right:g}, {bottom:g})"
    if not all(map(math.isfinite, box.corners)) or right <= left or bottom <= top:
        return f"has an empty box, {shown}"
    if min(left, top) < -_TOLERANCE or right > size[0] + _TOLERANCE or bottom > size[1] + _TOLERANCE:
        return f"has a box {shown}, outside the image of {size[0]}x{size[1]} pixels"
    inside = _inside(box, size)
    return f"has an empty box, {shown}" if inside[2] <= inside[0] or inside[3] <= inside[1] else None


def _inside(box: Box, size: tuple[int, int]) -> list[float]:
    left, top, right, bottom = box.corners
    return [max(left, 0.0), max(top, 0.0), min(right, float(size[0])), min(bottom, float(size[1]))]
