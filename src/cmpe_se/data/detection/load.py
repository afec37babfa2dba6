"""The training and test images of a folder, whichever of the usual formats it has."""

from pathlib import Path
from typing import NamedTuple

from cmpe_se.data.detection.coco import read_coco
from cmpe_se.data.detection.images import DetectionImages
from cmpe_se.data.detection.voc import class_names, read_voc
from cmpe_se.data.voc import voc_folders
from cmpe_se.errors import UserError


class DetectionData(NamedTuple):
    """A data set of images with boxes."""

    classes: tuple[str, ...]
    train: DetectionImages
    test: DetectionImages


def load_detection(data_dir: str | Path, *, skip_invalid: bool = False) -> DetectionData:
    """Training and test images of a folder in COCO's or Pascal VOC's format.

    - COCO: ``annotations/instances_train*.json`` and ``instances_val*.json`` (or ``test``), with the images in
      ``train*`` and ``val*``, or ``PART/_annotations.coco.json`` beside its images, for the parts ``train`` and
      ``valid``, ``val`` or ``test``;
    - VOC: ``Annotations``, ``JPEGImages`` and ``ImageSets/Main`` with ``train.txt`` or ``trainval.txt``, and with
      ``val.txt`` or ``test.txt``; in the folder, or in ``VOCdevkit/VOC*`` or ``VOC*`` in it.

    Args:
        data_dir: the folder.
        skip_invalid: leave out boxes that are empty or outside their image, instead of an error.

    Raises:
        UserError: neither of both, parts with different classes, and what the readers refuse.
    """
    folder = Path(data_dir)
    if not folder.is_dir():
        raise UserError(f"data_dir {folder} is not a folder; give one in COCO's or Pascal VOC's format")
    train, test = (_coco_part(folder, names) for names in (("train",), ("val", "valid", "test")))
    if train and test:
        parts = tuple(read_coco(*part, skip_invalid=skip_invalid) for part in (train, test))
        if parts[0].classes != parts[1].classes:
            raise UserError(f"{train[0]} and {test[0]} have different categories; give both the same")
        return DetectionData(parts[0].classes, *parts)
    for voc in voc_folders(folder):
        lists = voc / "ImageSets" / "Main"
        chosen = [
            next((name for name in names if (lists / f"{name}.txt").is_file()), None)
            for names in (("train", "trainval"), ("val", "test"))
        ]
        if chosen[0] and chosen[1]:
            classes = class_names(voc)
            read = [read_voc(voc, part, classes=classes, skip_invalid=skip_invalid) for part in chosen if part]
            return DetectionData(classes, *read)
    raise UserError(
        f"{folder} has neither annotations/instances_train*.json and instances_val*.json (COCO), nor ImageSets/Main "
        "with train.txt and val.txt (Pascal VOC)"
    )


def _coco_part(folder: Path, names: tuple[str, ...]) -> tuple[Path, Path] | None:
    """The JSON file of a part, and the folder of its images."""
    for name in names:
        if (file := folder / name / "_annotations.coco.json").is_file():
            return file, file.parent
        for file in sorted((folder / "annotations").glob(f"instances_{name}*.json")):
            part = file.stem.removeprefix("instances_")
            return file, next((each for each in (folder / part, folder / "images" / part) if each.is_dir()), folder)
    return None
