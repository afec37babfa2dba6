"""Scenes of pasted objects have exact boxes and masks, and depend on their seed alone."""

import runpy
from pathlib import Path

import pytest
import torch
from PIL import Image

from cmpe_se.errors import UserError

pytest.importorskip("skimage", reason="the photographs come with scikit-image")
EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "pasted_objects.py"))


def scenes(part="train", count=12, **settings):
    objects = EXAMPLE["load_objects"]()
    return EXAMPLE["PastedObjects"](*getattr(objects, part), EXAMPLE["photographs"](part), count, **settings)


def test_boxes_are_those_of_the_masks_and_masks_do_not_overlap():
    for image, boxes, labels, masks in scenes(objects=(2, 5), side=(9, 40)):
        assert (image.dtype, image.shape) == (torch.uint8, (3, 128, 128))
        assert len(boxes) == len(labels) == len(masks) >= 1
        assert (boxes.dtype, labels.dtype, masks.dtype) == (torch.float32, torch.int64, torch.bool)
        assert masks.sum(0).max() == 1
        for (left, top, right, bottom), mask in zip(boxes.tolist(), masks, strict=True):
            rows, columns = mask.nonzero(as_tuple=True)
            assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == [left, top, right, bottom]
            assert right - left == bottom - top
            assert 9 <= right - left <= 40


def test_pixels_of_an_object_are_its_own():
    """White objects on black: the mask is where the image is white."""
    white, black = torch.full((2, 3, 8, 8), 255, dtype=torch.uint8), torch.zeros(3, 200, 150, dtype=torch.uint8)
    made = EXAMPLE["PastedObjects"](white, torch.tensor([4, 7]), [black], 8, size=64, side=(10, 20))
    for image, _, labels, masks in made:
        assert torch.equal(image[0] == 255, masks.any(0))
        assert set(labels.tolist()) <= {4, 7}
    shares = {
        round(float(scene.masks[0].sum() / scene.boxes[0, 2:].sub(scene.boxes[0, :2]).prod()), 1) for scene in made
    }
    assert shares == {0.8, 1.0}  # round and square


def test_scenes_depend_on_seed_and_index_alone():
    one, same, other = scenes(seed=3), scenes(seed=3, count=6), scenes(seed=4)
    for index in (5, 2):
        assert all(map(torch.equal, one[index], same[index]))
        assert not torch.equal(one[index].image, other[index].image)


def test_parts_share_no_photograph():
    train, test = (EXAMPLE["PHOTOGRAPHS"][part] for part in ("train", "test"))
    assert not set(train) & set(test)
    assert all(min(photo.shape[1:]) >= 300 for photo in EXAMPLE["photographs"]("test"))


def test_classes_are_numbered_in_the_order_asked_for(tmp_path):
    for part in ("train", "test"):
        for level, name in enumerate(("ant", "bee", "cow")):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (32, 32), (50 * level, 0, number)).save(tmp_path / part / name / f"{number}.png")
    found = EXAMPLE["load_objects"](tmp_path, classes=("cow", "ant"))
    assert found.classes == ("cow", "ant")
    for images, labels in (found.train, found.test):
        assert sorted(zip(images[:, 0, 0, 0].tolist(), labels.tolist(), strict=True)) == [(0, 1)] * 2 + [(100, 0)] * 2
    with pytest.raises(UserError, match="has no class 'dog'; it has ant, bee, cow"):
        EXAMPLE["load_objects"](tmp_path, classes=("dog",))
