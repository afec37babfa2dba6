"""The validation split: stratified, fixed, and no image of it is trained on."""

import pytest
import torch

from cmpe_se.data import Augmentation, LargeImages, load_data, validation_split
from cmpe_se.data.folders import scan_class_folders
from cmpe_se.errors import UserError

COUNTS = {"train/cat": 12, "train/dog": 5, "train/eel": 2, "test/cat": 4, "test/dog": 3, "test/eel": 1}


@pytest.fixture(params=["small", "large"])
def data(request, make_folder):
    """Images in memory, and images that are decoded as they are needed."""
    root = make_folder(COUNTS, size=(32, 32) if request.param == "small" else (300, 200))
    return load_data("folder", root, workers=0, image_size=None if request.param == "small" else 160)


def images_of_the_test(data) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*data.test_batches(batch_size=4), strict=True)
    return torch.cat(images), torch.cat(labels)


def training_images(data) -> torch.Tensor:
    [(images, _)] = data.train_batches(0, batch_size=data.train_size, seed=0, augmentation=Augmentation())
    return images


def test_a_share_of_each_class(data):
    train, validation = validation_split(data, 0.25)
    assert train.train_labels().bincount().tolist() == [9, 4, 1]
    assert images_of_the_test(validation)[1].bincount().tolist() == [3, 1, 1]
    assert (train.train_size, validation.test_size, train.test_size) == (14, 5, data.test_size)
    assert train.preprocessing == validation.preprocessing == data.preprocessing


def test_every_training_image_is_in_one_of_the_two(make_folder):
    data = load_data("folder", make_folder(COUNTS, size=(32, 32)), workers=0)
    train, validation = validation_split(data, 0.25)
    before, after = training_images(data), torch.cat([training_images(train), images_of_the_test(validation)[0]])
    assert torch.equal(before.flatten(1).sum(1).sort().values, after.flatten(1).sum(1).sort().values)


def test_the_same_images_in_memory_or_not(make_folder):
    root = make_folder(COUNTS, size=(32, 32))
    small = load_data("folder", root, workers=0)
    folders = scan_class_folders(root)
    large = LargeImages("folder", folders.train, folders.test, preprocessing=small.preprocessing, workers=0)
    (one, labels), (other, other_labels) = (
        images_of_the_test(validation_split(data, 0.25)[1]) for data in (small, large)
    )
    assert torch.equal(labels, other_labels)
    torch.testing.assert_close(one, other)


def test_test_images_stay(data):
    for before, after in zip(images_of_the_test(data), images_of_the_test(validation_split(data, 0.5)[0]), strict=True):
        assert torch.equal(before, after)


def test_the_same_images_every_time(data):
    first, second = (images_of_the_test(validation_split(data, 0.25)[1])[0] for _ in range(2))
    assert torch.equal(first, second)


def test_a_class_of_one_image_is_trained_on(make_folder, caplog):
    data = load_data("folder", make_folder(COUNTS | {"train/fox": 1, "test/fox": 1}), workers=0)
    train, _ = validation_split(data, 0.25)
    assert train.train_labels().bincount().tolist() == [9, 4, 1, 1]
    assert "1 class(es) of folder have one training image, and none for validation" in caplog.text


def test_nothing_to_hold_out(make_folder):
    counts = {"train/cat": 1, "train/dog": 1, "test/cat": 1, "test/dog": 1}
    with pytest.raises(UserError, match="no class with two training images"):
        validation_split(load_data("folder", make_folder(counts), workers=0), 0.25)
