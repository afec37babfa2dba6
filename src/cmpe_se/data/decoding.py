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

import numpy as np
import torch
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import Progress
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cmpe_se.data.large import Source, joined
from cmpe_se.data.reading import read_image
from cmpe_se.errors import UserError

_CHUNK = 256
_FORMAT = 1  # part of the cache's key: count it up when the same files come to decode to other pixels

_log = logging.getLogger(__name__)


def decode(
    train: Source, test: Source, size: tuple[int, int], *, resize: bool, workers: int, name: str, files: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Training and test images as uint8 (N, 3, H, W), from the cache or else decoded and put there.

    ``size`` is (H, W). With ``resize`` images are scaled and cropped at the centre to it; without, another size is an
    error. The cache belongs to ``name`` and to the names, sizes and times of ``files``, where the images are; without
    any there is none. Raises one UserError for all images that cannot be used, which names the first.
    """
    cache = _cache_file(name, files, size, resize) if files else None
    counts = len(train), len(test)
    cached = cache and _read_cache(cache, [(count, 3, *size) for count in counts])
    if cached:
        return cached
    images, errors = [], []
    chunks = _Chunks(joined(train, test), size, resize)
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
    if cache:
        _write_cache(cache, train_images, test_images)
    return train_images, test_images


class _Chunks(Dataset):
    """Files in pieces: item i is the images of piece i, uint8 (n, 3, H, W), and the messages of bad files."""

    def __init__(self, files: Source, size: tuple[int, int], resize: bool):
        self.files, self.size, self.resize = files, size, resize

    def __len__(self) -> int:
        return -(-len(self.files) // _CHUNK)

    def __getitem__(self, index: int) -> tuple[Tensor, list[str]]:
        places = range(index * _CHUNK, min((index + 1) * _CHUNK, len(self.files)))
        pixels, errors = np.zeros((len(places), *self.size, 3), np.uint8), []
        for row, place in zip(pixels, places, strict=True):
            try:
                row[:] = np.asarray(self._decode(self.files[place][0]))
            except UserError as error:
                errors.append(str(error))
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), errors

    def _decode(self, file: str | BinaryIO) -> Image.Image:
        image, (height, width) = read_image(file), self.size
        if image.size == (width, height):
            return image
        if not self.resize:
            name = getattr(file, "name", file)
            raise UserError(
                f"{name} is {image.width}x{image.height} pixels and others are {width}x{height}: give an image_size to "
                "bring all to one size"
            )
        return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)


def _with_progress(items: Iterable, total: int, description: str) -> Iterator:
    """``items``, with a progress bar once they have taken a second, on a terminal."""
    started = time.monotonic()
    console = Console(stderr=True)
    with Progress(console=console, transient=True, auto_refresh=False, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=total, visible=False)
        for item in items:
            yield item
            progress.update(task, advance=1, visible=time.monotonic() - started > 1, refresh=True)


def _cache_file(name: str, files: Sequence[str], size: tuple[int, int], resize: bool) -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cmpe-se"
    digest = hashlib.sha256(json.dumps([_FORMAT, name, size, resize]).encode())
    for path in files:
        status = os.stat(path)
        digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    folder = Path(os.environ.get("CMPE_SE_CACHE") or default)
    return folder / f"{Path(name).name}-{digest.hexdigest()[:32]}.safetensors"


def _read_cache(path: Path, shapes: list[tuple[int, ...]]) -> tuple[Tensor, Tensor] | None:
    if not path.exists():
        return None
    try:
        tensors = load_file(path)
        cached = tensors["train"], tensors["test"]
        if [tuple(tensor.shape) for tensor in cached] != shapes or any(
            tensor.dtype != torch.uint8 for tensor in cached
        ):
            raise ValueError("its tensors have other shapes")
        return cached
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        _log.warning(f"the cache file {path} is not used ({error}); the images are decoded again")
        return None


def _write_cache(path: Path, train: Tensor, test: Tensor) -> None:
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix="writing-", delete=False) as file:
            temporary = Path(file.name)
        save_file({"train": train.contiguous(), "test": test.contiguous()}, temporary)
        temporary.replace(path)  # whole or not at all, whoever else reads or writes it
    except (OSError, SafetensorError) as error:
        _log.warning(
            f"decoded images could not be cached in {path.parent} ({error}); set CMPE_SE_CACHE to another folder"
        )
        if temporary:
            temporary.unlink(missing_ok=True)
