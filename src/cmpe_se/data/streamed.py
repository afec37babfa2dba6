"""WebDataset shards, read in sequence through timm's reader."""

import io
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import torch
from PIL import Image
from timm.data import create_dataset
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from cmpe_se.data.augmentation import STREAMED_FIELDS, Augmentation
from cmpe_se.data.image_files import image_suffixes
from cmpe_se.data.interface import Batch, ImageData, Unreadable
from cmpe_se.data.preprocessing import Preprocessing
from cmpe_se.data.reading import convert_image
from cmpe_se.data.seeds import derive_seed, generator
from cmpe_se.data.train_transform import TrainBatch, TrainTransform, collate, finish
from cmpe_se.data.workers import batches_on
from cmpe_se.errors import UserError
from cmpe_se.utils.randomness import seed_all, seeded
from cmpe_se.utils.signals import ignore_in_worker

_log = logging.getLogger(__name__)


class StreamedImages(ImageData):
    """Images in tar shards, for disks and networks that are fast only in sequence; transformed as in ``LargeImages``.

    A stream holds to less than the other kinds:

    - Training batches are a function of (seed, epoch, batch index, rank) for a given number of processes and workers.
      Shards are dealt out to all of these, so other numbers give other batches, and with more than one of them in all
      an epoch may leave some images out and give others twice. ``start`` reads and drops what comes before.
    - Test images come exactly once over all processes, shard by shard: processes may differ by the images of a shard.
    - timm's reader passes over a broken image with a log message. That is an error here at the end of a test, when the
      number of images falls short of what ``_info.json`` says.

    Args:
        name: the name for messages.
        root: folder of the shards and ``_info.json``.
        train_split: name of the training split in ``_info.json``; empty for none.
        test_split: name of the test split.
        preprocessing: of the images, with the class names.
        workers: worker processes; 0 decodes in the calling process.
        train_image_size: side of the training images; the preprocessing's if left out.
        skip_unreadable: count test images that cannot be read instead of refusing them.
        places: class index for each label of the shards, where they are numbered otherwise.
    """

    augmentation_fields = STREAMED_FIELDS
    resume_note = (
        "the shards are read again from the start of this epoch; its other batches are the same to the bit with as "
        "many processes and --workers as before, and with others some of its images come twice and some not at all"
    )

    def __init__(
        self,
        name: str,
        root: Path,
        *,
        train_split: str,
        test_split: str,
        preprocessing: Preprocessing,
        workers: int,
        train_image_size: int | None = None,
        skip_unreadable: bool = False,
        places: Sequence[int] | None = None,
    ):
        self.name, self.preprocessing = name, preprocessing
        self._train_side = train_image_size
        self._class_map = None if places is None else dict(enumerate(places))
        self._root, self._train_split, self._test_split, self._workers = root, train_split, test_split, workers
        self.tested, self.unreadable, self._skip = f"the split {test_split} of {root}", [], skip_unreadable
        self.train_size = len(self._dataset(train_split)) if train_split else 0
        self.test_size = len(self._dataset(test_split))

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
        steps = self.steps_per_epoch(batch_size)
        share = len(range(rank, min(batch_size, self.train_size), world))
        dataset = self._dataset(
            self._train_split, is_training=True, batch_size=share, seed=derive_seed("stream", seed, epoch)
        )
        shards = len(dataset.reader.split_info.filenames)
        if shards < world:
            raise UserError(f"{self.name}: {world} processes need as many training shards, and there are {shards}")
        dataset.reader.dist_rank, dataset.reader.dist_num_replicas = rank, world
        stream = _Stream(dataset, TrainTransform(self._training, augmentation), seed=(seed, epoch, rank))
        # Workers beyond the number of batches would split the images of a data set that makes one batch.
        workers = min(shards // world, steps)
        random = generator("stream", seed, epoch, rank)
        loader = self._loader(stream, share, workers, device, random, collate_fn=collate)
        batches = islice(batches_on(device, loader), start, steps)
        return (finish(TrainBatch(*batch), self.preprocessing) for batch in batches)

    def _test_batches(self, rank_batch_size: int, rank: int, world: int, device: torch.device) -> Iterator[Batch]:
        dataset = self._dataset(self._test_split)
        split = dataset.reader.split_info
        lengths = split.shard_lengths[rank::world]
        split.filenames = split.filenames[rank::world]
        # The reader's own sharing between processes pads and truncates; each process is given its shards instead.
        dataset.reader.dist_rank, dataset.reader.dist_num_replicas = 0, 1
        if not lengths:
            return
        stream = _Stream(dataset, self.preprocessing.read)
        count = 0
        for images, labels in batches_on(device, self._loader(stream, rank_batch_size, len(lengths), device)):
            count += len(labels)
            yield self.preprocessing.normalise(images), labels
        missing = sum(lengths) - count
        if missing > 0 and self._skip:
            reason = f"{missing} of {sum(lengths)} images in the shards cannot be read; the log says why"
            self.unreadable.append(Unreadable(str(self._root), f"{self._root}: {reason}"))
        elif missing:
            raise UserError(
                f"{self.name}: {count} test images could be read where _info.json in {self._root} says {sum(lengths)}; "
                "the log names the broken ones, write the shards again without them"
            )

    def _test_pixels(self, batch_size: int) -> Iterator[Batch]:
        raise UserError(
            f"{self.name}: corruptions need test images in an order of their own, and shards have none; "
            "unpack them into class folders and give --data folder"
        )

    def train_labels(self) -> Tensor:
        """See ``ImageData.train_labels``."""
        raise UserError(
            f"{self.name}: class weights and a validation split need the training labels beforehand, and shards are "
            "read in sequence; unpack them into class folders and give --data folder"
        )

    def held_out(self, indices: Tensor) -> tuple[ImageData, ImageData]:
        """See ``ImageData.held_out``."""
        raise UserError(f"{self.name}: shards are read in sequence, and no image of them can be held out")

    def _dataset(self, split: str, **options: Any) -> Any:
        # An absolute root: webdataset takes what is before a colon in other names for a protocol, or runs a command.
        root = str(self._root.absolute())
        options |= {"input_img_mode": "", "input_key": _input_key(), "class_map": self._class_map}
        return create_dataset("wds/", root=root, split=split, **options)

    def _loader(
        self,
        stream: "_Stream",
        batch_size: int,
        shards: int,
        device: torch.device,
        random: torch.Generator | None = None,
        **options: Any,
    ) -> DataLoader:
        workers = min(self._workers, shards)
        stream.dataset.set_loader_cfg(num_workers=workers)
        return DataLoader(
            stream,
            batch_size=batch_size,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            generator=random or torch.Generator(),
            worker_init_fn=ignore_in_worker,
            **options,
        )

    def test_examples(self, indices: Sequence[int]) -> Iterator[tuple[Image.Image, int]]:
        """See ``ImageData.test_examples``. Reads all test images before the last of them."""
        wanted = set(indices)
        stream = islice(self._dataset(self._test_split), max(wanted, default=-1) + 1)
        return (
            (convert_image(image, in_chans=self.in_chans), label)
            for place, (image, label) in enumerate(stream)
            if place in wanted
        )


def _input_key() -> str:
    """Endings of image members, the first of which that a sample has is its image; timm's own three come first."""
    usual = ["jpg", "png", "webp"]
    return ";".join([*usual, *sorted({suffix[1:] for suffix in image_suffixes()} - {*usual})])


_PIXEL = b"P5 1 1 255 \0"
"""An image for timm's decoder, of which the label alone is wanted."""


class _Stream(IterableDataset):
    """What ``take`` makes of the image files in a timm reader's shards, with their labels.

    timm's reader decodes whole images. Here its decoding is replaced, so that a training image can be decoded at a part
    of its size. A file that ``take`` refuses is passed over with a log message; with ``seed`` random numbers come from
    it and the place among the others.
    """

    def __init__(self, dataset: Any, take: Callable[[BinaryIO], Any], seed: tuple[int, ...] | None = None):
        self.dataset, self.take, self.seed = dataset, take, seed

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        reader = self.dataset.reader
        reader._lazy_init()  # makes the stages; here, since they depend on the worker
        *_, decode, _ = reader.ds.pipeline  # the last renames what it gave
        worker, self._place = get_worker_info(), 0
        self._seeds = None if self.seed is None else (*self.seed, worker.id if worker else 0)
        reader.ds.pipeline[-2] = partial(self._decoded, decode, reader.input_key.split(";"))
        return iter(self.dataset)

    def _decoded(self, decode: Callable, endings: list[str], samples: Iterable[dict]) -> Iterator[dict]:
        for sample in samples:
            content = next((sample[ending] for ending in endings if ending in sample), None)
            # Where there is no label or no image, timm says so in the log.
            labelled = next(iter(decode([sample if content is None else sample | {endings[0]: _PIXEL}])), None)
            if content is None or labelled is None:
                continue
            file = io.BytesIO(content)
            file.name = f"the image {sample['__key__']} in {sample['__url__']}"
            try:
                labelled["jpg"] = self._taken(file)
            except UserError as error:
                _log.warning(f"{error}; it is passed over")
                continue
            self._place += 1
            yield labelled

    def _taken(self, file: BinaryIO) -> Any:
        if self._seeds is None:
            return self.take(file)
        seed = derive_seed("sample", *self._seeds, self._place)
        if get_worker_info() is not None:  # nobody else draws from a worker's generators
            seed_all(seed)
            return self.take(file)
        with seeded(seed):
            return self.take(file)
