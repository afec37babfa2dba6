"""The training transform against timm's own of the whole image: the same crops, and the same pixels or nearly so."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data import create_transform

from cmpe_se.data import Augmentation, Preprocessing, read_image
from cmpe_se.data.reading import read_reduced
from cmpe_se.data.train_transform import TrainTransform, _Box, collate, finish
from cmpe_se.errors import UserError
from cmpe_se.utils.randomness import seeded

PHOTOS = Preprocessing.of_photos(("a", "b"), 64)
GREY = Preprocessing(("a", "b"), (1, 64, 64), (0.5,), (0.25,))
SIZE = (1203, 901)  # no side can be divided by 2, 4 or 8
SEEDS = range(12)


def encoded(image, kind="jpeg", orientation=1, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, kind, exif=exif, **options)
    file.name = f"x.{kind}"
    return file


def photo(name="china", size=SIZE):
    return Image.fromarray(load_sample_image(f"{name}.jpg")).resize(size, Image.Resampling.LANCZOS)


def gradient(size=SIZE):
    """Brighter to the right and, in other colours, to the bottom: a shift of a pixel shows in the means."""
    width, height = size
    across = np.broadcast_to(np.linspace(0, 255, width), (height, width))
    down = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
    return Image.fromarray(np.stack([across, down, 255 - across], 2).round().astype(np.uint8))


def timm_transform(preprocessing, augmentation, **options):
    return create_transform(
        preprocessing.size, is_training=True, mean=preprocessing.mean, std=preprocessing.std,
        hflip=0.5 if augmentation.flip else 0.0, color_jitter=augmentation.color_jitter or None,
        auto_augment=augmentation.auto_augment, interpolation=preprocessing.interpolation,
        re_prob=augmentation.random_erasing, re_mode="pixel", **options,
    )  # fmt: skip


def pixels_of_both(file, preprocessing=PHOTOS):
    """Ours and timm's pixels of the same random crops, and how many times smaller each image was decoded."""
    own, timm = TrainTransform(preprocessing, Augmentation()), timm_transform(preprocessing, Augmentation())
    mean, std = (255 * torch.tensor(numbers)[:, None, None] for numbers in (preprocessing.mean, preprocessing.std))
    file.seek(0)
    whole = read_image(file, in_chans=preprocessing.size[0])
    for seed in SEEDS:
        file.seek(0)
        with seeded(seed):
            ours = own(file).pixels
        with seeded(seed):
            theirs = (timm(whole) * std + mean).round()
        with seeded(seed):
            scale = _Box(own._crop).choose(*whole.size)
        yield ours.float(), theirs, scale


@pytest.mark.parametrize("orientation", range(1, 9))
def test_crops_are_timm_s_however_an_image_is_turned(orientation):
    file = encoded(gradient(), orientation=orientation, quality=95)
    scales = set()
    for ours, theirs, scale in pixels_of_both(file):
        scales.add(scale)
        assert (ours - theirs).mean((1, 2)).abs().max() < 0.25  # a pixel at half the size moves it by 0.4 and more
        assert (ours - theirs).abs().max() <= 3
    assert scales == {2, 4, 8} or scales == {2, 4}


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("name", ["china", "flower"])
def test_pixels_of_photographs_are_close_to_timm_s(name, interpolation):
    preprocessing = Preprocessing(("a",), (3, 64, 64), (0.5,) * 3, (0.25,) * 3, interpolation=interpolation)
    differences = [
        (ours - theirs).abs() for ours, theirs, _ in pixels_of_both(encoded(photo(name), quality=90), preprocessing)
    ]
    assert max(difference.mean() for difference in differences) < 1.2  # of 255
    assert max(difference.max() for difference in differences) < 30


def test_the_crop_is_drawn_as_timm_draws_it():
    own = TrainTransform(PHOTOS, Augmentation())
    for size in ((4000, 3000), (3000, 4000), (500, 375), (30, 2000), (5, 5)):
        for seed in SEEDS:
            box = _Box(own._crop)
            with seeded(seed):
                box.choose(*size)
            with seeded(seed):
                expected = own._crop.get_params(Image.new("1", size), own._crop.scale, own._crop.ratio)
            assert (box.top, box.left, box.height, box.width) == expected


# Files that are decoded as a whole, in which no pixel may differ.
WHOLE = {
    "small": encoded(photo(size=(120, 90))),
    "small, turned": encoded(photo(size=(120, 90)), orientation=6),
    "png": encoded(photo(size=(600, 450)), "png"),
    "png, turned": encoded(photo(size=(600, 450)), "png", orientation=8),
    "CMYK": encoded(photo(size=(600, 450)).convert("CMYK")),
    "palette": encoded(photo(size=(600, 450)).convert("P"), "png"),
    "16 bits": encoded(Image.fromarray(np.arange(600 * 450, dtype=np.uint16).reshape(450, 600)), "png"),
    "transparent": encoded(photo(size=(600, 450)).convert("RGBA"), "png"),
    "narrow": encoded(photo(size=(700, 20))),
}


@pytest.mark.parametrize("case", WHOLE)
def test_what_is_decoded_whole_is_timm_s_to_the_bit(case):
    for preprocessing in (PHOTOS, GREY):
        for ours, theirs, _ in pixels_of_both(WHOLE[case], preprocessing):
            assert torch.equal(ours, theirs)


def test_grey_files_are_reduced_too():
    for ours, theirs, scale in pixels_of_both(encoded(photo().convert("L")), GREY):
        assert scale > 1
        assert (ours - theirs).abs().mean() < 1.2


FULL = Augmentation(flip=True, color_jitter=0.4, random_erasing=0.6)
RANDAUGMENT = Augmentation(flip=True, auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.6)


@pytest.mark.parametrize("augmentation", [FULL, RANDAUGMENT], ids=["jitter", "randaugment"])
def test_flips_colours_and_erased_rectangles_are_timm_s(augmentation):
    own, timm = TrainTransform(PHOTOS, augmentation), timm_transform(PHOTOS, augmentation)
    image = photo(size=(200, 150))
    samples, expected = [], []
    for seed in range(20):
        with seeded(seed):
            samples.append((own(image), seed))
        with seeded(seed):
            expected.append(timm(image))
    assert 5 < sum(sample.erased is not None for sample, _ in samples) < 20
    images, labels = finish(collate(samples), PHOTOS)
    assert labels.tolist() == list(range(20))
    torch.testing.assert_close(images, torch.stack(expected), rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (7, 9), (15, 15), (16, 17), (8, 8), (1, 1)])
@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_sizes_are_rounded_up_or_refused(size, scale):
    file = encoded(photo(size=size))
    seen = []

    def choose(*whole):
        seen.append(whole)
        return scale

    expected = (-(-size[0] // scale), -(-size[1] // scale))
    if min(size) < scale:
        with pytest.raises(UserError, match=r"x\.jpeg"):
            read_reduced(file, choose)
    else:
        assert read_reduced(file, choose).image.size == expected
    assert seen == [size]


@pytest.mark.parametrize("scale", [1, 2, 8])
def test_a_truncated_file_is_an_error_at_every_scale(scale):
    content = encoded(photo()).getvalue()
    with pytest.raises(UserError, match="truncated or corrupt"):
        read_reduced(io.BytesIO(content[: len(content) // 2]), lambda width, height: scale)


def test_an_image_of_several_pictures_is_its_first(tmp_path):
    photo().save(tmp_path / "x.mpo", "mpo", save_all=True, append_images=[photo("flower")])
    photo().save(tmp_path / "x.jpg")
    both = [read_reduced(str(tmp_path / name), lambda width, height: 4) for name in ("x.mpo", "x.jpg")]
    assert [reduced.image.size for reduced in both] == [(301, 226)] * 2
    assert np.array_equal(*(np.asarray(reduced.image) for reduced in both))
