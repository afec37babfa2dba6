"""The images that a page is asked about: examples, and files of strangers."""

import io
from typing import NamedTuple

from PIL import Image
from sklearn.datasets import load_sample_image

from cmpe_se.data import read_image
from cmpe_se.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # Pillow's names; every decoder more is one more to attack
LARGEST_FILE = 10 * 2**20  # bytes of an upload
MOST_PIXELS = 50_000_000  # of an upload: what today's cameras make, 150 MB decoded
UPLOADS_KEPT = 900  # seconds that an uploaded file is on the disk; the visitor's session has its content by then


class Picture(NamedTuple):
    """An image with what is known of it.

    Args:
        image: as it was read.
        name: for people: a test image's number, or what it is.
        truth: name of its true class, None where nobody knows.
        taken_for: name of the class that the network mistakes it for, if it does.
    """

    image: Image.Image
    name: str
    truth: str | None
    taken_for: str | None = None

    @property
    def caption(self) -> str:
        """A few words below a small copy of it."""
        if self.truth is None:
            return self.name
        return f"{self.truth} → {self.taken_for}" if self.taken_for else self.truth


def read_upload(content: bytes) -> Picture:
    """An uploaded file, if it is of our formats, and neither too long nor too large.

    Raises:
        UserError: it is not.
    """
    if len(content) > LARGEST_FILE:
        raise UserError(f"the uploaded file is larger than {LARGEST_FILE // 2**20} MB; scale the image down")
    file = io.BytesIO(content)
    file.name = "the uploaded file"  # as messages call it
    return Picture(read_image(file, formats=FORMATS, most_pixels=MOST_PIXELS), "Your image", None)


def photographs() -> list[Picture]:
    """Two photographs that scikit-learn brings along, for networks whose own test images are not at hand."""
    return [
        Picture(Image.fromarray(load_sample_image(f"{name}.jpg")), f"Photograph of a {what}", None)
        for name, what in (("china", "temple"), ("flower", "flower"))
    ]
