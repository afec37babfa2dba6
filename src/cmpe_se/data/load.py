"""``load_data``: a name to an ``ImageData``."""

import os
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch

from cmpe_se.data.class_files import Listing
from cmpe_se.data.decoding import decode
from cmpe_se.data.folders import common_size, scan_class_folders, scan_hold_out
from cmpe_se.data.image_files import broken_link
from cmpe_se.data.interface import ImageData, Unreadable
from cmpe_se.data.large import FileSource, LargeImages, Renumbered, joined, labels_of
from cmpe_se.data.named import TORCHVISION, load_digits, load_torchvision
from cmpe_se.data.preprocessing import RESIZE, Preprocessing
from cmpe_se.data.readers import DataOptions, open_hugging_face
from cmpe_se.data.shards import load_web_dataset, refuse_url
from cmpe_se.data.small import SmallImages, TensorSource, channel_statistics
from cmpe_se.data.splits import places_of
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
    test_image_size: int | None = None,
    test_crop: float | None = None,
    in_memory: bool = True,
    preprocessing: Preprocessing | None = None,
    resize: str = RESIZE,
    workers: int = 2,
    options: DataOptions | None = None,
    listing: Listing | None = None,
    hold_out: bool = False,
    skip_unreadable: bool = False,
) -> ImageData:
    """Loads a data set by name.

    - ``digits``: scikit-learn's 8x8 grey digits, 1,437 for training and 360 for the test. Needs no files.
    - ``cifar10``, ``cifar100``, ``svhn``, ``fashion_mnist``: torchvision's, in ``data_dir`` (by default ``data``);
      ``svhn_extra`` is SVHN with its extra set among the training images.
    - ``folder``: ``data_dir``/train/<class>/ and ``data_dir``/test/<class>/ (or training, testing, val, valid,
      validation, in any case); or ``data_dir``/<class>/, of which a fixed fifth of each class becomes the test part.
      Held in memory (``SmallImages``) when ``image_size`` is 96 or less, or when it is left out and the images are all
      of one size of at most 96 pixels a side, and when the whole takes at most 4 GiB. Otherwise ``LargeImages``.
    - ``imagenet``: ``data_dir``/train/<class>/ and ``data_dir``/val/<class>/, always ``LargeImages``.
    - ``hfds/NAME``: a Hugging Face data set, or the path of a local folder of parquet files or images in NAME;
      ``data_dir`` is where ``datasets`` keeps it, or a folder that has its Parquet files: nothing is fetched then. It
      fetches what is not there, whatever ``download`` says. The test part is the split test, or validation where the
      test has no labels or is not there. Held in memory as ``folder``.
    - ``wds/NAME``: WebDataset shards with timm's ``_info.json`` in ``data_dir``, or in the folder NAME.

    Args:
        name: one of the above.
        data_dir: folder of the data.
        download: fetch torchvision's data sets where they are missing.
        image_size: side of the square images of a batch, for all but digits and torchvision's. Without it images held
            in memory keep their size, and large ones are brought to 224.
        test_image_size: side of the images of a test, where training has another.
        test_crop: part of the resized image's shorter side that the crop of a test takes; 0.875 without.
        in_memory: hold small images in memory, but for digits and torchvision's, which always are. Those that are
            cropped for tests in another way than for training are not: give False with either of the two above, and
            with the preprocessing that came of them.
        preprocessing: a run's, for these images too whatever their kind and size: then they are what `cmpe-se predict`
            makes of their files. The class names are the data set's own all the same. Takes the place of
            ``test_image_size``, ``test_crop`` and ``resize``; ``image_size`` is that of training images then, without
            ``in_memory``, and the preprocessing's where it is left out.
        resize: as of ``Preprocessing``, for images that are held in memory and not of a fixed size.
        workers: processes that decode images; 0 decodes in the calling process.
        options: names of columns and splits where they are not the usual ones.
        listing: what a run has kept of its class folders, for the same images again.
        hold_out: the data are only tested on, by a network with ``preprocessing``. Then all images of class folders are
            test images where there is no part for the test (H/<class>/), and the training part is empty.
        skip_unreadable: pass over test images that cannot be used, and list them as ``unreadable``.

    Raises UserError in one line for an unknown name, missing data and images that cannot be used.
    """
    options = options or DataOptions()
    for key, side in (("image_size", image_size), ("test_image_size", test_image_size)):
        if side is not None and side < 1:
            raise UserError(f"{key} is {side}: give a number of pixels, such as 32 or 224")
    if workers < 0:
        raise UserError(f"workers is {workers}: give a number of processes, 0 or more")
    for key, value in (("test_image_size", test_image_size), ("test_crop", test_crop)):
        if value is not None and preprocessing is not None:
            raise UserError(f"{key} is {value}, but preprocessing has its own; leave one of them out")
        if value is not None and is_fixed_size(name):
            raise UserError(f"{key} is {value}, but the images of {name} are tested as they are; leave it out")
    if image_size is not None and preprocessing is not None and in_memory:
        raise UserError(f"image_size is {image_size}, but preprocessing has a size; leave one of them out")
    if hold_out and preprocessing is None:
        raise UserError("hold_out data are those of a trained network; give its preprocessing")
    sizes = _Sizes(image_size, test_image_size, test_crop, in_memory)
    wanted = _Wanted(sizes, preprocessing, resize, workers, skip_unreadable, hold_out)
    prefix, _, rest = name.partition("/")
    _refuse_foreign(name, prefix, options)
    if prefix == "hfds" and rest:
        return _load_hugging_face(name, rest, data_dir, wanted, options)
    if prefix == "wds" and rest:
        refuse_url(str(data_dir or rest), f"{name} is at")
        return load_web_dataset(
            name,
            _existing_folder(data_dir or rest),
            create=wanted.of_photos,
            workers=workers,
            train_image_size=wanted.train_image_size,
            train_split=options.train_split,
            test_split=options.test_split,
            known=wanted.known,
            skip_unreadable=skip_unreadable,
        )
    if name in ("folder", "imagenet"):
        return _load_folder(name, _existing_folder(data_dir, name), wanted, options, listing)
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
    return data if preprocessing is None else _as_wanted(data, preprocessing, wanted)


def _refuse_foreign(name: str, prefix: str, options: DataOptions) -> None:
    """Raise UserError for options that this kind of data set does not know."""
    for key, value in options._asdict().items():
        kinds = ("hfds",) if key.endswith("column") else ("folder", "imagenet", "hfds", "wds")
        if value is not None and prefix not in kinds:
            raise UserError(f"{key} is {value}, which is for {', '.join(kinds)} and not for {name}; leave it out")


class _Sizes(NamedTuple):
    """What a caller of ``load_data`` says of the images' sides."""

    image_size: int | None
    test_image_size: int | None
    test_crop: float | None
    in_memory: bool


class _Wanted(NamedTuple):
    """What a caller of ``load_data`` says of the images of a batch."""

    sizes: _Sizes
    preprocessing: Preprocessing | None
    resize: str
    workers: int
    skip_unreadable: bool
    hold_out: bool

    @property
    def train_image_size(self) -> int | None:
        """Side of the training images that are decoded as they are needed; None for that of the preprocessing."""
        return self.sizes.image_size or (None if self.preprocessing else _DEFAULT_SIZE)

    @property
    def known(self) -> tuple[str, ...] | None:
        """The network's classes, where the data are only tested on."""
        return self.preprocessing.classes if self.preprocessing and self.hold_out else None

    def of_photos(self, classes: tuple[str, ...]) -> Preprocessing:
        """For images that are decoded as they are needed."""
        if self.preprocessing is not None:
            return replace(self.preprocessing, classes=classes)
        side = self.sizes.test_image_size or self.sizes.image_size or _DEFAULT_SIZE
        return Preprocessing.of_photos(classes, side, self.sizes.test_crop)

    def one_by_one(self, name: str, classes: tuple[str, ...], train: FileSource, test: FileSource) -> LargeImages:
        """Images that are decoded as they are needed."""
        return LargeImages(
            name,
            train,
            test,
            preprocessing=self.of_photos(classes),
            workers=self.workers,
            train_image_size=self.train_image_size,
            skip_unreadable=self.skip_unreadable,
        )

    def in_memory(self, classes: tuple[str, ...], images: FileSource) -> Preprocessing | None:
        """For images that all are of one size or brought to one, not normalised yet; None where they are not."""
        image_size, test_image_size, test_crop, in_memory = self.sizes
        if not in_memory or (test_image_size, test_crop) != (None, None):
            return None
        if self.preprocessing is not None:
            # Cropped images in memory would be cropped again where one is shown.
            return replace(self.preprocessing, classes=classes) if self.preprocessing.crop == 1 else None
        size = (image_size, image_size) if image_size else common_size(images)
        if size is None:
            return None
        return Preprocessing(classes, (3, *size), mean=(0.0,) * 3, std=(1.0,) * 3, resize=self.resize)


def _as_wanted(data: SmallImages, preprocessing: Preprocessing, wanted: _Wanted) -> ImageData:
    """The images of a fixed size under another preprocessing: as they are where they fit, else one by one."""
    train_images, train_labels, test_images, test_labels = data.tensors
    classes = data.classes
    if wanted.known is not None:
        places = torch.tensor(places_of(classes, wanted.known, data.name))
        classes, train_labels, test_labels = wanted.known, places[train_labels], places[test_labels]
    preprocessing = replace(preprocessing, classes=classes)
    if preprocessing.crop == 1 and preprocessing.size == data.preprocessing.size:
        tensors = train_images, train_labels, test_images, test_labels
        return SmallImages(data.name, classes, *tensors, preprocessing=preprocessing)
    train, test = TensorSource(train_images, train_labels), TensorSource(test_images, test_labels)
    return LargeImages(data.name, train, test, preprocessing=preprocessing, workers=wanted.workers)


def _existing_folder(data_dir: str | Path | None, name: str = "") -> Path:
    if data_dir is None:
        raise UserError(f"{name} needs data_dir: give the folder that holds its images")
    folder = whole_path(data_dir)
    if not folder.exists():
        raise UserError(f"data_dir {folder} does not exist; give the folder that holds the images")
    if not folder.is_dir():
        raise UserError(f"data_dir {folder} is a file; give the folder that holds the images")
    return folder


def _load_hugging_face(
    name: str, path: str, data_dir: str | Path | None, wanted: _Wanted, options: DataOptions
) -> ImageData:
    classes, train, test = open_hugging_face(name, path, data_dir, options, hold_out=wanted.hold_out)
    # Other columns and splits have other images in the same files.
    place = name if options == DataOptions() else f"{name} ({', '.join(map(str, options))})"
    files = [*(train.files if train else ()), *test.files]
    known: FileSource = test
    if wanted.known is not None:
        known = Renumbered(test, places_of(classes, wanted.known, name, set(test.labels)))
        classes = wanted.known
    data = _small_or_large(name, classes, train or [], known, wanted, place, files)
    data.tested = f"the split {test.split} of {name}"
    return data


def _load_folder(name: str, root: Path, wanted: _Wanted, options: DataOptions, listing: Listing | None) -> ImageData:
    roles = ("test", "val") if name == "folder" else ("val",)
    if wanted.known is not None:
        roles = roles if name == "folder" else ("val", "test")
        folders = scan_hold_out(root, wanted.known, roles, test_split=options.test_split)
    else:
        folders = scan_class_folders(
            root,
            roles,
            train_split=options.train_split,
            test_split=options.test_split,
            listing=listing,
            skip_broken=wanted.skip_unreadable,
        )
    train, test = folders.train, folders.test
    data: ImageData
    if name == "imagenet":
        data = wanted.one_by_one(name, folders.classes, train, test)
    else:
        paths = [os.path.abspath(path) for path, _ in train + test]
        data = _small_or_large(name, folders.classes, train, test, wanted, str(root.absolute()), paths)
    data.folders, data.tested = folders, folders.tested
    data.unreadable += [Unreadable(link, broken_link(link)) for link in folders.broken]
    return data


def _small_or_large(
    name: str,
    classes: tuple[str, ...],
    train: FileSource,
    test: FileSource,
    wanted: _Wanted,
    place: str,
    files: Sequence[str],
) -> ImageData:
    """Images of one small size as tensors, others as they are; ``place`` and ``files`` say where they come from."""
    small = wanted.in_memory(classes, joined(train, test))
    count = len(train) + len(test)
    if small is None or max(small.size) > _SMALL_SIDE or count * prod(small.size) > _SMALL_BYTES:
        return wanted.one_by_one(name, classes, train, test)
    resize = wanted.sizes.image_size is not None or wanted.preprocessing is not None
    bad: dict[int, Unreadable] | None = {} if wanted.skip_unreadable else None
    images = decode(train, test, small, resize=resize, workers=wanted.workers, name=place, files=files, unreadable=bad)
    train_images, test_images = images
    train_labels, test_labels = (torch.tensor(labels_of(part), dtype=torch.int64) for part in (train, test))
    if wanted.preprocessing is None:
        mean, std = channel_statistics(train_images)
        small = replace(small, mean=mean, std=std)
    unreadable = {index - len(train): image for index, image in (bad or {}).items() if index >= len(train)}
    if unreadable:
        good = [index for index in range(len(test)) if index not in unreadable]
        test_images, test_labels = test_images[good], test_labels[good]
    data = SmallImages(name, classes, train_images, train_labels, test_images, test_labels, preprocessing=small)
    data.unreadable += unreadable.values()
    return data
