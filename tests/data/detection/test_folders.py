"""Folders in COCO's and Pascal VOC's format give the boxes that were written, and one line about each fault."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from cmpe_se.data.detection import load_detection, read_coco, read_voc
from cmpe_se.errors import UserError

SIZE = (40, 30)  # width, height


def coco_content() -> dict:
    return {
        "images": [
            {"id": 7, "file_name": "b.png", "width": SIZE[0], "height": SIZE[1]},
            {"id": 3, "file_name": "a.png", "width": SIZE[0], "height": SIZE[1]},
        ],
        "categories": [{"id": 18, "name": "dog"}, {"id": 2, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 3, "category_id": 18, "bbox": [5, 6, 10, 12.5], "iscrowd": 0},
            {"id": 2, "image_id": 3, "category_id": 2, "bbox": [0, 0, 40, 30]},
            {"id": 3, "image_id": 3, "category_id": 2, "bbox": [0, 0, 9, 9], "iscrowd": 1},
        ],
    }


def write_coco(root: Path, content: dict) -> tuple[Path, Path]:
    (root / "images").mkdir(exist_ok=True)
    for level, name in enumerate(("a", "b")):
        Image.new("RGB", SIZE, (255 * level, 0, 51)).save(root / "images" / f"{name}.png")
    (root / "boxes.json").write_text(json.dumps(content))
    return root / "boxes.json", root / "images"


def test_coco(tmp_path):
    data = read_coco(*write_coco(tmp_path, coco_content()))
    assert data.classes == ("cat", "dog")
    (red, empty), (black, target) = data[0], data[1]
    assert (black.shape, black.dtype) == ((3, 30, 40), torch.float32)
    assert black[:, 0, 0].tolist() == pytest.approx([0, 0, 0.2])
    assert red[0].min() == 1
    assert empty["boxes"].shape == (0, 4)
    assert empty["labels"].shape == (0,)
    assert target["boxes"].tolist() == [[5, 6, 15, 18.5], [0, 0, 40, 30]]
    assert target["labels"].tolist() == [2, 1]
    assert str(data).endswith("boxes.json: 2 images, 2 boxes of 2 classes (left out: 1 crowds)")


def change(content: dict, part: str, index: int, **values: object) -> dict:
    content[part][index] |= values
    return content


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("annotations", {"bbox": [35, 0, 10, 9]}, "annotation 1 on a.png has a box from .* outside the image of 40x30"),
        ("annotations", {"bbox": [-3, 0, 10, 9]}, "annotation 1 on a.png has a box from .* outside"),
        ("annotations", {"bbox": [5, 5, 0, 9]}, r"has an empty box, from \(5, 5\) to \(5, 14\)"),
        ("annotations", {"bbox": [5, 5, 4, -1]}, "has an empty box"),
        ("annotations", {"bbox": [40, 5, 1, 5]}, "has an empty box"),  # within the tolerance, and nothing inside
        ("annotations", {"bbox": [5, 5, 4]}, r"annotations\[0\].bbox has 3 values, should have 4"),
        ("annotations", {"category_id": 99}, "annotation 1 is of category 99, which is not among its categories"),
        ("annotations", {"image_id": 99}, "annotation 1 is of image 99, which is not among its images"),
        ("images", {"file_name": "c.png"}, "names the image .*c.png, which is not there"),
        ("images", {"id": 3}, "has an image's number twice"),
        ("images", {"width": "wide"}, r"images\[0\].width is 'wide', should be a whole number"),
        ("categories", {"name": "cat"}, "has a category twice"),
    ],
)
def test_faults_of_coco(tmp_path, part, values, message):
    with pytest.raises(UserError, match=message) as caught:
        read_coco(*write_coco(tmp_path, change(coco_content(), part, 0, **values)))
    assert "\n" not in str(caught.value)
    assert "boxes.json" in str(caught.value)


def test_broken_json(tmp_path):
    file, images = write_coco(tmp_path, coco_content())
    file.write_text(file.read_text()[:-20])
    with pytest.raises(UserError, match=r"boxes.json cannot be read: .*; give annotations in COCO's format"):
        read_coco(file, images)


def test_no_images(tmp_path):
    with pytest.raises(UserError, match="has no images"):
        read_coco(*write_coco(tmp_path, {"images": [], "annotations": [], "categories": []}))


def test_image_of_another_size(tmp_path):
    data = read_coco(*write_coco(tmp_path, change(coco_content(), "images", 0, width=41)))
    with pytest.raises(UserError, match=r"b\.png has 40x30 pixels, and its boxes are for 41x30"):
        data[0]


def test_invalid_boxes_can_be_left_out(tmp_path):
    content = change(coco_content(), "annotations", 0, bbox=[5, 5, 0, 9])
    data = read_coco(*write_coco(tmp_path, content), skip_invalid=True)
    assert data[1][1]["labels"].tolist() == [1]
    assert data.left_out == {"crowds": 1, "invalid": 1}


def test_rounded_boxes_are_cut_at_the_edge(tmp_path):
    data = read_coco(*write_coco(tmp_path, change(coco_content(), "annotations", 0, bbox=[-0.5, 3, 41.2, 27.4])))
    assert data[1][1]["boxes"][0].tolist() == [0, 3, 40, 30]


OBJECT = (
    "<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin>"
    "<xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"
)


def write_voc(root: Path, *objects: tuple[str, int, tuple], part: str = "train", name: str = "one") -> Path:
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE).save(root / "JPEGImages" / f"{name}.jpg")
    (root / "ImageSets/Main" / f"{part}.txt").write_text(f"{name}\n")
    boxes = "".join(OBJECT.format(name=kind, difficult=difficult, box=box) for kind, difficult, box in objects)
    size = f"<size><width>{SIZE[0]}</width><height>{SIZE[1]}</height><depth>3</depth></size>"
    text = f"<annotation><filename>{name}.jpg</filename>{size}{boxes}</annotation>"
    (root / "Annotations" / f"{name}.xml").write_text(text)
    return root


def test_voc(tmp_path):
    root = write_voc(tmp_path, ("dog", 0, (1, 1, 40, 30)), ("cat", 0, (11, 2, 20, 5)), ("car", 1, (1, 1, 5, 5)))
    data = read_voc(root, "train")
    image, target = data[0]
    assert image.shape == (3, 30, 40)
    assert target["boxes"].tolist() == [[0, 0, 40, 30], [10, 1, 20, 5]]  # its pixels count from 1
    assert [data.classes[label - 1] for label in target["labels"]] == ["dog", "cat"]
    assert data.left_out == {"difficult": 1}


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ([("dog", 0, (1, 1, 50, 30))], "object 1 of one.xml on one.jpg has a box .* outside the image of 40x30"),
        ([("dog", 0, (9, 1, 5, 30))], "object 1 of one.xml on one.jpg has an empty box"),
        ([("unicorn", 0, (1, 1, 5, 3))], "object 1 of one.xml is of the class 'unicorn'; known are aeroplane, bicycle"),
        ([("dog", 0, ("left", 1, 5, 3))], "one.xml: bndbox/xmin is 'left', should be a number of pixels"),
        ([("dog", 0, ("", 1, 5, 3))], "one.xml: bndbox/xmin is missing"),
    ],
)
def test_faults_of_voc(tmp_path, objects, message):
    with pytest.raises(UserError, match=message):
        read_voc(write_voc(tmp_path, *objects), "train")


def test_missing_parts_of_voc(tmp_path):
    root = write_voc(tmp_path)
    with pytest.raises(UserError, match=r"val.txt cannot be read .*; it should list a part's images"):
        read_voc(root, "val")
    (root / "JPEGImages/one.jpg").unlink()
    with pytest.raises(UserError, match=r"names the image .*one\.jpg, which is not there"):
        read_voc(root, "train")
    (root / "Annotations/one.xml").write_text("<annotation>")
    with pytest.raises(UserError, match=r"one.xml cannot be read .*; give an annotation in Pascal VOC's format"):
        read_voc(root, "train")


@pytest.mark.parametrize(
    ("annotations", "images"),
    [
        ("annotations/instances_{part}2017.json", "{part}2017"),
        ("annotations/instances_{part}.json", "images/{part}"),
        ("{part}/_annotations.coco.json", "{part}"),
    ],
)
def test_coco_folders_are_found(tmp_path, annotations, images):
    file, folder = write_coco(tmp_path, coco_content())
    for part in ("train", "val"):
        target = tmp_path / "data" / images.format(part=part)
        target.mkdir(parents=True)
        for image in folder.iterdir():
            (target / image.name).write_bytes(image.read_bytes())
        boxes = tmp_path / "data" / annotations.format(part=part)
        boxes.parent.mkdir(exist_ok=True)
        boxes.write_bytes(file.read_bytes())
    data = load_detection(tmp_path / "data")
    assert (data.classes, len(data.train), len(data.test)) == (("cat", "dog"), 2, 2)


def test_voc_folders_are_found(tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    write_voc(root, ("owl", 0, (1, 1, 5, 5)))
    write_voc(root, ("elk", 0, (1, 1, 5, 5)), part="val", name="two")
    data = load_detection(tmp_path)
    assert data.classes == ("elk", "owl")
    assert data.train[0][1]["labels"].tolist() == [2]
    assert data.test[0][1]["labels"].tolist() == [1]


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="has neither annotations/instances_train"):
        load_detection(tmp_path)
    with pytest.raises(UserError, match="nowhere is not a folder"):
        load_detection(tmp_path / "nowhere")
