"""The images of a page: examples, and uploaded files."""

import io
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from PIL import Image

from cmpe_se.data import read_image
from cmpe_se.data.photographs import photographs
from cmpe_se.errors import UserError
from cmpe_se.utils.escaping import visible
from cmpe_se.utils.text import shortened

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
"""Pillow's names. Every decoder more is one more to attack; TIFF's tiles may be larger than the image that they say."""
LARGEST_FILE = 10 * 2**20  # bytes of an upload
MOST_PIXELS = 25_000_000  # of an upload: what cameras make; up to 0.4 GB while it is read (16 bits, transparency)
UPLOADS_KEPT = 900  # seconds that an uploaded file is on the disk; the visitor's session has its content by then
_THUMBNAIL = 160  # longest side


class Picture(NamedTuple):
    """An image with what is known of it.

    Args:
        read: gives the image as it is; those of a data set are not kept, and may be large.
        name: for people: a test image's number, or what it is.
        truth: index of its true class among ``classes``, None if unknown.
        predicted: name of the predicted class, if that is wrong.
        classes: names that ``truth`` is of.
        thumbnail: a small copy.
    """

    read: Callable[[], Image.Image]
    name: str
    truth: int | None = None
    predicted: str | None = None
    classes: tuple[str, ...] = ()
    thumbnail: Image.Image | None = None

    @property
    def caption(self) -> str:
        """A few words below a small copy of it."""
        if self.truth is None:
            return self.name
        truth = shortened(self.classes[self.truth])
        # Gradio sends it as JSON, which must be UTF-8.
        return visible(f"{truth} → {shortened(self.predicted)}" if self.predicted else truth)


def thumbnail(image: Image.Image) -> Image.Image:
    """A copy that is small, or the image itself if it is."""
    small = image.copy()
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return small


def read_upload(content: bytes) -> Picture:
    """An uploaded file, if it is of our formats, and neither too long nor too large.

    Raises:
        UserError: it is not.
    """
    if len(content) > LARGEST_FILE:
        raise UserError(f"the uploaded file is larger than {LARGEST_FILE // 2**20} MB; scale the image down")
    file = io.BytesIO(content)
    file.name = "the uploaded file"  # as messages call it
    image = read_image(file, formats=FORMATS, most_pixels=MOST_PIXELS)
    return Picture(lambda: image, "Your image")


def photograph_pictures() -> list[Picture]:
    """Two photographs, for networks whose own test images are not at hand."""
    return [
        Picture(partial(Image.Image.copy, image), name, thumbnail=thumbnail(image)) for name, image in photographs()
    ]
