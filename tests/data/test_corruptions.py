"""Corruptions are what their documentation says, and depend on an image and its index alone."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter1d

from cmpe_se.data import load_data
from cmpe_se.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt, corrupted_test_sets
from cmpe_se.errors import UserError


def pictures(count=5, channels=3, height=24, width=32):
    """Smooth images, as photos are, of all grey levels."""
    random = torch.Generator().manual_seed(3)
    small = torch.rand(count, channels, 5, 6, generator=random)
    images = torch.nn.functional.interpolate(small, (height, width), mode="bicubic").clamp(0, 1)
    return (255 * images).round().to(torch.uint8)


def contrast(image, factor):
    grey = image[0] if len(image) == 1 else np.floor(np.tensordot([0.2989, 0.587, 0.114], image, 1))
    return factor * image + (1 - factor) * grey.mean()


def brightness(image, factor):
    return factor * image


def blur(image, part):
    for axis in (1, 2):
        image = gaussian_filter1d(image, part * min(image.shape[1:]), axis, mode="mirror", truncate=3.5)
    return image


def jpeg(image, quality):
    file = io.BytesIO()
    pixels = image.astype(np.uint8)
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(file, "jpeg", quality=quality)
    decoded = np.asarray(Image.open(file))
    return decoded[None] if decoded.ndim == 2 else decoded.transpose(2, 0, 1)


ORACLES = {  # function of (image (C, H, W) in float64, parameter), and the largest difference in grey levels
    "contrast": (contrast, 1),  # torchvision rounds down
    "brightness": (brightness, 1),
    "blur": (blur, 1.5),
    "jpeg": (jpeg, 3),  # Pillow and torchvision may have two builds of libjpeg
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("corruption", ORACLES)
def test_against_the_formula(corruption, severity, channels):
    images = pictures(channels=channels)
    found = corrupt(images, corruption, severity)
    assert (found.dtype, found.shape) == (torch.uint8, images.shape)
    oracle, tolerance = ORACLES[corruption]
    parameter = CORRUPTIONS[corruption][severity - 1]
    expected = np.stack([oracle(image.astype(float), parameter) for image in images.numpy()]).clip(0, 255)
    assert np.abs(found.numpy() - expected).max() <= tolerance
    assert not torch.equal(found, images)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_noise_has_its_deviation(severity):
    grey = torch.full((8, 3, 64, 64), 128, dtype=torch.uint8)
    noise = corrupt(grey, "noise", severity).double() - 128
    assert noise.mean().abs() < 0.5
    assert noise.std() / 255 == pytest.approx(CORRUPTIONS["noise"][severity - 1], rel=0.05)
    assert len({image.numpy().tobytes() for image in noise}) == 8


@pytest.mark.parametrize("side", [8, 16, 32, 100])
@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_batches_make_no_difference(corruption, side):
    images = pictures(9, 3, side, side)
    whole = corrupt(images, corruption, 3)
    for size in (1, 2, 5):
        parts = [corrupt(part, corruption, 3, first=size * i) for i, part in enumerate(images.split(size))]
        assert torch.equal(torch.cat(parts), whole)


def test_severities_get_worse():
    images = pictures().double()
    for corruption in CORRUPTIONS:
        changes = [(corrupt(pictures(), corruption, s).double() - images).square().mean() for s in SEVERITIES]
        assert changes == sorted(changes), corruption


def test_global_random_state_is_left_alone():
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    before = torch.get_rng_state()
    corrupt(pictures(), "noise", 2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 1, 1, 1), (2, 3, 2, 9), (1, 1, 8, 8)])
@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_odd_sizes(corruption, shape):
    assert corrupt(torch.zeros(shape, dtype=torch.uint8), corruption, 5).shape == shape


def test_all_test_sets():
    data = load_data("digits")
    sets = list(corrupted_test_sets(data))
    assert [each[:2] for each in sets] == [(corruption, s) for corruption in CORRUPTIONS for s in SEVERITIES]
    assert all(images.shape == (360, 1, 8, 8) for *_, images in sets)


MISTAKES = {
    "corruption": ((pictures(), "fog", 1), "no corruption 'fog'"),
    "severity": ((pictures(), "blur", 6), "severity 6"),
    "float": ((pictures().float(), "blur", 1), "uint8"),
    "channels": ((pictures(channels=2), "blur", 1), "1 or 3"),
    "no batch": ((pictures()[0], "blur", 1), "uint8"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(arguments, message):
    with pytest.raises(UserError, match=message):
        corrupt(*arguments)
