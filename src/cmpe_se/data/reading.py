"""The one reader of image files, for training and prediction alike."""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from cmpe_se.data.image_files import broken_link, find_images, notes_on, register_plugins
from cmpe_se.errors import UserError
from cmpe_se.utils.text import in_one_line

_log = logging.getLogger(__name__)
_SIXTEEN_BITS = ("I", "I;16", "I;16B", "I;16L", "I;16N")

ChooseScale = Callable[[int, int], int]
"""Width and height of an upright image, as its file's header has them, to how many times smaller it may be decoded."""

REDUCTIONS = (8, 4, 2)
"""How many times smaller JPEG's decoder can make an image, largest first."""


def read_image(
    path_or_file: str | os.PathLike | BinaryIO,
    *,
    in_chans: int = 3,
    formats: Sequence[str] | None = None,
    most_pixels: int | None = None,
) -> Image.Image:
    """Reads an image file to 8-bit RGB (``in_chans`` 3) or grey (1).

    Turned upright as its EXIF orientation says; palettes, CMYK and grey converted; anything transparent laid on white;
    16-bit grey scaled from 0..65535 to 0..255 (a 32-bit integer image is taken to hold 16-bit values). Of an animation
    the first frame.

    Uploaded files can be limited to ``formats`` (Pillow's names) and to ``most_pixels``, which the file's header tells
    before anything is decoded.

    Raises UserError in one line for a file that is missing, no image, truncated, corrupt, or so large in pixels that
    Pillow takes it for a decompression bomb.
    """
    return _read(path_or_file, in_chans, formats, most_pixels).image


class ReducedImage(NamedTuple):
    """An image that may have been decoded at a smaller size than it has."""

    image: Image.Image
    scale: int = 1
    """How many times smaller it is, one of ``REDUCTIONS``, or 1. Sizes that cannot be divided are rounded up."""
    offset: tuple[float, float] = (0.0, 0.0)
    """The point (x, y) of the whole image is at (x / scale + offset[0], y / scale + offset[1]) here."""


def read_reduced(path_or_file: str | os.PathLike | BinaryIO, choose: ChooseScale, *, in_chans: int = 3) -> ReducedImage:
    """``read_image``, at a part of the size where that is all that is needed.

    ``choose`` is called once with the size of the upright image, before a JPEG file is decoded, and its answer, one of
    ``REDUCTIONS`` or 1, is followed for JPEG files in RGB or grey. The decoder then leaves out the high frequencies of
    each block of 8x8 pixels, which is much like the mean over 2x2, 4x4 or 8x8 pixels, and faster. All other files come
    at their full size.
    """
    return _read(path_or_file, in_chans, None, None, choose)


def _read(
    path_or_file: str | os.PathLike | BinaryIO,
    in_chans: int,
    formats: Sequence[str] | None,
    most_pixels: int | None,
    choose: ChooseScale | None = None,
) -> ReducedImage:
    name = str(getattr(path_or_file, "name", "the image") if hasattr(path_or_file, "read") else path_or_file)
    register_plugins()
    try:
        with Image.open(path_or_file, formats=None if formats is None else tuple(formats)) as image:
            if most_pixels is not None and image.width * image.height > most_pixels:
                size = f"{image.width}x{image.height} pixels"
                raise UserError(f"{size} are more than the {most_pixels:,} that are read; scale it down")
            if choose is None:
                image.load()
                return ReducedImage(_converted(image, in_chans))
            return _reduced(image, choose, in_chans)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    except FileNotFoundError:
        if os.path.islink(name):
            raise UserError(broken_link(name)) from None
        raise UserError(f"{name}: there is no such file; give the path of an image") from None
    except IsADirectoryError:
        raise UserError(f"{name} is a folder; give the path of an image") from None
    except PermissionError:
        raise UserError(f"{name}: no permission to read it; change its permissions") from None
    except UnidentifiedImageError:
        known = f" ({', '.join(formats)})" if formats else " that Pillow can read"
        raise UserError(f"{name} is not an image{known}; remove it or replace it by a good one") from None
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} is too large: {error}; scale it down, or remove it") from None
    except (
        Exception
    ) as error:  # Pillow's decoders fail on corrupt files in many ways: OSError, SyntaxError, struct.error
        reason = in_one_line(error)
        raise UserError(f"{name} is truncated or corrupt ({reason}); remove it or replace it by a good one") from None


def _reduced(image: Image.Image, choose: ChooseScale, in_chans: int) -> ReducedImage:
    if not isinstance(image, JpegImageFile) or image.mode not in ("RGB", "L"):
        image.load()
        whole = _converted(image, in_chans)
        choose(*whole.size)
        return ReducedImage(whole)
    width, height = image.size
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    scale = choose(*((height, width) if orientation in (5, 6, 7, 8) else (width, height)))
    if min(width, height) < scale:
        raise ValueError(f"{width}x{height} pixels cannot be decoded {scale} times smaller")
    if scale > 1:
        image.draft(None, (width // scale, height // scale))
    image.load()
    # Where a side was rounded up, and turning puts its end at the beginning, the rest of the last pixel comes first.
    rest = (image.width - width / scale, image.height - height / scale)
    across, down = rest[::-1] if orientation in (5, 6, 7, 8) else rest
    offset = (across if orientation in (2, 3, 6, 7) else 0.0, down if orientation in (3, 4, 7, 8) else 0.0)
    return ReducedImage(_converted(image, in_chans), scale, offset)


def convert_image(image: Image.Image, *, in_chans: int = 3) -> Image.Image:
    """What ``read_image`` does to the pixels of a loaded image; UserError for floating-point pixels."""
    return _converted(image.copy(), in_chans)


def _converted(image: Image.Image, in_chans: int) -> Image.Image:
    """``convert_image`` of an image that nobody else has: it may be changed, and comes back where nothing has to be."""
    if in_chans not in (1, 3):
        raise UserError(f"in_chans is {in_chans}: images are read with 1 channel (grey) or 3 (RGB)")
    ImageOps.exif_transpose(image, in_place=True)  # else it copies an upright image, at 12 megapixels for 20 ms
    if image.mode in _SIXTEEN_BITS:
        pixels = np.asarray(image).clip(0, 65535).astype(np.uint32)
        pixels += 128
        pixels //= 257  # 65535 = 257 * 255, rounded to nearest
        image = Image.fromarray(pixels.astype(np.uint8))
    elif image.mode == "F":
        raise UserError("floating-point pixels have no fixed range; save the image with 8 or 16 bits a channel")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    mode = "L" if in_chans == 1 else "RGB"
    # Images of other formats may keep their open file; they are copied.
    return image if image.mode == mode and type(image) is JpegImageFile else image.convert(mode)


def image_files(path: Path) -> list[Path]:
    """An image file itself, or all of a folder and of those below it; raises UserError where there is none.

    Files of a folder that are no images are passed over, and the log says how many. Links with the name of an image
    that lead nowhere are among the files, so that they are not passed over too.
    """
    if path.is_dir():
        found = find_images([str(path)])
        for note in notes_on(found):
            _log.warning(f"{path}: {note}")
        if files := sorted(map(Path, [*found.images[0], *found.broken])):
            return files
        raise UserError(f"folder {path} holds no images (png, jpg, ...)")
    if not path.exists():
        raise UserError(f"no image at {path}; name image files, or folders of them")
    return [path]
