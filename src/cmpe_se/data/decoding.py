"""Decodes small images into tensors, once: later runs find them in a cache file."""

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from rich.console import Console
from rich.progress import Progress
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cmpe_se.data.large import FileSource, joined
from cmpe_se.data.preprocessing import Preprocessing
from cmpe_se.data.reading import read_image
from cmpe_se.errors import UserError
from cmpe_se.utils.tensor_files import load_tensors, save_tensors

_CHUNK = 256
_FORMAT = 2  # part of the cache's key: count it up when the same files come to decode to other pixels

_log = logging.getLogger(__name__)


def decode(
    train: FileSource,
    test: FileSource,
    preprocessing: Preprocessing,
    *,
    resize: bool,
    workers: int,
    name: str,
    files: Sequence[str],
) -> tuple[Tensor, Tensor]:
    """Training and test images as uint8 (N, C, H, W), from the cache or else decoded and put there.

    Without ``resize`` an image of another size than ``preprocessing`` has is an error. The cache belongs to ``name``,
    to what ``preprocessing`` makes of pixels, and to the names, sizes and times of ``files``, where the images are;
    without any there is none. Raises one UserError for all images that cannot be used, which names the first.
    """
    # Images that all have the size already are the same with and without: a run's test finds what its training cached.
    kinds = (False, True) if resize else (False,)
    caches = [_cache_file(name, files, preprocessing, kind) for kind in kinds] if files else []
    counts = len(train), len(test)
    for cache in caches:
        if cached := _read_cache(cache, [(count, *preprocessing.size) for count in counts]):
            return cached
    images, errors = [], []
    chunks = _Chunks(joined(train, test), preprocessing, resize)
    # Chunks rather than images go through the loader: one small image is less work than handing it over.
    loader = DataLoader(
        chunks, batch_size=None, num_workers=min(workers, len(chunks) // 4), generator=torch.Generator()
    )
    for part, part_errors in _with_progress(loader, len(chunks), f"Decoding {name}"):
        images.append(part)
        errors += part_errors
    if len(errors) > 1:
        raise UserError(f"{len(errors)} of {sum(counts)} images in {name} cannot be used; the first: {errors[0]}")
    if errors:
        raise UserError(errors[0])
    train_images, test_images = torch.cat(images).split(counts)
    if caches:
        _write_cache(caches[-1], train_images, test_images)
    return train_images, test_images


class _Chunks(Dataset):
    """Files in pieces: item i is the images of piece i, uint8 (n, C, H, W), and the messages of bad files."""

    def __init__(self, files: FileSource, preprocessing: Preprocessing, resize: bool):
        self.files, self.preprocessing, self.resize = files, preprocessing, resize

    def __len__(self) -> int:
        return -(-len(self.files) // _CHUNK)

    def __getitem__(self, index: int) -> tuple[Tensor, list[str]]:
        places = range(index * _CHUNK, min((index + 1) * _CHUNK, len(self.files)))
        pixels, errors = torch.zeros(len(places), *self.preprocessing.size, dtype=torch.uint8), []
        for row, place in zip(pixels, places, strict=True):
            try:
                row.copy_(self._decode(self.files[place][0]))
            except UserError as error:
                errors.append(str(error))
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
    console = Console(stderr=True)
    with Progress(console=console, transient=True, auto_refresh=False, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=total, visible=False)
        for item in items:
            yield item
            progress.update(task, advance=1, visible=time.monotonic() - started > 1, refresh=True)


def _cache_file(name: str, files: Sequence[str], preprocessing: Preprocessing, resize: bool) -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cmpe-se"
    # Classes, mean and deviation change no pixel, and the last two are known only once the images are decoded.
    geometry = [preprocessing.size, preprocessing.interpolation, preprocessing.crop, preprocessing.resize]
    digest = hashlib.sha256(json.dumps([_FORMAT, name, geometry, resize]).encode())
    for path in files:
        status = os.stat(path)
        digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    folder = Path(os.environ.get("CMPE_SE_CACHE") or default)
    return folder / f"{Path(name).name}-{digest.hexdigest()[:32]}.safetensors"


def _read_cache(path: Path, shapes: list[tuple[int, ...]]) -> tuple[Tensor, Tensor] | None:
    if not path.exists():
        return None
    try:
        tensors, _ = load_tensors(path)
        cached = tensors["train"], tensors["test"]
        if [tuple(tensor.shape) for tensor in cached] != shapes or any(
            tensor.dtype != torch.uint8 for tensor in cached
        ):
            raise ValueError("its tensors have other shapes")
        return cached
    except (KeyError, ValueError) as error:
        _log.warning(f"the cache file {path} is not used ({error}); the images are decoded again")
        return None


def _write_cache(path: Path, train: Tensor, test: Tensor) -> None:
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix="writing-", delete=False) as file:
            temporary = Path(file.name)
        save_tensors({"train": train, "test": test}, temporary)
        temporary.replace(path)  # complete or not at all, also for other processes
    except (OSError, SafetensorError) as error:
        _log.warning(
            f"decoded images could not be cached in {path.parent} ({error}); set CMPE_SE_CACHE to another folder"
        )
        if temporary:
            temporary.unlink(missing_ok=True)
