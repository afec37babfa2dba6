"""WebDataset shards, read in sequence through timm's reader."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_dataset
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from cmpe_se.data.augmentation import STREAMED_FIELDS, Augmentation
from cmpe_se.data.image_files import image_suffixes
from cmpe_se.data.interface import Batch, ImageData, Unreadable
from cmpe_se.data.large import Transform, at_size, batches_on, train_transform
from cmpe_se.data.preprocessing import Preprocessing
from cmpe_se.data.reading import convert_image
from cmpe_se.data.seeds import derive_seed, generator
from cmpe_se.errors import UserError
from cmpe_se.utils.randomness import seeded
from cmpe_se.utils.signals import ignore_in_worker


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
        self._training = at_size(preprocessing, train_image_size)
        self._class_map = None if places is None else dict(enumerate(places))
        self._root, self._train_split, self._test_split, self._workers = root, train_split, test_split, workers
        self.tested, self.unreadable, self._skip = f"the split {test_split} of {root}", [], skip_unreadable
        self.train_size = len(self._dataset(train_split)) if train_split else 0
        self.test_size = len(self._dataset(test_split))

    @property
    def train_image_size(self) -> tuple[int, int]:
        """See ``ImageData.train_image_size``."""
        return self._training.size[1:]

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
        transform = train_transform(self._training, augmentation)
        stream = _Stream(dataset, transform, self.in_chans, seed=(seed, epoch, rank))
        # Workers beyond the number of batches would split the images of a data set that makes one batch.
        loader = self._loader(
            stream, share, min(shards // world, steps), device, generator("stream", seed, epoch, rank)
        )
        return islice(batches_on(device, loader), start, steps)

    def _test_batches(self, rank_batch_size: int, rank: int, world: int, device: torch.device) -> Iterator[Batch]:
        dataset = self._dataset(self._test_split)
        split = dataset.reader.split_info
        lengths = split.shard_lengths[rank::world]
        split.filenames = split.filenames[rank::world]
        # The reader's own sharing between processes pads and truncates; each process is given its shards instead.
        dataset.reader.dist_rank, dataset.reader.dist_num_replicas = 0, 1
        if not lengths:
            return
        stream = _Stream(dataset, self.preprocessing.pixels, self.in_chans)
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


class _Stream(IterableDataset):
    """Transformed images of a timm reader; with ``seed`` the transform's randomness comes from it and the place."""

    def __init__(self, dataset: Any, transform: Transform, in_chans: int, seed: tuple[int, ...] | None = None):
        self.dataset, self.transform, self.in_chans, self.seed = dataset, transform, in_chans, seed

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        worker = get_worker_info()
        for place, (image, label) in enumerate(self.dataset):
            image = convert_image(image, in_chans=self.in_chans)
            if self.seed is None:
                yield self.transform(image), label
                continue
            with seeded(derive_seed("sample", *self.seed, worker.id if worker else 0, place)):
                transformed = self.transform(image)
            yield transformed, label
