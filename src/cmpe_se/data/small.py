"""Data sets of small images, held whole in one tensor."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from cmpe_se.data.augmentation import SMALL_FIELDS, Augmentation, augment, draw_places
from cmpe_se.data.interface import Batch, ImageData
from cmpe_se.data.preprocessing import Preprocessing
from cmpe_se.data.seeds import generator


class _Tensors(NamedTuple):
    """A data set on one device."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class SmallImages(ImageData):
    """Images of one size as uint8 tensors, moved to a device once and augmented there a batch at a time.

    Decoding files each epoch starves a small network, on two cores as on a GPU; a batch from here is a few tensor
    operations.

    Args:
        name: the name for messages.
        classes: class names.
        train_images: uint8 (N, C, H, W), C of 1 or 3.
        train_labels: int64 (N,), indices into ``classes``.
        test_images: uint8 (M, C, H, W).
        test_labels: int64 (M,).
        preprocessing: of the images, which have its size already; the training images' own mean and deviation if left
            out.
    """

    augmentation_fields = SMALL_FIELDS

    def __init__(
        self,
        name: str,
        classes: tuple[str, ...],
        train_images: Tensor,
        train_labels: Tensor,
        test_images: Tensor,
        test_labels: Tensor,
        *,
        preprocessing: Preprocessing | None = None,
    ):
        self.name, self.train_size, self.test_size = name, len(train_images), len(test_images)
        self.tested, self.unreadable = f"the test images of {name}", []
        self._host = _Tensors(train_images, train_labels, test_images, test_labels)
        self._on_device = {torch.device("cpu"): self._host}
        _, channels, height, width = train_images.shape
        self.preprocessing = preprocessing or Preprocessing(classes, (channels, height, width), *self.statistics)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Training images and labels, test images and labels: not to be changed in place."""
        return tuple(self._host)  # type: ignore[return-value]  # a NamedTuple of these four

    @cached_property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel of the training images, pixels in [0, 1]."""
        return channel_statistics(self._host.train_images)

    def _on(self, device: torch.device) -> "_Tensors":
        device = torch.empty(0, device=device).device  # "cuda" and "cuda:0" are one place
        if device not in self._on_device:
            self._on_device[device] = _Tensors(*(tensor.to(device) for tensor in self._host))
        return self._on_device[device]

    def plans(
        self, epoch: int, batch_size: int, seed: int, augmentation: Augmentation, start: int = 0
    ) -> Iterator[Tensor]:
        """The plan of each batch of an epoch, on the CPU.

        Yields int64 (B, 6): which image, and where it is cropped, flipped and cut as ``draw_places`` says.
        """
        for batch, copies in self.epoch_indices(epoch, batch_size, seed, start, augmentation.repeated_augmentation):
            indices = copies % self.train_size
            random = generator("augmentation", seed, epoch, batch)
            places = draw_places(len(indices), self.image_size, augmentation, random)
            yield torch.cat([indices[:, None], places], dim=1)

    def planned_batch(self, plan: Tensor, augmentation: Augmentation) -> Batch:
        """The images and labels of a batch's plan, or of some of its rows, on the plan's device."""
        data = self._on(plan.device)
        chosen, removed = augment(data.train_images[plan[:, 0]], plan[:, 1:], augmentation)
        normalised = self.preprocessing.normalise(chosen)
        if removed is not None:
            normalised.masked_fill_(removed, 0.0)
        return normalised, data.train_labels[plan[:, 0]]

    def _train_batches(
        self,
        epoch: int,
        batch_size: int,
        seed: int,
        augmentation: Augmentation,
        start: int,
        rank: int,
        world: int,
        device: torch.device,
    ) -> Iterator[Batch]:
        # Drawn for the whole batch, so that each rank's rows are what one process alone would have given them.
        for plan in self.plans(epoch, batch_size, seed, augmentation, start):
            yield self.planned_batch(plan[rank::world].to(device, non_blocking=True), augmentation)

    def _test_batches(self, rank_batch_size: int, rank: int, world: int, device: torch.device) -> Iterator[Batch]:
        data = self._on(device)
        images, labels = data.test_images[rank::world], data.test_labels[rank::world]
        for first in range(0, len(images), rank_batch_size):
            part = slice(first, first + rank_batch_size)
            yield self.preprocessing.normalise(images[part]), labels[part].clone()

    def _test_pixels(self, batch_size: int) -> Iterator[Batch]:
        return zip(self._host.test_images.split(batch_size), self._host.test_labels.split(batch_size), strict=True)

    def train_labels(self) -> Tensor:
        """See ``ImageData.train_labels``."""
        return self._host.train_labels

    def held_out(self, indices: Tensor) -> tuple["SmallImages", "SmallImages"]:
        """See ``ImageData.held_out``."""
        data = self._host
        kept = torch.ones(self.train_size, dtype=torch.bool).index_fill(0, indices, False)
        train = data.train_images[kept], data.train_labels[kept]
        held = data.train_images[indices], data.train_labels[indices]
        return self._with(*train, data.test_images, data.test_labels), self._with(*train, *held)

    def _with(self, *tensors: Tensor) -> "SmallImages":
        return SmallImages(self.name, self.classes, *tensors, preprocessing=self.preprocessing)

    def test_examples(self, indices: Sequence[int]) -> Iterator[tuple[Image.Image, int]]:
        """See ``ImageData.test_examples``."""
        for index in indices:
            yield _image(self._host.test_images[index]), int(self._host.test_labels[index])


class TensorSource:
    """Items of (image, class index), for ``LargeImages``: images that a network takes at another size than they have.

    Args:
        images: uint8 (N, C, H, W).
        labels: int64 (N,).
    """

    def __init__(self, images: Tensor, labels: Tensor):
        self._images, self.labels = images, labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return _image(self._images[index]), self.labels[index]


def _image(pixels: Tensor) -> Image.Image:
    """uint8 (C, H, W) to mode L or RGB."""
    return Image.fromarray((pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)).numpy())


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 images (N, C, H, W), exactly: by counting the 256 values."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.reshape(-1), minlength=256).double() / channel.numel()
        mean = (share * values).sum()
        std = (share * (values - mean).square()).sum().sqrt()
        means.append(mean.item())
        stds.append(std.item() or 1.0)  # a channel of one value has nothing to scale
    return tuple(means), tuple(stds)
