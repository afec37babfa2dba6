"""Decodes a folder of small images into tensors, once: later runs find them in a cache file."""

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import Progress
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cmpe_se.data.folders import ClassFolders, ImageFile
from cmpe_se.data.reading import read_image
from cmpe_se.errors import UserError

_CHUNK = 256
_FORMAT = 1  # part of the cache's key: count it up when the same files come to decode to other pixels

_log = logging.getLogger(__name__)


def decode_folders(
    folders: ClassFolders, size: tuple[int, int], *, resize: bool, workers: int
) -> tuple[Tensor, Tensor]:
    """Training and test images of ``folders`` as uint8 (N, 3, H, W), from the cache or else decoded and put there.

    ``size`` is (H, W). With ``resize`` images are scaled and cropped at the centre to it; without, another size is an
    error. Raises one UserError for all files that cannot be used, which names the first.
    """
    cache = _cache_file(folders, size, resize)
    counts = len(folders.train), len(folders.test)
    cached = _read_cache(cache, [(count, 3, *size) for count in counts])
    if cached:
        return cached
    images, errors = [], []
    chunks = _Chunks(folders.train + folders.test, size, resize)
    # Chunks rather than images go through the loader: one small image is less work than handing it over.
    loader = DataLoader(
        chunks, batch_size=None, num_workers=min(workers, len(chunks) // 4), generator=torch.Generator()
    )
    for part, part_errors in _with_progress(loader, len(chunks), f"Decoding {folders.root}"):
        images.append(part)
        errors += part_errors
    if len(errors) > 1:
        raise UserError(
            f"{len(errors)} of {sum(counts)} images in {folders.root} cannot be used; the first: {errors[0]}"
        )
    if errors:
        raise UserError(errors[0])
    train, test = torch.cat(images).split(counts)
    _write_cache(cache, train, test)
    return train, test


class _Chunks(Dataset):
    """A list of files in pieces: item i is the images of piece i, uint8 (n, 3, H, W), and the messages of bad files."""

    def __init__(self, files: list[ImageFile], size: tuple[int, int], resize: bool):
        self.files, self.size, self.resize = files, size, resize

    def __len__(self) -> int:
        return -(-len(self.files) // _CHUNK)

    def __getitem__(self, index: int) -> tuple[Tensor, list[str]]:
        files = self.files[index * _CHUNK : (index + 1) * _CHUNK]
        pixels, errors = np.zeros((len(files), *self.size, 3), np.uint8), []
        for row, (path, _) in zip(pixels, files, strict=True):
            try:
                row[:] = self._decode(path)
            except UserError as error:
                errors.append(str(error))
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), errors

    def _decode(self, path: str) -> Image.Image:
        image, (height, width) = read_image(path), self.size
        if image.size == (width, height):
            return image
        if not self.resize:
            raise UserError(
                f"{path} is {image.width}x{image.height} pixels and others are {width}x{height}: give an image_size "
                "to bring all to one size"
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


def _cache_file(folders: ClassFolders, size: tuple[int, int], resize: bool) -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cmpe-se"
    root = folders.root.absolute()
    digest = hashlib.sha256(json.dumps([_FORMAT, str(root), size, resize]).encode())
    for path, _ in (*folders.train, *folders.test):
        status = os.stat(path)
        digest.update(f"{os.path.relpath(path, folders.root)}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return Path(os.environ.get("CMPE_SE_CACHE") or default) / f"{root.name}-{digest.hexdigest()[:32]}.safetensors"


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
