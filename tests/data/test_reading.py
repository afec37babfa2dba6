import io
import random

import numpy as np
import pytest
from PIL import Image

from cmpe_se.data import read_image
from cmpe_se.errors import UserError


def _with_palette(transparent=None):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30, 255, 0, 0])
    image.info.update({} if transparent is None else {"transparency": transparent})
    return image


def _sixteen_bits(value, mode="I;16"):
    return Image.fromarray(np.full((4, 4), value, np.uint16 if mode == "I;16" else np.int32))


# What the file holds, its format, what RGB comes out, what grey comes out.
MODES = {
    "RGB": (Image.new("RGB", (4, 4), (10, 20, 30)), "png", (10, 20, 30), 18),
    "grey": (Image.new("L", (4, 4), 77), "png", (77, 77, 77), 77),
    "one bit, white": (Image.new("1", (4, 4), 1), "png", (255, 255, 255), 255),
    "one bit, black": (Image.new("1", (4, 4), 0), "tiff", (0, 0, 0), 0),
    "palette": (_with_palette(), "png", (10, 20, 30), 18),
    "palette gif": (_with_palette(), "gif", (10, 20, 30), 18),
    "palette, transparent": (_with_palette(1), "png", (255, 255, 255), 255),
    "palette, another entry transparent": (_with_palette(2), "png", (10, 20, 30), 18),
    "RGBA opaque": (Image.new("RGBA", (4, 4), (10, 20, 30, 255)), "png", (10, 20, 30), 18),
    "RGBA transparent": (Image.new("RGBA", (4, 4), (10, 20, 30, 0)), "webp", (255, 255, 255), 255),
    "RGBA, 1/5 there": (Image.new("RGBA", (4, 4), (0, 100, 250, 51)), "png", (204, 224, 254), 221),
    "LA, 1/5 there": (Image.new("LA", (4, 4), (100, 51)), "png", (224, 224, 224), 224),
    "CMYK tiff": (Image.new("CMYK", (4, 4), (255, 0, 0, 0)), "tiff", (0, 255, 255), 179),
    "16 bits, all white": (_sixteen_bits(65535), "png", (255, 255, 255), 255),
    "16 bits, half": (_sixteen_bits(32768), "png", (128, 128, 128), 128),
    "16 bits, rounded down": (_sixteen_bits(257 * 10 + 128), "tiff", (10, 10, 10), 10),
    "16 bits, rounded up": (_sixteen_bits(257 * 10 + 129), "png", (11, 11, 11), 11),
    "32 bits with 16": (_sixteen_bits(65535, "I"), "tiff", (255, 255, 255), 255),
}


@pytest.mark.parametrize("case", MODES)
def test_mode(case, tmp_path):
    image, suffix, rgb, grey = MODES[case]
    image.save(tmp_path / f"x.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    result = read_image(tmp_path / f"x.{suffix}")
    assert (result.mode, result.size, result.getpixel((1, 2))) == ("RGB", (4, 4), rgb)
    result = read_image(str(tmp_path / f"x.{suffix}"), in_chans=1)
    assert (result.mode, result.size, result.getpixel((1, 2))) == ("L", (4, 4), grey)


def test_cmyk_jpeg(tmp_path):
    Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(tmp_path / "x.jpg", quality=95)
    assert np.allclose(read_image(tmp_path / "x.jpg").getpixel((8, 8)), (0, 255, 255), atol=3)


def test_transparent_colour_of_rgb_and_grey(tmp_path):
    Image.new("RGB", (4, 4), (9, 8, 7)).save(tmp_path / "rgb.png", transparency=(9, 8, 7))
    Image.new("L", (4, 4), 9).save(tmp_path / "grey.png", transparency=9)
    assert read_image(tmp_path / "rgb.png").getpixel((0, 0)) == (255, 255, 255)
    assert read_image(tmp_path / "grey.png", in_chans=1).getpixel((0, 0)) == 255


# What orientation tag n asks of the stored pixels, written in NumPy.
TURNS = {
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).T,
    8: lambda x: np.rot90(x, 1),
}


@pytest.mark.parametrize("orientation", TURNS)
def test_exif_orientation(orientation, tmp_path):
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "x.png", in_chans=1)), TURNS[orientation](pixels))


def test_broken_exif_is_no_reason_to_lose_an_image(tmp_path):
    Image.new("L", (8, 8), 50).save(tmp_path / "x.jpg", exif=b"Exif\0\0nonsense and more of it")
    assert read_image(tmp_path / "x.jpg").size == (8, 8)


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("L", (4, 4), value) for value in (20, 200)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "x.gif", in_chans=1).getpixel((0, 0)) == 20


def test_open_file(tmp_path):
    Image.new("L", (4, 4), 77).save(tmp_path / "x.png")
    with open(tmp_path / "x.png", "rb") as file:
        assert read_image(file).getpixel((0, 0)) == (77, 77, 77)
    with pytest.raises(UserError, match=r"^the image is not an image"):
        read_image(io.BytesIO(b"nothing"))


def test_files_of_strangers(tmp_path):
    Image.new("L", (30, 20), 7).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png", formats=("PNG",), most_pixels=600).size == (30, 20)
    with pytest.raises(UserError, match=r"x\.png: 30x20 pixels are more than the 599 that are read; scale it down"):
        read_image(tmp_path / "x.png", most_pixels=599)
    with pytest.raises(UserError, match=r"x\.png is not an image \(JPEG, GIF\)"):
        read_image(tmp_path / "x.png", formats=("JPEG", "GIF"))


def _file(path, content):
    if content is None:
        return
    if content == "folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content.save(path)


def _encoded(suffix, keep=1.0):
    file = io.BytesIO()
    pixels = random.Random(0).randbytes(64 * 64 * 3)
    Image.frombytes("RGB", (64, 64), pixels).save(file, suffix)
    return file.getvalue()[: int(len(file.getvalue()) * keep)]


BROKEN = {
    "missing": ("x.png", None, "there is no such file"),
    "folder": ("x.png", "folder", "is a folder"),
    "text": ("x.png", b"hello", "not an image"),
    "empty": ("x.jpg", b"", "not an image"),
    "truncated jpeg": ("x.jpg", _encoded("jpeg", 0.5), "truncated or corrupt"),
    "truncated png": ("x.png", _encoded("png", 0.5), "truncated or corrupt"),
    "truncated webp": ("x.webp", _encoded("webp", 0.5), "corrupt|not an image"),
    "corrupt png": ("x.png", _encoded("png")[:60] + b"\0\1\2\3" * 20 + _encoded("png")[140:], "truncated or corrupt"),
    "float": ("x.tiff", Image.new("F", (4, 4), 0.5), "floating-point"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken(case, tmp_path):
    name, content, message = BROKEN[case]
    _file(tmp_path / name, content)
    with pytest.raises(UserError, match=message) as caught:
        read_image(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_decompression_bomb(tmp_path, monkeypatch):
    Image.new("L", (100, 100)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match=r"x\.png is too large: .*10000 pixels"):
        read_image(tmp_path / "x.png")


def test_channels(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "x.png")
    with pytest.raises(UserError, match="in_chans is 4"):
        read_image(tmp_path / "x.png", in_chans=4)
