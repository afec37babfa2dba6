"""Decodes small images into tensors, once: later runs find them in a cache file."""

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cmpe_se.data.cache import cache_folder, read_cache, write_cache
from cmpe_se.data.interface import Unreadable
from cmpe_se.data.large import FileSource, joined
from cmpe_se.data.preprocessing import Preprocessing
from cmpe_se.data.reading import read_image
from cmpe_se.data.workers import fetched
from cmpe_se.errors import UserError
from cmpe_se.utils.escaping import for_markup
from cmpe_se.utils.signals import ignore_in_worker
from cmpe_se.utils.terminal import Terminal

_CHUNK = 256
_FORMAT = 2  # part of the cache's key: count it up when the same files come to decode to other pixels


def decode(
    train: FileSource,
    test: FileSource,
    preprocessing: Preprocessing,
    *,
    resize: bool,
    workers: int,
    name: str,
    files: Sequence[str],
    unreadable: dict[int, Unreadable] | None = None,
) -> tuple[Tensor, Tensor]:
    """Training and test images as uint8 (N, C, H, W), from the cache or else decoded and put there.

    Without ``resize`` an image of another size than ``preprocessing`` has is an error. The cache belongs to ``name``,
    to what ``preprocessing`` makes of pixels, and to the names, sizes and times of ``files``, where the images are;
    without any there is none.

    Raises one UserError for all images that cannot be used, which names the first. ``unreadable`` takes them up
    instead, by their place among the training and then the test images; their pixels are 0 then, and are not cached.
    """
    # Images that all have the size already are the same with and without: a run's test finds what its training cached.
    kinds = (False, True) if resize else (False,)
    folder = cache_folder() if files else None
    caches = [_cache_file(folder, name, files, preprocessing, kind) for kind in kinds] if folder else []
    counts = len(train), len(test)
    for cache in caches:
        if cached := read_cache(cache, [(count, *preprocessing.size) for count in counts]):
            return cached
    images, errors = [], []
    chunks = _Chunks(joined(train, test), preprocessing, resize)
    # Chunks rather than images go through the loader: one small image is less work than handing it over.
    loader = DataLoader(
        chunks,
        batch_size=None,
        num_workers=min(workers, len(chunks) // 4),
        generator=torch.Generator(),
        worker_init_fn=ignore_in_worker,
    )
    for part, part_errors in _with_progress(fetched(loader), len(chunks), for_markup(f"Decoding {name}")):
        images.append(part)
        errors += part_errors
    if unreadable is not None:
        unreadable.update(errors)
    elif len(errors) > 1:
        raise UserError(
            f"{len(errors)} of {sum(counts)} images in {name} cannot be used; the first: {errors[0][1].reason}"
        )
    elif errors:
        raise UserError(errors[0][1].reason)
    train_images, test_images = torch.cat(images).split(counts)
    if caches and not errors:
        write_cache(caches[-1], train_images, test_images)
    return train_images, test_images


class _Chunks(Dataset):
    """Files in pieces: item i is the images of piece i, uint8 (n, C, H, W), and the places of bad files among all."""

    def __init__(self, files: FileSource, preprocessing: Preprocessing, resize: bool):
        self.files, self.preprocessing, self.resize = files, preprocessing, resize

    def __len__(self) -> int:
        return -(-len(self.files) // _CHUNK)

    def __getitem__(self, index: int) -> tuple[Tensor, list[tuple[int, Unreadable]]]:
        places = range(index * _CHUNK, min((index + 1) * _CHUNK, len(self.files)))
        pixels, errors = torch.zeros(len(places), *self.preprocessing.size, dtype=torch.uint8), []
        for row, place in zip(pixels, places, strict=True):
            file = self.files[place][0]
            try:
                row.copy_(self._decode(file))
            except UserError as error:
                errors.append((place, Unreadable(str(getattr(file, "name", file)), str(error))))
        return pixels, errors

    def _decode(self, file: str | BinaryIO) -> Tensor:
        if self.resize:
            return self.preprocessing.read(file)
        channels, height, width = self.preprocessing.size
        image = read_image(file, in_chans=channels)
        if image.size != (width, height):
            raise UserError(
                f"{getattr(file, 'name', file)} is {image.width}x{image.height} pixels and others are {width}x{height}:"
                " give an image_size to bring all to one size"
            )
        return self.preprocessing.pixels(image)


def _with_progress(items: Iterable, total: int, description: str) -> Iterator:
    """``items``, with a progress bar once they have taken a second, on a terminal."""
    started = time.monotonic()
    console = Terminal(stderr=True)
    with Progress(console=console, transient=True, auto_refresh=False, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=total, visible=False)
        for item in items:
            yield item
            progress.update(task, advance=1, visible=time.monotonic() - started > 1, refresh=True)


def _cache_file(folder: Path, name: str, files: Sequence[str], preprocessing: Preprocessing, resize: bool) -> Path:
    # Classes, mean and deviation change no pixel, and the last two are known only once the images are decoded.
    geometry = [preprocessing.size, preprocessing.interpolation, preprocessing.crop, preprocessing.resize]
    digest = hashlib.sha256(json.dumps([_FORMAT, name, geometry, resize]).encode())
    for path in files:
        status = os.stat(path)
        # A file's name is bytes, which need not be UTF-8.
        digest.update(os.fsencode(path) + f"\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    # safetensors takes no path that is not UTF-8, and no system a name above 255 bytes.
    readable = re.sub(r"[^\w.-]", "_", Path(name).name, flags=re.ASCII)[:100]
    return folder / f"{readable}-{digest.hexdigest()[:32]}.safetensors"
