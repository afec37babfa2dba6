"""Data sets known by name: scikit-learn's digits and torchvision's small images."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets

from cmpe_se.data.small import SmallImages
from cmpe_se.errors import UserError
from cmpe_se.utils.text import in_one_line


class _Files(NamedTuple):
    """One of torchvision's data sets: its class, the arguments for its parts, and the files it reads, for messages."""

    data_set: Callable[..., Any]
    train: tuple[dict[str, Any], ...]
    test: dict[str, Any]
    files: str


TORCHVISION = {
    "cifar10": _Files(datasets.CIFAR10, ({"train": True},), {"train": False}, "cifar-10-batches-py/data_batch_1"),
    "cifar100": _Files(datasets.CIFAR100, ({"train": True},), {"train": False}, "cifar-100-python/train"),
    "svhn": _Files(datasets.SVHN, ({"split": "train"},), {"split": "test"}, "train_32x32.mat and test_32x32.mat"),
    "svhn_extra": _Files(
        datasets.SVHN,
        ({"split": "train"}, {"split": "extra"}),
        {"split": "test"},
        "train_32x32.mat, extra_32x32.mat and test_32x32.mat",
    ),
    "fashion_mnist": _Files(
        datasets.FashionMNIST,
        ({"train": True},),
        {"train": False},
        "FashionMNIST/raw/train-images-idx3-ubyte (not .gz)",
    ),
}
"""Data sets of torchvision by our name; the training part of ``svhn_extra`` is SVHN's training and extra images."""


def load_digits() -> SmallImages:
    """scikit-learn's 1,797 digits, uint8 (N, 1, 8, 8), split 1,437 to 360 with each digit in proportion."""
    # Only here: scikit-learn takes two seconds to import, and no other data set needs it.
    from sklearn.datasets import load_digits as read_digits
    from sklearn.model_selection import train_test_split

    digits = read_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]  # (N, 1, 8, 8), from 0..16
    labels = digits.target.astype(np.int64)
    parts = train_test_split(pixels, labels, test_size=360, stratify=labels, random_state=0)
    train_images, test_images, train_labels, test_labels = (torch.from_numpy(part) for part in parts)
    classes = tuple(str(name) for name in digits.target_names)
    return SmallImages("digits", classes, train_images, train_labels, test_images, test_labels)


def load_torchvision(name: str, data_dir: Path, *, download: bool) -> SmallImages:
    """One of ``TORCHVISION``, read from ``data_dir`` or, with ``download``, fetched to it."""
    data_set, train_parts, test_part, files = TORCHVISION[name]
    if data_dir.exists() and not data_dir.is_dir():
        raise UserError(f"data_dir {data_dir} is a file; give the folder that holds {files}")
    try:
        *trains, test = (data_set(str(data_dir), download=download, **part) for part in (*train_parts, test_part))
    except (OSError, RuntimeError, ValueError, KeyError, AssertionError, EOFError, pickle.UnpicklingError) as error:
        reason = in_one_line(error)
        if download:
            message = f"{name} could not be downloaded to {data_dir} ({reason}); put {files} there by hand"
        else:
            message = (
                f"{name} is not in {data_dir}, or incomplete: expected {data_dir}/{files}; --download true fetches it"
            )
        raise UserError(message) from None
    classes = tuple(getattr(test, "classes", None) or map(str, range(10)))  # SVHN has digits and no names
    images, labels = (
        torch.cat(tensors) if len(trains) > 1 else tensors[0] for tensors in zip(*map(_tensors, trains), strict=True)
    )
    return SmallImages(name, classes, images, labels, *_tensors(test))


def _tensors(part: Any) -> tuple[Tensor, Tensor]:
    """Images as uint8 (N, C, H, W), and labels; torchvision keeps (N, H, W, C), (N, C, H, W) and (N, H, W)."""
    images = torch.as_tensor(part.data)
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[-1] == 3:
        images = images.permute(0, 3, 1, 2)
    labels = part.labels if hasattr(part, "labels") else part.targets
    return images.contiguous(), torch.as_tensor(labels, dtype=torch.int64)
