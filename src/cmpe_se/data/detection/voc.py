"""Annotations in Pascal VOC's format: one XML file for each image."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from cmpe_se.data.detection.images import Annotations, Box, DetectionImages
from cmpe_se.data.voc import listed_names
from cmpe_se.errors import UserError

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
"""The classes of Pascal VOC, in its order."""


def read_voc(
    folder: str | Path, part: str, *, classes: Sequence[str] = VOC_CLASSES, skip_invalid: bool = False
) -> DetectionImages:
    """Images and boxes of a folder in Pascal VOC's format: ``Annotations``, ``ImageSets/Main`` and ``JPEGImages``.

    Objects marked as difficult are left out, since VOC's test does not count them.

    Args:
        folder: such as ``VOCdevkit/VOC2012``.
        part: file in ``ImageSets/Main`` that lists the images, without its suffix, such as ``train`` or ``val``.
        classes: names, in the order of their labels.
        skip_invalid: leave out boxes that are empty or outside their image.

    Raises:
        UserError: a list or an XML file that is missing or damaged, and what :class:`DetectionImages` refuses.
    """
    folder = Path(folder)
    listed = folder / "ImageSets" / "Main" / f"{part}.txt"
    left_out = Counter[str]()
    images = [_read_annotations(folder, name, left_out) for name in listed_names(listed)]
    return DetectionImages(listed, images, classes, left_out, skip_invalid=skip_invalid)


def class_names(folder: str | Path) -> tuple[str, ...]:
    """Names of the objects in all XML files of a folder in VOC's format: VOC's own in their order, others sorted."""
    found = {
        str(each.findtext("name")).strip()
        for file in sorted(Path(folder, "Annotations").glob("*.xml"))
        for each in _parse(file).iter("object")
    }
    return VOC_CLASSES if found <= set(VOC_CLASSES) else tuple(sorted(found))


def _parse(file: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(file).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise UserError(f"{file} cannot be read ({error}); give an annotation in Pascal VOC's format") from None


def _read_annotations(folder: Path, name: str, left_out: Counter[str]) -> Annotations:
    file = folder / "Annotations" / f"{name}.xml"
    root = _parse(file)
    boxes = []
    for number, each in enumerate(root.iter("object"), start=1):
        if (each.findtext("difficult") or "0").strip() == "1":
            left_out["difficult"] += 1
            continue
        left, top, right, bottom = (_number(file, each, f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax"))
        where = f"object {number} of {file.name}"
        boxes.append(
            Box(where, (each.findtext("name") or "").strip(), (left - 1, top - 1, right, bottom))
        )  # VOC: from 1
    size = int(_number(file, root, "size/width")), int(_number(file, root, "size/height"))
    image = (root.findtext("filename") or f"{name}.jpg").strip()
    return Annotations(folder / "JPEGImages" / image, size, boxes)


def _number(file: Path, element: ElementTree.Element, path: str) -> float:
    text = element.findtext(path)
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        what = f"is {text.strip()!r}" if text else "is missing"
        raise UserError(f"{file}: {path} {what}, should be a number of pixels")
    return value
