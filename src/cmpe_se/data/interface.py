"""The interface of all data sets, and the order of images in an epoch."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from copy import copy
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from cmpe_se.data.augmentation import Augmentation
from cmpe_se.data.class_files import ClassFolders
from cmpe_se.data.preprocessing import Preprocessing
from cmpe_se.data.seeds import generator
from cmpe_se.errors import UserError

Batch = tuple[Tensor, Tensor]


class Unreadable(NamedTuple):
    """An image that cannot be used."""

    image: str
    """Its path, or other words for where it is."""
    reason: str
    """A sentence that names it too."""


class ImageData(ABC):
    """A data set of labelled images with a training and a test part.

    A training batch is a function of (seed, epoch, batch index) alone: not of earlier batches, of the number of
    processes or workers, or of any global random state. So a run can resume in the middle of an epoch, or on another
    number of processes, and sees the same images bit for bit. ``StreamedImages`` holds to less, and says to what.
    """

    name: str
    """The name it was loaded by."""
    preprocessing: Preprocessing
    """What makes a batch of the images; with the class names, into which a label is an index."""
    train_size: int
    """Number of training images."""
    test_size: int
    """Number of test images."""
    augmentation_fields: tuple[str, ...]
    """The fields of ``Augmentation`` that this kind knows."""
    tested: str
    """Which images the test part is, in words for a sentence."""
    unreadable: list[Unreadable]
    """Test images that were passed over, where that was asked for; complete after a pass over the test images."""
    resume_note: str | None = None
    """What a run that resumes within an epoch should know; None where its batches are the same whatever has changed."""
    folders: ClassFolders | None = None
    """The files of class folders; None for other data."""
    _train_side: int | None = None
    """Side of the training images in pixels, where it is not that of the preprocessing."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a label is an index into them."""
        return self.preprocessing.classes

    @property
    def in_chans(self) -> int:
        """Channels of an image: 1 (grey) or 3 (RGB)."""
        return self.preprocessing.size[0]

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of every image of a batch; of training images see ``train_image_size``."""
        return self.preprocessing.size[1:]

    @property
    def train_image_size(self) -> tuple[int, int]:
        """(height, width) of every training image of a batch, which tests may take larger."""
        return self._training.size[1:]

    @property
    def _training(self) -> Preprocessing:
        """What makes a training batch of the images."""
        return self.preprocessing.of_side(self._train_side)

    def trained_as_tested(self) -> "ImageData":
        """The same data, with training images of the size that tests have."""
        other = copy(self)
        other._train_side = None
        return other

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel, pixels in [0, 1]: a batch is (pixels - mean) / std."""
        return self.preprocessing.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel, pixels in [0, 1]."""
        return self.preprocessing.std

    def steps_per_epoch(self, batch_size: int) -> int:
        """Training batches in an epoch: the last incomplete one is dropped, but there is always at least one."""
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}: it has to be at least 1")
        return max(1, self.train_size // batch_size)

    def train_batches(
        self,
        epoch: int,
        *,
        batch_size: int,
        seed: int,
        augmentation: Augmentation,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
    ) -> Iterator[Batch]:
        """The batches of one training epoch, shuffled and augmented.

        ``batch_size`` counts the images of a step over all ``world`` processes; the process ``rank`` gets the images
        ``rank, rank + world, ...`` of each batch. ``start`` leaves out the first batches of the epoch. A training set
        smaller than ``batch_size`` gives one batch of all of it.

        Yields images, float32 (B, C, H, W), normalised, and labels, int64 (B,), both on ``device``. Raises UserError
        for sizes that do not work out, and for a field of ``augmentation`` that this kind of data set does not know.
        """
        augmentation.only(self.augmentation_fields, f"the images of {self.name}")
        steps = self._check(batch_size, rank, world)
        if min(batch_size, self.train_size) < world:
            raise UserError(
                f"{world} processes cannot share batches of {min(batch_size, self.train_size)} images of {self.name}: "
                f"give a batch_size of at least {world}, or use fewer processes"
            )
        if seed < 0 or epoch < 0:
            raise UserError(f"seed is {seed} and epoch is {epoch}: neither can be negative")
        if not 0 <= start <= steps:
            raise UserError(f"start is {start}: an epoch of {self.name} has the batches 0 to {steps - 1}")
        return self._train_batches(epoch, batch_size, seed, augmentation, start, rank, world, torch.device(device))

    def test_batches(
        self, *, batch_size: int, rank: int = 0, world: int = 1, device: torch.device | str = "cpu"
    ) -> Iterator[Batch]:
        """The test images in order, each exactly once over all processes together, without padding.

        ``batch_size`` counts the images over all processes. The process ``rank`` gets the images ``rank, rank + world,
        ...``, so processes may differ by one image, and by one batch. Yields as ``train_batches`` does.
        """
        self._check(batch_size, rank, world)
        return self._test_batches(-(-batch_size // world), rank, world, torch.device(device))

    def test_pixels(self, *, batch_size: int) -> Iterator[Batch]:
        """The test images in order before they are normalised, for corruptions: as ``test_batches`` of one process.

        Yields images, uint8 (B, C, H, W), and labels, int64 (B,), both on the CPU and not to be changed in place;
        ``preprocessing.normalise`` makes of them what ``test_batches`` yields. Raises UserError for a kind of data set
        that keeps no order (``StreamedImages``).
        """
        self._check(batch_size, 0, 1)
        return self._test_pixels(batch_size)

    def _check(self, batch_size: int, rank: int, world: int) -> int:
        if not 0 <= rank < world:
            raise UserError(f"rank is {rank} of {world}: it has to be from 0 to {world - 1}")
        return self.steps_per_epoch(batch_size)

    def epoch_indices(
        self, epoch: int, batch_size: int, seed: int, start: int, copies: int = 1
    ) -> Iterator[tuple[int, Tensor]]:
        """The epoch's plan from batch ``start`` on: (batch index, training images (batch_size,)).

        An image is its index, and with ``copies`` (repeated augmentation) its index + ``train_size`` * the number of
        the copy, from 0. The copies of an image follow each other, so that processes share them out, and the epoch ends
        after as many images as without: the images that it does not come to are others in each epoch.
        """
        order = torch.randperm(self.train_size, generator=generator("order", seed, epoch))
        if copies > 1:
            images = order[: -(-self.train_size // copies)].repeat_interleave(copies)[: self.train_size]
            order = images + self.train_size * (torch.arange(self.train_size) % copies)
        for batch in range(start, self.steps_per_epoch(batch_size)):
            yield batch, order[batch * batch_size : (batch + 1) * batch_size]

    @abstractmethod
    def train_labels(self) -> Tensor:
        """Labels of the training images, int64 (N,), without decoding one.

        Raises UserError for a kind of data set that does not know them before it reads them (``StreamedImages``).
        """

    @abstractmethod
    def held_out(self, indices: Tensor) -> tuple["ImageData", "ImageData"]:
        """The data set without the training images of ``indices``, and one whose test images they are.

        Args:
            indices: int64 (V,), of training images, ascending.

        Both have the preprocessing of the whole. Raises UserError as ``train_labels`` does.
        """

    @abstractmethod
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
    ) -> Iterator[Batch]: ...

    @abstractmethod
    def _test_batches(self, rank_batch_size: int, rank: int, world: int, device: torch.device) -> Iterator[Batch]: ...

    @abstractmethod
    def _test_pixels(self, batch_size: int) -> Iterator[Batch]: ...

    def test_image(self, index: int) -> Image.Image:
        """The test image ``index`` as it was read (mode L or RGB), for plots."""
        return next(self.test_examples([index]))[0]

    @abstractmethod
    def test_examples(self, indices: Sequence[int]) -> Iterator[tuple[Image.Image, int]]:
        """The test images of ascending ``indices`` as they were read (mode L or RGB), with their labels."""
