"""Data sets of large images, decoded and augmented one by one in worker processes."""

import functools
import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, Protocol

import torch
import torch.multiprocessing as multiprocessing
from PIL import Image
from timm.data import create_transform
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset

from cmpe_se.data.augmentation import LARGE_FIELDS, Augmentation
from cmpe_se.data.interface import Batch, ImageData
from cmpe_se.data.preprocessing import Preprocessing
from cmpe_se.data.reading import convert_image, read_image
from cmpe_se.data.seeds import derive_seed, seeded
from cmpe_se.errors import UserError
from cmpe_se.utils.signals import held, ignore_in_worker

_log = logging.getLogger(__name__)


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
    """

    augmentation_fields = LARGE_FIELDS

    def __init__(self, name: str, train: Source, test: Source, *, preprocessing: Preprocessing, workers: int):
        self.name, self.preprocessing = name, preprocessing
        self.train_size, self.test_size = len(train), len(test)
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
        plan = [batch[rank::world].tolist() for _, batch in self.epoch_indices(epoch, batch_size, seed, start)]
        samples = _Samples(self._train, train_transform(self.preprocessing, augmentation), self.in_chans, (seed, epoch))
        return self._load(samples, plan, device)

    def _test_batches(self, rank_batch_size: int, rank: int, world: int, device: torch.device) -> Iterator[Batch]:
        pixels = self._load_test(range(rank, self.test_size, world), rank_batch_size, device)
        return ((self.preprocessing.normalise(images), labels) for images, labels in pixels)

    def _test_pixels(self, batch_size: int) -> Iterator[Batch]:
        return self._load_test(range(self.test_size), batch_size, torch.device("cpu"))

    def _load_test(self, indices: Sequence[int], batch_size: int, device: torch.device) -> Iterator[Batch]:
        plan = [list(indices[i : i + batch_size]) for i in range(0, len(indices), batch_size)]
        return self._load(_Samples(self._test, self.preprocessing.pixels, self.in_chans), plan, device)

    def _load(self, samples: Dataset, plan: list[list[int]], device: torch.device) -> Iterator[Batch]:
        loader = DataLoader(
            samples,
            batch_sampler=plan,
            num_workers=min(self._workers, len(plan)),
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # else it draws a seed from the global one, which belongs to the caller
            worker_init_fn=ignore_in_worker,
        )
        return batches_on(device, loader)

    def test_examples(self, indices: Sequence[int]) -> Iterator[tuple[Image.Image, int]]:
        """See ``ImageData.test_examples``."""
        return (_read(self._test, index, self.in_chans) for index in indices)


@functools.cache
def _warn_once(message: str) -> None:
    _log.warning(message)


def started(loader: DataLoader) -> Iterator:
    """The batches of ``loader``, whose workers no signal reaches before they ignore it.

    Where the system gives processes nothing to share, as where /dev/shm cannot be written, this one does the work.
    """
    if loader.num_workers:
        try:
            multiprocessing.Event()  # a loader that fails half-way prints a trace as it is deleted
        except OSError as error:
            if isinstance(loader.dataset, IterableDataset):  # whose images depend on the number of workers
                raise UserError(f"no processes can be started to decode images: {error}; give --workers 0") from None
            _warn_once(f"no processes can be started to decode images ({error}): this one decodes them, more slowly")
            loader.num_workers = 0
    with held():
        return iter(loader)


def lost_worker(error: BaseException | None) -> str | None:
    """What to say where a worker of a DataLoader was ended or had no room in shared memory; None of another error.

    PyTorch raises it in the main thread wherever that is, not only where a batch is asked for.
    """
    said = []
    while error is not None:
        said.append(str(error) if isinstance(error, RuntimeError) else "")
        error = error.__cause__ or error.__context__
    if any("shared memory" in text for text in said):  # also what PyTorch says of a bus error
        return (
            "the processes that decode images have no room in shared memory (/dev/shm); make it larger (docker run "
            "--shm-size 2g), or give --workers 0"
        )
    ended = [text for text in said if text.startswith("DataLoader worker")]
    if not ended:
        return None
    signals = [text.split("signal: ")[1].split(".")[0] for text in ended if "signal: " in text]
    how = f"was ended by a signal ({signals[0]})" if signals else "has ended by itself"
    return f"a process that decodes images {how}, perhaps for want of memory; give fewer --workers"


def batches_on(device: torch.device, loader: DataLoader) -> Iterator[Batch]:
    """The batches of ``loader`` moved to ``device``."""
    batches = started(loader)
    while True:
        try:
            images, labels = next(batches)
        except StopIteration:
            return
        except Exception as error:
            # The traceback's frames hold the iterator in a reference cycle; collected as part of one, it waits five
            # seconds for each worker. Without them it ends its workers right here.
            traceback.clear_frames(error.__traceback__)
            del batches
            raise
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


class _Samples(Dataset):
    """Decoded, transformed images; with ``seeds`` the transform's randomness comes from them and the image's index."""

    def __init__(self, source: Source, transform: Transform, in_chans: int, seeds: tuple[int, int] | None = None):
        self.source, self.transform, self.in_chans, self.seeds = source, transform, in_chans, seeds

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = _read(self.source, index, self.in_chans)
        if self.seeds is None:
            try:
                return self.transform(image), label
            except UserError as error:  # which of the files it was, the transform does not know
                file = self.source[index][0]
                raise UserError(f"{getattr(file, 'name', file)}: {error}") from None
        with seeded(derive_seed("sample", *self.seeds, index)):
            return self.transform(image), label


def _read(source: Source, index: int, in_chans: int) -> tuple[Image.Image, int]:
    file, label = source[index]
    if isinstance(file, str):
        return read_image(file, in_chans=in_chans), label
    if isinstance(file, Image.Image):
        return convert_image(file, in_chans=in_chans), label
    with file:
        return read_image(file, in_chans=in_chans), label


def train_transform(preprocessing: Preprocessing, augmentation: Augmentation) -> Transform:
    """timm's training transform: PIL image to normalised float32 (C, H, W). UserError for an unknown auto_augment."""
    try:
        return create_transform(
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
            re_prob=augmentation.random_erasing,
            re_mode="pixel",
        )
    except (AssertionError, KeyError, ValueError, IndexError, TypeError) as error:
        raise UserError(
            f"augmentation: auto_augment is {augmentation.auto_augment!r}, which timm does not support "
            f"({error or type(error).__name__}); examples are 'rand-m9-mstd0.5', 'original' and 'augmix-m3-w3'"
        ) from None
