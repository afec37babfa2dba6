"""The images that an export is verified, calibrated and tested with."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cmpe_se.data import ImageData, plain_training_batches

_CALIBRATION_BATCH = 32


def first_test_images(data: ImageData, count: int) -> Tensor:
    """Normalised, float32 (count, C, H, W); some of them again where there are too few."""
    images, _ = next(data.test_batches(batch_size=count))
    return images[torch.arange(count) % len(images)]


def random_images(input_size: Sequence[int], count: int) -> Tensor:
    """Noise of mean 0 and deviation 1, as normalised images are, float32 (count, C, H, W); the same every time."""
    return torch.randn(count, *input_size, generator=torch.Generator().manual_seed(0))


def training_batches(data: ImageData, count: int) -> Iterator[Tensor]:
    """At most ``count`` training images without augmentation, normalised, in batches (B, C, H, W)."""
    for images, _ in plain_training_batches(data, count, batch_size=_CALIBRATION_BATCH):
        yield images
