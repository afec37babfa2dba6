"""What every kind of data set promises about its batches."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from cmpe_se.data import Augmentation, ImageData, LargeImages, Preprocessing, SmallImages, load_data
from cmpe_se.errors import UserError

SMALL = Augmentation(crop_padding=2, flip=True, cutout=3)
LARGE = Augmentation(flip=True, color_jitter=0.4, random_erasing=0.5)
RANDAUGMENT = Augmentation(flip=True, auto_augment="rand-m9-mstd0.5")
KINDS = ("digits", "small folder", "large folder", "large folder, 2 workers", "imagenet")


@pytest.fixture(params=KINDS)
def case(request, make_folder):
    """A data set and an augmentation for it."""
    if request.param == "digits":
        return load_data("digits"), SMALL
    counts = {"train/a": 20, "train/b": 17, "val/a": 6, "val/b": 5}
    if request.param == "small folder":
        return load_data("folder", make_folder(counts), workers=0), SMALL
    root = make_folder(counts, size=(120, 100), suffix=".jpg")
    if request.param == "imagenet":
        return load_data("imagenet", root, workers=0), LARGE
    workers = 2 if "workers" in request.param else 0
    augmentation = LARGE if workers else RANDAUGMENT
    return load_data("folder", root, image_size=100, workers=workers), augmentation


def _train(data, augmentation, epoch=0, seed=0, batch_size=8, **options):
    return list(data.train_batches(epoch, batch_size=batch_size, seed=seed, augmentation=augmentation, **options))


def _equal(first, second):
    return len(first) == len(second) and all(
        torch.equal(a, b) for one, other in zip(first, second, strict=True) for a, b in zip(one, other, strict=True)
    )


def test_shapes_and_counts(case):
    data, augmentation = case
    assert isinstance(data, ImageData)
    batches = _train(data, augmentation)
    assert len(batches) == data.steps_per_epoch(8) == data.train_size // 8
    for images, labels in batches:
        assert images.shape == (8, data.in_chans, *data.image_size)
        assert (images.dtype, labels.dtype, labels.shape) == (torch.float32, torch.int64, (8,))
        assert images.is_contiguous()
        assert labels.min() >= 0
        assert labels.max() < len(data.classes)
    assert len(data.mean) == len(data.std) == data.in_chans


def test_a_batch_follows_from_seed_epoch_and_index(case):
    data, augmentation = case
    torch.manual_seed(1)
    first = _train(data, augmentation, epoch=3, seed=5)
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002
    random.seed(2)
    assert _equal(first, _train(data, augmentation, epoch=3, seed=5))
    assert not _equal(first, _train(data, augmentation, epoch=4, seed=5))
    assert not _equal(first, _train(data, augmentation, epoch=3, seed=6))
    for start in (0, 1, len(first) - 1, len(first)):
        assert _equal(first[start:], _train(data, augmentation, epoch=3, seed=5, start=start))


def test_global_random_state_is_left_alone(case):
    data, augmentation = case
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    _train(data, augmentation)
    list(data.test_batches(batch_size=8))
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002
    assert states[2] == random.getstate()


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_see_the_batches_of_one_process(world, case):
    data, augmentation = case
    whole = _train(data, augmentation, epoch=1, seed=2)
    ranks = [_train(data, augmentation, epoch=1, seed=2, rank=rank, world=world) for rank in range(world)]
    for rank, batches in enumerate(ranks):
        assert _equal([(images[rank::world], labels[rank::world]) for images, labels in whole], batches)


def test_without_augmentation_each_image_comes_once():
    data = load_data("digits")
    (images, labels), *_ = _train(data, Augmentation(), batch_size=1437)
    host = data._host
    mean, std = (255 * torch.tensor(numbers)[:, None, None] for numbers in (data.mean, data.std))
    pixels = (images * std + mean).round().to(torch.uint8)
    assert sorted(zip(pixels.flatten(1).tolist(), labels.tolist(), strict=True)) == sorted(
        zip(host.train_images.flatten(1).tolist(), host.train_labels.tolist(), strict=True)
    )
    assert images.mean().abs() < 1e-5
    assert abs(images.std(correction=0) - 1) < 1e-5


@pytest.mark.parametrize(("batch_size", "world"), [(4, 1), (4, 3), (1, 1), (100, 3), (2, 3)])
def test_each_test_image_comes_once(batch_size, world, case):
    data, _ = case
    everything = [torch.cat(parts) for parts in zip(*data.test_batches(batch_size=1000), strict=True)]
    assert len(everything[0]) == data.test_size
    for rank in range(world):
        batches = list(data.test_batches(batch_size=batch_size, rank=rank, world=world))
        assert all(len(labels) <= -(-batch_size // world) for _, labels in batches)
        for whole, part in zip(everything, zip(*batches, strict=True), strict=True):
            assert torch.equal(whole[rank::world], torch.cat(part))


def test_test_labels_and_images_agree(case):
    data, _ = case
    images, labels = next(data.test_batches(batch_size=1000))
    assert labels.bincount().min() > 0
    shown = data.test_image(data.test_size - 1)
    assert shown.mode == ("L" if data.in_chans == 1 else "RGB")
    if isinstance(data, SmallImages):
        pixels = torch.from_numpy(np.array(shown)).reshape(*data.image_size, data.in_chans).permute(2, 0, 1)
        assert torch.equal(data.preprocessing.normalise(pixels[None])[0], images[-1])
    some = [0, data.test_size // 2, data.test_size - 1]
    examples = list(data.test_examples(some))
    assert [label for _, label in examples] == labels[some].tolist()
    assert [image.tobytes() for image, _ in examples] == [data.test_image(index).tobytes() for index in some]


def test_training_set_smaller_than_a_batch(case):
    data, augmentation = case
    assert data.steps_per_epoch(5000) == 1
    ((images, labels),) = _train(data, augmentation, batch_size=5000)
    assert len(images) == len(labels) == data.train_size
    ranks = [_train(data, augmentation, batch_size=5000, rank=rank, world=2)[0][1] for rank in range(2)]
    assert torch.equal(labels[0::2], ranks[0])
    assert torch.equal(labels[1::2], ranks[1])


WRONG = {
    "batch size": ({"batch_size": 0}, "batch_size is 0"),
    "rank": ({"rank": 2, "world": 2}, "rank is 2 of 2: it has to be from 0 to 1"),
    "more processes than images": ({"world": 9}, "9 processes cannot share batches of 8 images of digits"),
    "seed": ({"seed": -1}, "seed is -1"),
    "epoch": ({"epoch": -1}, "epoch is -1"),
    "start": ({"start": 180}, "start is 180: an epoch of digits has the batches 0 to 178"),
    "large field": (
        {"augmentation": LARGE},
        "color_jitter, random_erasing cannot be used with the images of digits; these can: crop_padding, flip, cutout",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_fail_before_the_first_batch(name):
    options, message = WRONG[name]
    data = load_data("digits")
    with pytest.raises(UserError, match=message):
        data.train_batches(**{"epoch": 0, "batch_size": 8, "seed": 0, "augmentation": Augmentation()} | options)


def test_small_field_with_large_images():
    photos = Preprocessing.of_photos(("a", "b"), 32)
    data = LargeImages("x", [("x.png", 0)], [("x.png", 0)], preprocessing=photos, workers=0)
    with pytest.raises(UserError, match="crop_padding cannot be used with the images of x; these can: flip, scale"):
        data.train_batches(0, batch_size=1, seed=0, augmentation=Augmentation(crop_padding=1))


@pytest.mark.parametrize("kind", ["small", "large"])
def test_repeated_augmentation(kind, make_folder):
    """Each image comes three times, one after the other, differently augmented, in as many batches as without."""
    counts = {"train/a": 20, "train/b": 17, "val/a": 6, "val/b": 5}
    if kind == "small":
        data, once = load_data("folder", make_folder(counts, size=(12, 12)), workers=0), SMALL
    else:
        data, once = load_data("folder", make_folder(counts, size=(120, 100)), image_size=100, workers=0), LARGE
    thrice = replace(once, repeated_augmentation=3)
    batches, without = _train(data, thrice, batch_size=6), _train(data, once, batch_size=6)
    assert len(batches) == len(without) == 6
    indices = torch.cat([batch for _, batch in data.epoch_indices(0, 6, 0, 0, 3)])
    assert (indices // data.train_size).tolist() == [0, 1, 2] * 12
    images = (indices % data.train_size).reshape(12, 3)
    assert (images == images[:, :1]).all()
    assert len(images[:, 0].unique()) == 12
    labels = data.train_labels()
    for number, (pixels, found) in enumerate(batches):
        assert torch.equal(found, labels[images[2 * number : 2 * number + 2].flatten()])
        assert not torch.equal(pixels[0], pixels[1])
        assert not torch.equal(pixels[1], pixels[2])
    # Other images in other epochs, so that all are seen.
    plans = [plan for epoch in range(12) for _, plan in data.epoch_indices(epoch, 6, 0, 0, 3)]
    assert len((torch.cat(plans) % data.train_size).unique()) > 0.9 * data.train_size
    # Resumed in the middle, and on three processes, which have a copy each.
    assert _equal(_train(data, thrice, batch_size=6, start=4), batches[4:])
    shares = [_train(data, thrice, batch_size=6, rank=rank, world=3) for rank in range(3)]
    for number, (pixels, _) in enumerate(batches):
        assert torch.equal(torch.stack([share[number][0] for share in shares], 1).flatten(0, 1), pixels)
    assert torch.equal(shares[0][0][1], shares[1][0][1])


def test_a_stream_is_read_once():
    from cmpe_se.data.augmentation import STREAMED_FIELDS

    with pytest.raises(UserError, match="repeated_augmentation cannot be used with shards; these can: flip"):
        Augmentation(repeated_augmentation=3).only(STREAMED_FIELDS, "shards")


def test_everything_is_on_the_device():
    data = load_data("digits")
    images, labels = next(data.train_batches(0, batch_size=4, seed=0, augmentation=SMALL, device="meta"))
    assert (images.device.type, labels.device.type, images.shape) == ("meta", "meta", (4, 1, 8, 8))
    images, labels = next(data.test_batches(batch_size=4, device="meta"))
    assert (images.device.type, labels.device.type) == ("meta", "meta")


def test_cifar10_subset(cifar10_subset):
    data = load_data("folder", cifar10_subset)
    assert isinstance(data, SmallImages)
    assert (data.train_size, data.test_size, len(data.classes)) == (5000, 1000, 10)
    # Close to the published figures of all 50,000 images.
    assert np.allclose(data.mean, (0.4914, 0.4822, 0.4465), atol=0.01)
    assert np.allclose(data.std, (0.2470, 0.2435, 0.2616), atol=0.01)
    labels = torch.cat([labels for _, labels in _train(data, SMALL, batch_size=128)])
    assert labels.bincount().min() > 450


def test_pixels_become_the_test_batches(case):
    data, _ = case
    pixels = list(data.test_pixels(batch_size=4))
    assert all((images.dtype, labels.dtype) == (torch.uint8, torch.int64) for images, labels in pixels)
    normalised = [(data.preprocessing.normalise(images), labels) for images, labels in pixels]
    assert _equal(normalised, list(data.test_batches(batch_size=4)))
