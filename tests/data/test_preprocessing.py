"""One description of the way from an image to a tensor: what it does and refuses, and what data sets do with it."""

import json
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data import create_transform

from cmpe_se.data import LargeImages, Preprocessing, SmallImages, load_data, read_image
from cmpe_se.data.folders import scan_class_folders
from cmpe_se.errors import UserError
from tests.photos import CLASSES, write_photos

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
SMALL = Preprocessing(CLASSES, (3, 32, 32), MEAN, STD)
LARGE = Preprocessing.of_photos(CLASSES, 112)
GREY = Preprocessing(CLASSES, (1, 24, 20), (0.5,), (0.2,), interpolation="bilinear", crop=0.9)
FIT = replace(SMALL, resize="fit")
ALL = {"small": SMALL, "large": LARGE, "grey": GREY, "fit": FIT}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos") / "images")


def files(photos):
    return [path for path, _ in scan_class_folders(photos).test]


@pytest.mark.parametrize("name", ["small", "large", "grey"])
def test_a_tensor_is_that_of_timm_s_transform(name, photos):
    own = ALL[name]
    words = own.to_timm()
    transform = create_transform(words.pop("input_size"), is_training=False, **words)
    for path in files(photos):
        image = read_image(path, in_chans=own.size[0])
        torch.testing.assert_close(own(image), transform(image), rtol=0, atol=2e-6)
        assert torch.equal(own(image), own.normalise(own.read(path)))
        assert own.pixels(image).dtype == torch.uint8
        assert own.pixels(image).shape == own.size


def test_fit_is_pillow_s(photos):
    for path in files(photos):
        image = read_image(path)
        expected = np.asarray(ImageOps.fit(image, (32, 32), Image.Resampling.BICUBIC))
        assert np.array_equal(FIT.pixels(image).permute(1, 2, 0), expected)
    image = read_image(photos / "test" / "china" / "landscape.png")
    assert (FIT(image) - SMALL(image)).abs().max() > 0.1  # or the two would be one


def test_an_image_of_the_right_size_is_left_alone(photos):
    image = read_image(photos / "test" / "flower" / "exact.png")
    for own in (SMALL, FIT):
        assert np.array_equal(own.pixels(image).permute(1, 2, 0), np.asarray(image))


def test_normalise_by_hand():
    pixels = torch.randint(256, (4, 3, 5, 6), dtype=torch.uint8)
    before = pixels.clone()
    mean, std = (torch.tensor(numbers, dtype=torch.float64)[:, None, None] for numbers in (MEAN, STD))
    expected = ((pixels.double() / 255 - mean) / std).float()
    torch.testing.assert_close(SMALL.normalise(pixels), expected, rtol=0, atol=1e-6)
    assert torch.equal(SMALL.normalise(pixels)[2], SMALL.normalise(pixels[2]))
    assert torch.equal(pixels, before)


def test_colours_as_the_network_needs_them():
    grey, red = Image.new("L", (20, 24), 100), Image.new("RGB", (32, 32), (255, 0, 0))
    assert (SMALL.pixels(grey) == 100).all()
    assert (GREY.pixels(red) == 76).all()  # 0.299 of 255


@pytest.mark.parametrize("size", [(1, 100_000), (100_000, 1)])
def test_long_and_narrow(size, tmp_path):
    Image.new("L", size).save(tmp_path / "line.png")
    message = rf"line\.png: {size[0]}x{size[1]} pixels are too long and narrow to scale to 112x112"
    with pytest.raises(UserError, match=message):
        LARGE.read(tmp_path / "line.png")
    assert FIT.read(tmp_path / "line.png").shape == (3, 32, 32)
    data = LargeImages("x", [], [(str(tmp_path / "line.png"), 0)], preprocessing=LARGE, workers=0)
    with pytest.raises(UserError, match=message):
        list(data.test_batches(batch_size=1))


@pytest.mark.parametrize("own", ALL.values(), ids=ALL)
def test_json_and_back(own):
    again = Preprocessing.from_dict(json.loads(json.dumps(own.to_dict())), "there")
    assert again == own
    assert hash(again) == hash(own)
    with pytest.raises(FrozenInstanceError):
        own.crop = 0.5


WRONG = {
    "missing": ({"mean": None}, "there: preprocessing lacks mean; it has to have classes, size, mean"),
    "unknown": ({"crop_mode": "border"}, "there: preprocessing has crop_mode, which this version does not support"),
    "interpolation": ({"interpolation": "cubic"}, "there: preprocessing: interpolation is 'cubic', should be one of"),
    "resize": ({"resize": True}, "resize is True, should be one of shorter_side, fit"),
    "crop": ({"crop": 1.5}, "crop is 1.5, should be a number above 0 and at most 1"),
    "cropped fit": ({"resize": "fit", "crop": 0.5}, "crop is 0.5, should be 1 where resize is fit"),
    "channels": ({"size": [2, 8, 8]}, "size is .2, 8, 8., should be .channels, height, width"),
    "size": ({"size": 32}, "there: .*not iterable"),
    "means": ({"mean": [0.5]}, "mean is .0.5,., should be a number for each channel"),
    "nan": ({"mean": [0.5, 0.5, float("nan")]}, "should be a number for each channel"),
    "std": ({"std": [0.2, 0.2, 0.0]}, "should be a number above 0 for each channel"),
    "text": ({"classes": "abc"}, "classes is 'abc', should be a list of names"),
    "classes": ({"classes": [1, 2]}, "classes is .1, 2., should be a list of names"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_json_is_refused_in_one_line(name):
    change, message = WRONG[name]
    values = {key: value for key, value in (SMALL.to_dict() | change).items() if value is not None}
    with pytest.raises(UserError, match=message) as caught:
        Preprocessing.from_dict(values, "there")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("values", [None, 3, ["classes"]])
def test_no_object_is_refused(values):
    with pytest.raises(UserError, match=r"there: preprocessing is .*, should be an object with classes, size"):
        Preprocessing.from_dict(values, "there")


def test_timm_s_words_alone():
    words = {"label_names": list(CLASSES)} | SMALL.to_timm()
    assert Preprocessing.from_timm(words, "there") == SMALL
    assert Preprocessing.from_timm(words, "there", "fit") == FIT
    del words["mean"], words["crop_pct"]
    with pytest.raises(UserError, match=r"^there does not say its mean, crop_pct$"):
        Preprocessing.from_timm(words, "there")


@pytest.mark.parametrize("own", [SMALL, LARGE, GREY, FIT], ids=ALL)
def test_a_folder_under_a_run_s_preprocessing(own, photos):
    data = load_data("folder", photos, preprocessing=own, workers=0)
    assert data.preprocessing == own
    assert isinstance(data, SmallImages if own.crop == 1 else LargeImages)
    images, labels = next(data.test_batches(batch_size=100))
    assert labels.tolist() == [label for _, label in scan_class_folders(photos).test]
    assert torch.equal(images, own.normalise(torch.stack([own.read(path) for path in files(photos)])))
    shown = torch.stack([own(image) for image, _ in data.test_examples(range(data.test_size))])
    assert torch.equal(shown, images)


def test_the_class_names_are_the_data_s_own(photos):
    assert load_data("folder", photos, preprocessing=replace(SMALL, classes=("a",)), workers=0).classes == CLASSES


@pytest.mark.parametrize("size", [(1, 8, 8), (1, 16, 16), (3, 8, 8)])
def test_a_fixed_size_under_another_preprocessing(size):
    channels, own = size[0], load_data("digits")
    wanted = Preprocessing(own.classes, size, (0.5,) * channels, (0.25,) * channels)
    data = load_data("digits", preprocessing=wanted, workers=0)
    assert isinstance(data, SmallImages) == (size == own.preprocessing.size)
    images, labels = next(data.test_batches(batch_size=10))
    assert torch.equal(labels, next(own.test_batches(batch_size=10))[1])
    assert torch.equal(images[3], wanted(own.test_image(3)))


def test_image_size_and_preprocessing(photos):
    with pytest.raises(UserError, match="image_size is 32, but preprocessing has a size"):
        load_data("folder", photos, image_size=32, preprocessing=SMALL)


def test_the_cache_is_of_one_preprocessing(photos, cache_dir):
    images = [
        load_data("folder", photos, image_size=32, resize=way)._host.test_images for way in ("shorter_side", "fit")
    ]
    assert len(list(cache_dir.iterdir())) == 2
    assert not torch.equal(*images)
    own = replace(SMALL, interpolation="nearest")
    other = load_data("folder", photos, preprocessing=own)._host.test_images
    assert len(list(cache_dir.iterdir())) == 3
    assert not torch.equal(images[0], other)
    again = load_data("folder", photos, preprocessing=replace(SMALL, mean=(0.1,) * 3), workers=0)  # changes no pixel
    assert len(list(cache_dir.iterdir())) == 3
    assert torch.equal(again._host.test_images, images[0])


def test_what_training_cached_is_found_again(two_classes, cache_dir):
    data = load_data("folder", two_classes, workers=0)
    again = load_data("folder", two_classes, preprocessing=data.preprocessing, workers=0)
    assert len(list(cache_dir.iterdir())) == 1
    assert torch.equal(again._host.test_images, data._host.test_images)
