import gc
import time

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from cmpe_se.data import Augmentation, LargeImages, load_data
from cmpe_se.errors import UserError


@pytest.fixture
def photos(make_folder):
    counts = {"train/n01": 7, "train/n02": 6, "val/n01": 3, "val/n02": 2}
    return make_folder(counts, size=(300, 260), suffix=".JPEG")


def test_imagenet(photos):
    data = load_data("imagenet", photos, workers=0)
    assert isinstance(data, LargeImages)
    assert (data.name, data.classes, data.train_size, data.test_size) == ("imagenet", ("n01", "n02"), 13, 5)
    assert (data.image_size, data.in_chans) == ((224, 224), 3)
    assert (data.mean, data.std) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    assert data.test_image(0).size == (300, 260)


def test_imagenet_has_no_test_folder(make_folder):
    root = make_folder({"train/a": 1, "train/b": 1, "test/a": 1, "test/b": 1})
    with pytest.raises(UserError, match=r"folder train but no folder for the test: .*\{?val\|validation"):
        load_data("imagenet", root)


def test_test_transform(photos):
    data = load_data("imagenet", photos, workers=0, image_size=128)
    images, labels = next(data.test_batches(batch_size=5))
    assert labels.tolist() == [0, 0, 0, 1, 1]
    side = int(128 / 0.875)
    image = Image.open(photos / "val" / "n01" / "000.JPEG").resize((int(side * 300 / 260), side), Image.BICUBIC)
    left, top = round((image.width - 128) / 2), round((image.height - 128) / 2)
    pixels = np.asarray(image.crop((left, top, left + 128, top + 128)), np.float32) / 255
    expected = (pixels - IMAGENET_DEFAULT_MEAN) / IMAGENET_DEFAULT_STD
    assert np.allclose(images[0].permute(1, 2, 0), expected, atol=1e-5)


def test_workers_make_no_difference(photos):
    augmentation = Augmentation(flip=True, color_jitter=0.3, auto_augment="rand-m5-mstd0.5-inc1", random_erasing=0.5)
    options = {"batch_size": 4, "seed": 1, "augmentation": augmentation}
    batches = [
        list(load_data("imagenet", photos, workers=workers, image_size=64).train_batches(2, **options))
        for workers in (0, 2)
    ]
    assert len(batches[0]) == 3
    for (images, labels), (other_images, other_labels) in zip(*batches, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


@pytest.mark.parametrize("field", ["flip", "scale", "ratio", "color_jitter", "auto_augment", "random_erasing"])
def test_each_field_does_something(field, photos):
    plain = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    values = {
        "flip": True,
        "scale": (0.1, 0.5),
        "ratio": (0.3, 0.5),
        "color_jitter": 0.5,
        "auto_augment": "augmix-m5-w3",
        "random_erasing": 1.0,
    }
    data = load_data("imagenet", photos, workers=0, image_size=32)
    first, second = (
        next(data.train_batches(0, batch_size=13, seed=0, augmentation=Augmentation(**fields)))[0]
        for fields in (plain, plain | {field: values[field]})
    )
    assert not torch.equal(first, second)


def test_unknown_auto_augment(photos):
    data = load_data("imagenet", photos, workers=0)
    with pytest.raises(UserError, match="auto_augment is 'nonsense', which timm does not support"):
        next(data.train_batches(0, batch_size=4, seed=0, augmentation=Augmentation(auto_augment="nonsense")))


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_image(workers, photos):
    path = photos / "val" / "n02" / "001.JPEG"
    path.write_bytes(path.read_bytes()[:2000])
    data = load_data("imagenet", photos, workers=workers)
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        list(data.test_batches(batch_size=2))
    gc.collect()
    assert time.monotonic() - started < 4, "the workers were waited for"
    assert str(caught.value).startswith(f"{path} is truncated or corrupt")
    assert "\n" not in str(caught.value)


def test_odd_modes_among_the_images(photos):
    Image.new("LA", (300, 260), (0, 0)).save(photos / "val" / "n01" / "white.png")
    data = load_data("imagenet", photos, workers=0, image_size=32)
    images, _ = next(data.test_batches(batch_size=6))
    white = (1 - torch.tensor(IMAGENET_DEFAULT_MEAN)) / torch.tensor(IMAGENET_DEFAULT_STD)
    assert torch.allclose(images[3], white[:, None, None].expand(3, 32, 32), atol=1e-5)
