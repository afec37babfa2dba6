"""timm's training transform, cut in two: what worker processes do to an image, and what is done to a whole batch."""

from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import default_collate
from torchvision.transforms import functional as F

from cmpe_se.data.augmentation import Augmentation
from cmpe_se.data.preprocessing import Preprocessing, pixels_of
from cmpe_se.data.reading import REDUCTIONS, ReducedImage, convert_image, read_reduced
from cmpe_se.errors import UserError

File = str | BinaryIO | Image.Image

_LEAST_REDUCTION = 2.0
"""How many times larger than the network's input a crop has to be, on both sides, after it was decoded smaller.

With 2, the pixels of crops of photographs differ from those of a full decode by 0.35 of 255 on average, by 1.2 at most
in the mean over a crop, and by up to 30 in single pixels at edges; with 1, by 1.1, 4.4 and 41; with 3, by 0.2, 0.6 and
17. tests/data/test_train_transform.py holds the bounds."""


class Erased(NamedTuple):
    """Noise in the place of a rectangle of a normalised image, as timm's random erasing puts it there."""

    top: int
    left: int
    noise: Tensor
    """float32 (C, h, w)."""


class TrainPixels(NamedTuple):
    """An image of a training batch that is not normalised yet."""

    pixels: Tensor
    """uint8 (C, H, W)."""
    erased: Erased | None


class TrainBatch(NamedTuple):
    """Images of a training batch that are not normalised yet; tensors alone, as worker processes hand them over."""

    pixels: Tensor
    """uint8 (B, C, H, W)."""
    labels: Tensor
    """int64 (B,)."""
    places: Tensor
    """int64 (K, 5): image, top, left, height and width of each erased rectangle."""
    noise: Tensor
    """float32: the pixels (C, h, w) of all erased rectangles, flattened, one after the other."""


class TrainTransform:
    """timm's random crop, flip, augmentation and erasing, with the random numbers that timm's own transform draws.

    The crop is drawn before the image is decoded, from the size in the file's header. A JPEG file of which the crop is
    at least twice as large as the network's input on both sides even when it is decoded 2, 4 or 8 times smaller is
    decoded so (``read_reduced``). The crop is the same to a part of a pixel; its pixels differ a little. All others are
    those of timm's transform of the whole image.

    Raises UserError for an auto_augment that timm does not know.
    """

    def __init__(self, preprocessing: Preprocessing, augmentation: Augmentation):
        try:
            transform: Any = create_transform(
                preprocessing.size,
                is_training=True,
                mean=preprocessing.mean,
                std=preprocessing.std,
                scale=augmentation.scale,
                ratio=augmentation.ratio,
                hflip=0.5 if augmentation.flip else 0.0,
                color_jitter=augmentation.color_jitter or None,  # type: ignore[arg-type]  # timm takes None for none
                auto_augment=augmentation.auto_augment,
                interpolation=preprocessing.interpolation,
                use_prefetcher=True,  # ends with pixels
            )
        except (AssertionError, KeyError, ValueError, IndexError, TypeError) as error:
            raise UserError(
                f"augmentation: auto_augment is {augmentation.auto_augment!r}, which timm does not support "
                f"({error or type(error).__name__}); examples are 'rand-m9-mstd0.5', 'original' and 'augmix-m3-w3'"
            ) from None
        self._crop, *self._rest = transform.transforms[:-1]  # the last makes a tensor, and pixels_of does it faster
        self._channels = preprocessing.size[0]
        self._erase: Callable[[Tensor], Tensor] | None = None
        if augmentation.random_erasing:
            self._erase = RandomErasing(augmentation.random_erasing, mode="pixel", device="cpu")
            self._canvas = torch.full(preprocessing.size, torch.nan)

    def __call__(self, file: File) -> TrainPixels:
        """An image's pixels as the global generators have it; UserError as of ``read_image``."""
        image = self._cropped(file)
        for change in self._rest:
            image = change(image)
        return TrainPixels(pixels_of(image), self._drawn_erasing())

    def _cropped(self, file: File) -> Image.Image:
        box = _Box(self._crop)
        if isinstance(file, Image.Image):
            image = convert_image(file, in_chans=self._channels)
            box.choose(*image.size)
            return box.cut(ReducedImage(image))
        return box.cut(read_reduced(file, box.choose, in_chans=self._channels))

    def _drawn_erasing(self) -> Erased | None:
        if self._erase is None:
            return None
        canvas = self._erase(self._canvas)
        drawn = ~canvas[0].isnan()
        rows, columns = drawn.any(1).nonzero(), drawn.any(0).nonzero()
        if not len(rows):
            return None
        top, left, bottom, right = int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1
        noise = canvas[:, top:bottom, left:right].clone()
        canvas[:, top:bottom, left:right] = torch.nan
        return Erased(top, left, noise)


class _Box:
    """A random crop of one image: drawn by timm from the size of the upright image, then cut."""

    def __init__(self, crop: Any):
        self._crop = crop

    def choose(self, width: int, height: int) -> int:
        """Draw the crop; how many times smaller the image may be decoded for it."""
        whole = torch.empty(1, height, width, device="meta")  # timm asks an image for its size, and this is none
        self.top, self.left, self.height, self.width = self._crop.get_params(whole, self._crop.scale, self._crop.ratio)
        high, wide = self._crop.size
        spare = min(self.width / wide, self.height / high) / _LEAST_REDUCTION
        return next((scale for scale in REDUCTIONS if spare >= scale), 1)

    def cut(self, reduced: ReducedImage) -> Image.Image:
        """The crop at its final size."""
        image, scale, (across, down) = reduced
        size, interpolation = self._crop.size, self._crop.interpolation
        if scale == 1:
            return F.resized_crop(image, self.top, self.left, self.height, self.width, size, interpolation)
        left, top = self.left / scale + across, self.top / scale + down
        right, bottom = left + self.width / scale, top + self.height / scale
        # Whole pixels first: the filter of a fractional box alone would take in pixels from beside the crop.
        outer = int(left), int(top), min(int(np.ceil(right)), image.width), min(int(np.ceil(bottom)), image.height)
        cut = image.crop(outer)
        inner = left - outer[0], top - outer[1], min(right - outer[0], cut.width), min(bottom - outer[1], cut.height)
        return cut.resize(size[::-1], F.pil_modes_mapping[interpolation], inner)


def collate(samples: Sequence[tuple[TrainPixels, int]]) -> TrainBatch:
    """Images and labels to a batch."""
    images, labels = zip(*samples, strict=True)
    pixels = default_collate([image.pixels for image in images])  # into shared memory where a worker does it
    erased = [(row, image.erased) for row, image in enumerate(images) if image.erased is not None]
    places = [[row, one.top, one.left, *one.noise.shape[1:]] for row, one in erased]
    noise = torch.cat([one.noise.flatten() for _, one in erased]) if erased else torch.empty(0)
    return TrainBatch(pixels, torch.tensor(labels), torch.tensor(places, dtype=torch.int64).reshape(-1, 5), noise)


def finish(batch: TrainBatch, preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
    """Normalised images, float32 (B, C, H, W), and labels of a batch on any device, with ``places`` on the CPU."""
    pixels, labels, places, noise = batch
    images, channels, start = preprocessing.normalise(pixels), pixels.shape[1], 0
    noise = noise.to(images.device, non_blocking=True)
    for row, top, left, height, width in places.tolist():
        end = start + channels * height * width
        images[row, :, top : top + height, left : left + width] = noise[start:end].view(channels, height, width)
        start = end
    return images, labels
