"""Annotations in COCO's format: one JSON file for many images."""

from collections import Counter
from pathlib import Path
from typing import TypedDict

from cmpe_se.data.detection.images import Annotations, Box, DetectionImages
from cmpe_se.errors import UserError
from cmpe_se.utils.records import read_json


class _Image(TypedDict):
    id: int
    file_name: str
    width: int
    height: int


class _Category(TypedDict):
    id: int
    name: str


class _Crowd(TypedDict, total=False):
    iscrowd: int


class _Annotation(_Crowd):
    id: int
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]


class _Instances(TypedDict):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


def read_coco(annotations: str | Path, images: str | Path, *, skip_invalid: bool = False) -> DetectionImages:
    """Images and boxes of a JSON file in COCO's format.

    Classes are in the order of the file's category numbers. Crowds (``iscrowd``) are left out, as torchvision's
    training scripts leave them out.

    Args:
        annotations: the JSON file, such as ``annotations/instances_val2017.json``.
        images: folder that its ``file_name`` start from, such as ``val2017``.
        skip_invalid: leave out boxes that are empty or outside their image.

    Raises:
        UserError: a file that is no such JSON, a number that stands for no image or category, and what
            :class:`DetectionImages` refuses.
    """
    source = Path(annotations)
    content: _Instances = read_json(source, _Instances, advice="give annotations in COCO's format")
    names = {each["id"]: each["name"] for each in sorted(content["categories"], key=lambda each: each["id"])}
    if len(set(names.values())) != len(content["categories"]):
        raise UserError(f"{source} has a category twice; give each one number and one name")
    boxes: dict[int, list[Box]] = {each["id"]: [] for each in content["images"]}
    if len(boxes) != len(content["images"]):
        raise UserError(f"{source} has an image's number twice; give each its own")
    left_out = Counter[str]()
    for each in content["annotations"]:
        where = f"annotation {each['id']}"
        if each["image_id"] not in boxes:
            raise UserError(f"{source}: {where} is of image {each['image_id']}, which is not among its images")
        if each["category_id"] not in names:
            raise UserError(
                f"{source}: {where} is of category {each['category_id']}, which is not among its categories"
            )
        if each.get("iscrowd"):
            left_out["crowds"] += 1
            continue
        left, top, width, height = each["bbox"]
        box = Box(where, names[each["category_id"]], (left, top, left + width, top + height))
        boxes[each["image_id"]].append(box)
    found = [
        Annotations(Path(images, each["file_name"]), (each["width"], each["height"]), boxes[each["id"]])
        for each in content["images"]
    ]
    return DetectionImages(source, found, list(names.values()), left_out, skip_invalid=skip_invalid)
