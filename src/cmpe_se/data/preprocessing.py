"""From an image to the tensor that a network was trained on: one description, kept with the run."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, cached_property
from os import PathLike
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.transforms import str_to_pil_interp
from torch import Tensor
from torchvision.transforms import Compose

from cmpe_se.data.reading import convert_image, read_image
from cmpe_se.errors import UserError

KEY = "cmpe_se_preprocessing"
"""Name of ``Preprocessing.to_dict`` in a saved network's ``config.json``, beside timm's keys, and in exported files."""

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
RESIZE = "shorter_side"
RESIZES = (RESIZE, "fit")
_PHOTO_CROP = 0.875  # timm's and torchvision's: 224 of 256 pixels
_MODES = {1: "L", 3: "RGB"}
_MOST_PIXELS = 100_000_000  # of an image between resizing and cropping: 0.3 GB


@dataclass(frozen=True)
class Preprocessing:
    """What makes a network's input of an image; the same for training data, tests, predictions and exported files.

    An image is resized, cropped at the centre, and normalised. With ``crop`` 1 an image of the right size is left as it
    is: so are all images of a data set that has one size, such as CIFAR, while others can still be predicted.

    Args:
        classes: names of the network's outputs.
        size: (channels, height, width) of a network's input; 1 channel is grey, 3 are RGB.
        mean: mean of each channel, pixels in [0, 1].
        std: standard deviation of each channel, pixels in [0, 1].
        interpolation: of the resizing, one of ``INTERPOLATIONS``.
        crop: part of the resized image's shorter side that the crop takes, above 0 and at most 1.
        resize: how an image is brought to ``size``. ``shorter_side`` is timm's way: the whole image is scaled until its
            shorter side is that of ``size`` / ``crop``, then cropped in whole pixels. ``fit`` is what class folders in
            memory had at first: the largest part of the right shape is scaled (``PIL.ImageOps.fit``), which differs by
            parts of a pixel. timm's own loaders cannot repeat it, and only runs of that time have it.

    Raises:
        UserError: a value that cannot be used.
    """

    classes: tuple[str, ...]
    size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop: float = 1.0
    resize: str = RESIZE

    def __post_init__(self) -> None:
        for name in ("classes", "size", "mean", "std"):  # lists, as JSON has them, could not be compared or hashed
            if not isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, tuple(value))
        for name, valid, right in _RULES:
            if not valid(self):
                raise UserError(f"preprocessing: {name} is {getattr(self, name)!r}, should be {right}")

    @classmethod
    def of_photos(cls, classes: tuple[str, ...], side: int, crop: float | None = None) -> "Preprocessing":
        """Of photos of any shape as networks for ImageNet take them: RGB, square, ImageNet's mean and deviation.

        Args:
            classes: names of the network's outputs.
            side: of the square in pixels.
            crop: as of the class; 0.875 if left out.
        """
        size, crop = (3, side, side), _PHOTO_CROP if crop is None else crop
        return cls(classes, size, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, crop=crop)

    def of_side(self, side: int | None) -> "Preprocessing":
        """The same for squares of another side in pixels; None leaves it as it is."""
        return self if side is None else replace(self, size=(self.size[0], side, side))

    def read(self, path_or_file: str | PathLike | BinaryIO) -> Tensor:
        """The pixels of an image file, uint8 (C, H, W); UserError as of ``read_image`` and ``pixels``."""
        image = read_image(path_or_file, in_chans=self.size[0])
        try:
            return self.pixels(image)
        except UserError as error:
            raise UserError(f"{getattr(path_or_file, 'name', path_or_file)}: {error}") from None

    def pixels(self, image: Image.Image) -> Tensor:
        """An image resized and cropped, uint8 (C, H, W).

        It is taken as ``read_image`` gives it: upright. RGB becomes grey, and grey RGB, where the network needs that.

        Raises:
            UserError: an image so long and narrow that resizing it would take gigabytes.
        """
        channels, height, width = self.size
        if image.mode != _MODES[channels]:
            image = convert_image(image, in_chans=channels)
        if image.size == (width, height) and self.crop == 1:
            return pixels_of(image)
        if self.resize == "fit":
            return pixels_of(ImageOps.fit(image, (width, height), str_to_pil_interp(self.interpolation)))
        self._refuse_narrow(image)
        return pixels_of(self._transform(image))

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels, uint8 (..., C, H, W) on any device, to float32 of the same shape: (pixels / 255 - mean) / std."""
        mean, std = _statistics(self.mean, self.std, pixels.device)
        return pixels.to(torch.float32).sub_(mean).div_(std)

    def __call__(self, image: Image.Image) -> Tensor:
        """An image to a network's input, float32 (C, H, W)."""
        return self.normalise(self.pixels(image))

    @cached_property
    def _transform(self) -> Callable[[Image.Image], Any]:
        transform: Any = create_transform(
            self.size, is_training=False, interpolation=self.interpolation, crop_pct=self.crop, normalize=False
        )
        return Compose(transform.transforms[:-1])  # the last makes a tensor, and pixels_of does it faster

    def _refuse_narrow(self, image: Image.Image) -> None:
        _, height, width = self.size
        scale = max(height / image.height, width / image.width) / self.crop
        if scale**2 * image.width * image.height > _MOST_PIXELS:
            raise UserError(
                f"{image.width}x{image.height} pixels are too long and narrow to scale to {width}x{height}; crop the "
                "image"
            )

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON has them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Any, where: str) -> "Preprocessing":
        """What ``to_dict`` gave.

        Args:
            values: read from JSON.
            where: they stand, for messages.

        Raises:
            UserError: a value that is missing, unknown, or of the wrong kind.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(values, Mapping):
            raise UserError(f"{where}: preprocessing is {values!r}, should be an object with {', '.join(names)}")
        if missing := [name for name in names if name not in values]:
            raise UserError(f"{where}: preprocessing lacks {', '.join(missing)}; it has to have {', '.join(names)}")
        if unknown := [name for name in values if name not in names]:
            raise UserError(
                f"{where}: preprocessing has {', '.join(map(str, unknown))}, which this version does not support; it "
                f"supports {', '.join(names)}"
            )
        try:
            return cls(**values)
        except (UserError, TypeError) as error:  # TypeError: a number where a list should be
            raise UserError(f"{where}: {error}") from None

    def to_timm(self) -> dict[str, Any]:
        """The same in the words of timm's ``pretrained_cfg``, which have none for ``fit``."""
        return {
            "input_size": self.size,
            "mean": self.mean,
            "std": self.std,
            "interpolation": self.interpolation,
            "crop_pct": self.crop,
            "crop_mode": "center",
        }

    @classmethod
    def from_timm(cls, config: Mapping[str, Any], where: str, resize: str = RESIZE) -> "Preprocessing":
        """From timm's words, as runs and exported files have them that were written before cmpe_se had its own.

        Raises:
            UserError: a value that is missing or cannot be used.
        """
        if missing := [key for key in _TIMM if key not in config]:
            raise UserError(f"{where} does not say its {', '.join(missing)}")
        return cls.from_dict({name: config[key] for key, name in _TIMM.items()} | {"resize": resize}, where)


_TIMM = {
    "label_names": "classes",
    "input_size": "size",
    "mean": "mean",
    "std": "std",
    "interpolation": "interpolation",
    "crop_pct": "crop",
}


def _numbers(values: tuple, count: int) -> bool:
    return len(values) == count and all(
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) for value in values
    )


_RULES = (
    (
        "classes",
        lambda p: isinstance(p.classes, tuple) and all(isinstance(name, str) for name in p.classes),
        "a list of names",
    ),
    (
        "size",
        lambda p: len(p.size) == 3 and all(type(side) is int and side > 0 for side in p.size) and p.size[0] in _MODES,
        "(channels, height, width) with 1 or 3 channels",
    ),
    ("mean", lambda p: _numbers(p.mean, p.size[0]), "a number for each channel"),
    (
        "std",
        lambda p: _numbers(p.std, p.size[0]) and min(p.std) > 0,
        "a number above 0 for each channel",
    ),
    ("interpolation", lambda p: p.interpolation in INTERPOLATIONS, f"one of {', '.join(INTERPOLATIONS)}"),
    ("crop", lambda p: _numbers((p.crop,), 1) and 0 < p.crop <= 1, "a number above 0 and at most 1"),
    ("resize", lambda p: p.resize in RESIZES, f"one of {', '.join(RESIZES)}"),
    ("crop", lambda p: p.resize != "fit" or p.crop == 1, "1 where resize is fit"),
)


def pixels_of(image: Image.Image) -> Tensor:
    """Mode L or RGB to uint8 (C, H, W); torchvision's ``pil_to_tensor`` takes three times as long."""
    pixels = np.asarray(image)
    return torch.from_numpy(np.array(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1), order="C"))


@cache
def _statistics(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation in pixel units, (C, 1, 1); kept for good, since a CUDA graph may read them."""
    with torch.inference_mode(False):  # a tensor made within could not be used outside
        centre, spread = (torch.tensor(numbers).mul_(255)[:, None, None].to(device) for numbers in (mean, std))
        return centre, spread
