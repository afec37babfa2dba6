"""Data sets of large images, decoded and augmented one by one in worker processes."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, default_collate

from cmpe_se.data.augmentation import LARGE_FIELDS, Augmentation
from cmpe_se.data.interface import Batch, ImageData, Unreadable
from cmpe_se.data.preprocessing import Preprocessing
from cmpe_se.data.reading import convert_image, read_image
from cmpe_se.data.seeds import derive_seed
from cmpe_se.data.train_transform import TrainBatch, TrainPixels, TrainTransform, collate, finish
from cmpe_se.data.workers import batches_on
from cmpe_se.errors import UserError
from cmpe_se.utils.randomness import random_states_kept, seed_all
from cmpe_se.utils.signals import ignore_in_worker


class Source(Protocol):
    """Items of (path, opened file or image, class index): a list, or a reader of timm's."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[str | BinaryIO | Image.Image, int]: ...


class FileSource(Source, Protocol):
    """A source without images that are decoded already."""

    def __getitem__(self, index: int, /) -> tuple[str | BinaryIO, int]: ...


def joined(train: FileSource, test: FileSource) -> FileSource:
    """The items of both, one after the other."""
    return ConcatDataset([train, test])  # type: ignore[list-item]  # it asks for length and items, as we do


def labels_of(source: Source) -> list[int]:
    """The class index of each item; sources whose items are images keep them apart as ``labels``."""
    known = getattr(source, "labels", None)
    return known if known is not None else [source[index][1] for index in range(len(source))]


class Renumbered:
    """The items of a source with the class index ``places[index]`` in the place of ``index``."""

    def __init__(self, source: FileSource, places: Sequence[int]):
        self._source, self._places = source, places
        self.labels = [places[label] for label in labels] if (labels := getattr(source, "labels", None)) else None

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[str | BinaryIO, int]:
        file, label = self._source[index]
        return file, self._places[label]


Transform = Callable[[Image.Image], Any]
"""An image to what a batch is made of: a tensor, or an array."""


class LargeImages(ImageData):
    """Images of any size: training images cropped at random by timm's transforms, test images as preprocessing says.

    timm's ``create_loader`` is not used: it can neither start in the middle of an epoch nor share out test images
    without repeating some, its random numbers depend on the number of workers, and its data set takes the next image
    for a broken one. PyTorch's DataLoader with the list of batches planned beforehand does all that is asked.

    Args:
        name: the name for messages.
        train: the training images.
        test: the test images.
        preprocessing: of the images, with the class names.
        workers: worker processes; 0 decodes in the calling process.
        train_image_size: side of the training images; the preprocessing's if left out.
        skip_unreadable: pass over test images that cannot be used; after a pass over all test images they are in
            ``unreadable``, and no test images any more.
    """

    augmentation_fields = LARGE_FIELDS

    def __init__(
        self,
        name: str,
        train: Source,
        test: Source,
        *,
        preprocessing: Preprocessing,
        workers: int,
        train_image_size: int | None = None,
        skip_unreadable: bool = False,
    ):
        self.name, self.preprocessing = name, preprocessing
        self._train_side = train_image_size
        self.train_size, self.test_size = len(train), len(test)
        self.tested, self.unreadable, self._skip = f"the test images of {name}", [], skip_unreadable
        self._train, self._test, self._workers = train, test, workers

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
        indices = self.epoch_indices(epoch, batch_size, seed, start, augmentation.repeated_augmentation)
        plan = [batch[rank::world].tolist() for _, batch in indices]
        samples = _TrainSamples(self._train, TrainTransform(self._training, augmentation), (seed, epoch))
        batches = self._load(samples, plan, device, collate_fn=collate)
        return (finish(TrainBatch(*batch), self.preprocessing) for batch in batches)

    def _test_batches(self, rank_batch_size: int, rank: int, world: int, device: torch.device) -> Iterator[Batch]:
        pixels = self._load_test(range(rank, self.test_size, world), rank_batch_size, device)
        return ((self.preprocessing.normalise(images), labels) for images, labels in pixels)

    def _test_pixels(self, batch_size: int) -> Iterator[Batch]:
        return self._load_test(range(self.test_size), batch_size, torch.device("cpu"))

    def _load_test(self, indices: Sequence[int], batch_size: int, device: torch.device) -> Iterator[Batch]:
        plan = [list(indices[i : i + batch_size]) for i in range(0, len(indices), batch_size)]
        samples = _Samples(self._test, self.preprocessing.pixels, self.in_chans)
        if not self._skip:
            return self._load(samples, plan, device)
        return self._load_readable(samples, plan, device)

    def _load(self, samples: Dataset, plan: list[list[int]], device: torch.device, **options: Any) -> Iterator:
        loader = DataLoader(
            samples,
            batch_sampler=plan,
            num_workers=min(self._workers, len(plan)),
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # else it draws a seed from the global one, which belongs to the caller
            worker_init_fn=ignore_in_worker,
            **options,
        )
        return batches_on(device, loader)

    def _load_readable(self, samples: "_Samples", plan: list[list[int]], device: torch.device) -> Iterator[Batch]:
        failures: list[_Failure] = []
        for images, labels, failed in self._load(_Readable(samples), plan, device, collate_fn=_collate_readable):
            failures += failed
            if len(labels):
                yield images, labels
        if failures and sum(map(len, plan)) == self.test_size:
            self.unreadable += [failure.unreadable for failure in failures]
            good = sorted(set(range(self.test_size)) - {failure.place for failure in failures})
            self._test, self.test_size = Subset(self._test, good), len(good)  # type: ignore[arg-type]  # see joined

    def train_labels(self) -> Tensor:
        """See ``ImageData.train_labels``."""
        return torch.tensor(labels_of(self._train))

    def held_out(self, indices: Tensor) -> tuple["LargeImages", "LargeImages"]:
        """See ``ImageData.held_out``."""
        kept = torch.ones(self.train_size, dtype=torch.bool).index_fill(0, indices, False).nonzero().flatten()
        train, held = _part(self._train, kept), _part(self._train, indices)
        return self._with(train, self._test), self._with(train, held)

    def _with(self, train: Source, test: Source) -> "LargeImages":
        return LargeImages(
            self.name,
            train,
            test,
            preprocessing=self.preprocessing,
            workers=self._workers,
            train_image_size=self._train_side,
        )

    def test_examples(self, indices: Sequence[int]) -> Iterator[tuple[Image.Image, int]]:
        """See ``ImageData.test_examples``."""
        return (_read(self._test, index, self.in_chans) for index in indices)


def _part(source: Source, indices: Tensor) -> Source:
    """The items of ``indices``, with their labels apart as :func:`labels_of` looks for them."""
    part: Any = Subset(source, indices.tolist())  # type: ignore[arg-type]  # it asks for length and items, as we do
    labels = labels_of(source)
    part.labels = [labels[index] for index in part.indices]
    return part


class _TrainSamples(Dataset):
    """Training images, each with random numbers that come from ``seeds`` and its index.

    An index beyond the source's length is another copy of an image, as of ``ImageData.epoch_indices``.
    """

    def __init__(self, source: Source, transform: TrainTransform, seeds: tuple[int, int]):
        self.source, self.transform, self.seeds = source, transform, seeds

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, indices: list[int]) -> list[tuple[TrainPixels, int]]:
        """What a DataLoader asks for; putting the generators back takes time, so a batch does it once."""
        with random_states_kept():
            return [self._sample(index) for index in indices]

    def _sample(self, index: int) -> tuple[TrainPixels, int]:
        copy, index = divmod(index, len(self.source))
        file, label = self.source[index]
        seed_all(derive_seed("sample", *self.seeds, index, *([copy] if copy else [])))
        if isinstance(file, str | Image.Image):
            return self.transform(file), label
        with file:
            return self.transform(file), label


class _Samples(Dataset):
    """Decoded, transformed images."""

    def __init__(self, source: Source, transform: Transform, in_chans: int):
        self.source, self.transform, self.in_chans = source, transform, in_chans

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = _read(self.source, index, self.in_chans)
        try:
            return self.transform(image), label
        except UserError as error:  # which of the files it was, the transform does not know
            file = self.source[index][0]
            raise UserError(f"{getattr(file, 'name', file)}: {error}") from None


class _Failure(NamedTuple):
    """A test image that cannot be used, and its index."""

    place: int
    unreadable: Unreadable


class _Readable(Dataset):
    """Samples, with a ``_Failure`` in the place of those that cannot be used."""

    def __init__(self, samples: _Samples):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int] | _Failure:
        try:
            return self.samples[index]
        except UserError as error:
            file = self.samples.source[index][0]
            return _Failure(index, Unreadable(str(getattr(file, "name", file)), str(error)))


def _collate_readable(items: list) -> tuple[Tensor, Tensor, list[_Failure]]:
    failures = [item for item in items if isinstance(item, _Failure)]
    good = [item for item in items if not isinstance(item, _Failure)]
    images, labels = default_collate(good) if good else (torch.empty(0), torch.empty(0, dtype=torch.int64))
    return images, labels, failures


def _read(source: Source, index: int, in_chans: int) -> tuple[Image.Image, int]:
    file, label = source[index]
    if isinstance(file, str):
        return read_image(file, in_chans=in_chans), label
    if isinstance(file, Image.Image):
        return convert_image(file, in_chans=in_chans), label
    with file:
        return read_image(file, in_chans=in_chans), label
