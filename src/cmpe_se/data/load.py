"""``load_data``: a name to an ``ImageData``."""

import os
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch

from cmpe_se.data.decoding import decode
from cmpe_se.data.folders import ClassFolders, common_size, scan_class_folders
from cmpe_se.data.interface import ImageData
from cmpe_se.data.large import FileSource, LargeImages, joined
from cmpe_se.data.named import TORCHVISION, load_digits, load_torchvision
from cmpe_se.data.preprocessing import RESIZE, Preprocessing
from cmpe_se.data.readers import load_web_dataset, open_hugging_face
from cmpe_se.data.small import SmallImages, TensorSource, channel_statistics
from cmpe_se.errors import UserError
from cmpe_se.utils.files import whole_path

DATA_SETS = ("digits", *TORCHVISION, "folder", "imagenet", "hfds/NAME", "wds/NAME")
"""The names that ``load_data`` knows; NAME stands for a data set's own name or path."""

_SMALL_SIDE = 96
_SMALL_BYTES = 4 * 2**30
_DEFAULT_SIZE = 224


def is_fixed_size(name: str) -> bool:
    """Whether a data set's images have a size of their own, which ``image_size`` cannot change."""
    return name == "digits" or name in TORCHVISION


def load_data(
    name: str,
    data_dir: str | Path | None = None,
    *,
    download: bool = False,
    image_size: int | None = None,
    preprocessing: Preprocessing | None = None,
    resize: str = RESIZE,
    workers: int = 2,
) -> ImageData:
    """Loads a data set by name.

    - ``digits``: scikit-learn's 8x8 grey digits, 1,437 for training and 360 for the test. Needs no files.
    - ``cifar10``, ``cifar100``, ``svhn``, ``fashion_mnist``: torchvision's, in ``data_dir`` (by default ``data``).
    - ``folder``: ``data_dir``/train/<class>/ and ``data_dir``/test/<class>/ (or val, or validation); or
      ``data_dir``/<class>/, of which a fixed fifth of each class becomes the test part. Held in memory
      (``SmallImages``) when ``image_size`` is 96 or less, or when it is left out and the images are all of one size of
      at most 96 pixels a side, and when the whole takes at most 4 GiB. Otherwise ``LargeImages``.
    - ``imagenet``: ``data_dir``/train/<class>/ and ``data_dir``/val/<class>/, always ``LargeImages``.
    - ``hfds/NAME``: a Hugging Face data set, or the path of a local folder of parquet files or images in NAME;
      ``data_dir`` is where ``datasets`` keeps it. It fetches what is not there, whatever ``download`` says. The test
      part is the split test, or validation where the test has no labels or is not there. Held in memory as ``folder``.
    - ``wds/NAME``: WebDataset shards with timm's ``_info.json`` in ``data_dir``, or in the folder NAME.

    Args:
        name: one of the above.
        data_dir: folder of the data.
        download: fetch torchvision's data sets where they are missing.
        image_size: side of the square images of a batch, for all but digits and torchvision's. Without it images held
            in memory keep their size, and large ones are brought to 224.
        preprocessing: a run's, for these images too whatever their kind and size: then they are what `cmpe-se predict`
            makes of their files. The class names are the data set's own all the same. Takes the place of ``image_size``
            and ``resize``.
        resize: as of ``Preprocessing``, for images that are held in memory and not of a fixed size.
        workers: processes that decode images; 0 decodes in the calling process.

    Raises UserError in one line for an unknown name, missing data and images that cannot be used.
    """
    if image_size is not None and image_size < 1:
        raise UserError(f"image_size is {image_size}: give a number of pixels, such as 32 or 224")
    if workers < 0:
        raise UserError(f"workers is {workers}: give a number of processes, 0 or more")
    if image_size is not None and preprocessing is not None:
        raise UserError(f"image_size is {image_size}, but preprocessing has a size; leave one of them out")
    wanted = _Wanted(image_size, preprocessing, resize)
    prefix, _, rest = name.partition("/")
    if prefix == "hfds" and rest:
        classes, train, test = open_hugging_face(name, rest, data_dir)
        return _small_or_large(name, classes, train, test, wanted, workers, name, train.files + test.files)
    if prefix == "wds" and rest:
        root = _existing_folder(data_dir or rest)
        return load_web_dataset(name, root, create=wanted.of_photos, workers=workers)
    if name == "imagenet":
        folders = scan_class_folders(_existing_folder(data_dir, name), ("val", "validation"))
        photos = wanted.of_photos(folders.classes)
        return LargeImages(name, folders.train, folders.test, preprocessing=photos, workers=workers)
    if name == "folder":
        return _load_folder(scan_class_folders(_existing_folder(data_dir, name)), wanted, workers)
    if name == "digits":
        data = load_digits()
    elif name in TORCHVISION:
        data = load_torchvision(name, whole_path(data_dir or "data"), download=download)
    else:
        close = get_close_matches(name, DATA_SETS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UserError(f"there is no data set {name!r}{hint}; there are {', '.join(DATA_SETS)}")
    side = data.image_size[0]
    if image_size not in (None, side):
        raise UserError(f"image_size is {image_size}, but {name} has {side} pixels a side; leave image_size out")
    return data if preprocessing is None else _as_wanted(data, preprocessing, workers)


class _Wanted(NamedTuple):
    """What a caller of ``load_data`` says of the images of a batch."""

    image_size: int | None
    preprocessing: Preprocessing | None
    resize: str

    def of_photos(self, classes: tuple[str, ...]) -> Preprocessing:
        """For images that are decoded as they are needed."""
        if self.preprocessing is not None:
            return replace(self.preprocessing, classes=classes)
        return Preprocessing.of_photos(classes, self.image_size or _DEFAULT_SIZE)

    def in_memory(self, classes: tuple[str, ...], images: FileSource) -> Preprocessing | None:
        """For images that all are of one size or brought to one, not normalised yet; None where they are not."""
        if self.preprocessing is not None:
            # Cropped images in memory would be cropped again where one is shown.
            return replace(self.preprocessing, classes=classes) if self.preprocessing.crop == 1 else None
        size = (self.image_size, self.image_size) if self.image_size else common_size(images)
        if size is None:
            return None
        return Preprocessing(classes, (3, *size), mean=(0.0,) * 3, std=(1.0,) * 3, resize=self.resize)


def _as_wanted(data: SmallImages, preprocessing: Preprocessing, workers: int) -> ImageData:
    """The images of a fixed size under another preprocessing: as they are where they fit, else one by one."""
    preprocessing = replace(preprocessing, classes=data.classes)
    if preprocessing.crop == 1 and preprocessing.size == data.preprocessing.size:
        return SmallImages(data.name, data.classes, *data.tensors, preprocessing=preprocessing)
    train_images, train_labels, test_images, test_labels = data.tensors
    train, test = TensorSource(train_images, train_labels), TensorSource(test_images, test_labels)
    return LargeImages(data.name, train, test, preprocessing=preprocessing, workers=workers)


def _existing_folder(data_dir: str | Path | None, name: str = "") -> Path:
    if data_dir is None:
        raise UserError(f"{name} needs data_dir: give the folder that holds its images")
    folder = whole_path(data_dir)
    if not folder.exists():
        raise UserError(f"data_dir {folder} does not exist; give the folder that holds the images")
    if not folder.is_dir():
        raise UserError(f"data_dir {folder} is a file; give the folder that holds the images")
    return folder


def _load_folder(folders: ClassFolders, wanted: _Wanted, workers: int) -> ImageData:
    train, test = folders.train, folders.test
    root, paths = str(folders.root.absolute()), [os.path.abspath(path) for path, _ in train + test]
    return _small_or_large("folder", folders.classes, train, test, wanted, workers, root, paths)


def _small_or_large(
    name: str,
    classes: tuple[str, ...],
    train: FileSource,
    test: FileSource,
    wanted: _Wanted,
    workers: int,
    place: str,
    files: Sequence[str],
) -> ImageData:
    """Images of one small size as tensors, others as they are; ``place`` and ``files`` say where they come from."""
    small = wanted.in_memory(classes, joined(train, test))
    count = len(train) + len(test)
    if small is None or max(small.size) > _SMALL_SIDE or count * prod(small.size) > _SMALL_BYTES:
        return LargeImages(name, train, test, preprocessing=wanted.of_photos(classes), workers=workers)
    resize = wanted.image_size is not None or wanted.preprocessing is not None
    images = decode(train, test, small, resize=resize, workers=workers, name=place, files=files)
    # A Hugging Face source knows its labels without opening the images that go with them.
    labels = (
        getattr(source, "labels", None) or [source[index][1] for index in range(len(source))]
        for source in (train, test)
    )
    (train_images, test_images), (train_labels, test_labels) = images, map(torch.tensor, labels)
    if wanted.preprocessing is None:
        mean, std = channel_statistics(train_images)
        small = replace(small, mean=mean, std=std)
    return SmallImages(name, classes, train_images, train_labels, test_images, test_labels, preprocessing=small)
