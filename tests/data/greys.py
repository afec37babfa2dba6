"""Images that can be told from each other, for data sets that hold them as bytes."""

import io

from PIL import Image

from cmpe_se.data import Augmentation, Preprocessing

PLAIN = Augmentation(scale=(1.0, 1.0), ratio=(1.0, 1.0))


def grey(index, side=120):
    """The image with the number ``index``: all of one grey, so that it can be told from the others."""
    return Image.new("RGB", (side, side), (index * 4,) * 3)


def index_of(images):
    """Which numbers a batch of unchanged images holds."""
    return (((images[:, 0, 5, 5] * 0.229 + 0.485) * 255).round() / 4).int().tolist()


def encoded(image, kind="png"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def network(*classes):
    """The preprocessing of a network of these classes."""
    return Preprocessing.of_photos(classes, 32)
