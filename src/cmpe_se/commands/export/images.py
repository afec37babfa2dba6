"""The images that an export is verified, calibrated and tested with."""

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from cmpe_se.data import Augmentation, ImageData, SmallImages

_CALIBRATION_BATCH = 32


def first_test_images(data: ImageData, count: int) -> Tensor:
    """Normalised, float32 (count, C, H, W); some of them again where there are too few."""
    images, _ = next(data.test_batches(batch_size=count))
    return images[torch.arange(count) % len(images)]


def random_images(input_size: Sequence[int], count: int) -> Tensor:
    """Noise of mean 0 and deviation 1, as normalised images are, float32 (count, C, H, W); the same every time."""
    return torch.randn(count, *input_size, generator=torch.Generator().manual_seed(0))


def training_batches(data: ImageData, count: int) -> Iterator[Tensor]:
    """At most ``count`` training images, drawn evenly, in normalised batches (B, C, H, W).

    They are as they stand in the data set, or, where they are of many sizes, the largest square of each.
    """
    plain = Augmentation() if isinstance(data, SmallImages) else Augmentation(scale=(1.0, 1.0), ratio=(1.0, 1.0))
    batch_size = min(_CALIBRATION_BATCH, count)
    batches = data.train_batches(0, batch_size=batch_size, seed=0, augmentation=plain)
    for images, _ in islice(batches, -(-count // batch_size)):
        yield images[:count]
        count -= len(images)
