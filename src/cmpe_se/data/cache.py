"""Where decoded images are kept, and the files there."""

import logging
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from cmpe_se.utils.files import sweep, written_whole
from cmpe_se.utils.tensor_files import load_tensors, save_tensors

_log = logging.getLogger(__name__)


def cache_folder() -> Path | None:
    """``$CMPE_SE_CACHE``, or ``cmpe-se`` in ``$XDG_CACHE_HOME`` or in ``~/.cache``; None where there is no home."""
    if own := os.environ.get("CMPE_SE_CACHE"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "cmpe-se"
    try:
        return Path.home() / ".cache" / "cmpe-se"
    except RuntimeError:  # HOME is not set, and nobody knows the user
        _log.warning("there is no home folder to cache decoded images in; set CMPE_SE_CACHE to a folder")
        return None


def read_cache(path: Path, shapes: list[tuple[int, ...]]) -> tuple[Tensor, Tensor] | None:
    """uint8 training and test images of ``shapes`` from a file of the cache; None if it is not there, or damaged."""
    try:
        if not path.exists():
            return None
        tensors, _ = load_tensors(path)
        cached = tensors["train"], tensors["test"]
        if [tuple(tensor.shape) for tensor in cached] != shapes or any(
            tensor.dtype != torch.uint8 for tensor in cached
        ):
            raise ValueError("its tensors have other shapes")
        return cached
    except (OSError, KeyError, ValueError) as error:
        _log.warning(f"the cache file {path} is not used ({error}); the images are decoded again")
        return None


def write_cache(path: Path, train: Tensor, test: Tensor) -> None:
    """Keep decoded images for the next time, whole or not at all; go on with a warning where that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        sweep(path.parent, "writing-*")  # of earlier versions
        with written_whole(path) as unfinished:
            save_tensors({"train": train, "test": test}, unfinished)
    except (OSError, SafetensorError) as error:
        _log.warning(
            f"decoded images could not be cached in {path.parent} ({error}); set CMPE_SE_CACHE to another folder"
        )
