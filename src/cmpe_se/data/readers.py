"""Hugging Face data sets, behind timm's reader."""

import io
import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from timm.data import create_dataset

from cmpe_se.data.splits import choose_splits, role_of
from cmpe_se.errors import UserError
from cmpe_se.utils.text import in_one_line

_log = logging.getLogger(__name__)


class DataOptions(NamedTuple):
    """Which columns and parts of a data set are used, by their names; None for the usual ones."""

    image_column: str | None = None
    """Column of the images (Hugging Face)."""
    label_column: str | None = None
    """Column of the classes (Hugging Face)."""
    train_split: str | None = None
    test_split: str | None = None


def open_hugging_face(
    name: str, path: str, data_dir: str | Path | None, options: DataOptions, *, hold_out: bool = False
) -> tuple[tuple[str, ...], "_HuggingFaceSource | None", "_HuggingFaceSource"]:
    """Class names, training and test part of what ``datasets`` finds at ``path``, on the hub or in a folder.

    ``data_dir`` is where it is kept, or, if it has Parquet files in it or in its subfolders and ``path`` is no folder,
    the data set itself, and then nothing is fetched. It needs a split train and one for the test (``choose_splits``),
    one column of images, and one of classes: ``label``, or the only one of the type ClassLabel; ``options`` name
    others. A ``hold_out`` has no training part.
    """
    if not find_spec("datasets"):
        raise UserError(f"{name} needs the package datasets: pip install 'cmpe-se[hfds]'")
    import datasets

    cache = None if data_dir is None else str(data_dir)
    if cache and not Path(path).exists() and (own := _with_parquet(Path(cache), path)):
        _log.warning(f"{name} is read from the Parquet files in {own}")
        path, cache = str(own), None
    folder = Path(path).resolve()
    kept = Path(cache or "", folder.name).resolve()
    if cache and folder.is_dir() and folder in (kept, *kept.parents):
        raise UserError(
            f"{name}: data_dir is where datasets puts its own copy, and in {cache} that would get in among the images; "
            "give another folder, or leave data_dir out"
        )
    try:
        splits = [str(split) for split in datasets.get_dataset_split_names(path)]
        train_name, test_names = choose_splits(
            name, splits, options.train_split, options.test_split, hold_out=hold_out, slices=True
        )
        first = datasets.load_dataset(path, split=train_name or test_names[0], cache_dir=cache)
        image, label = _columns(name, first.features, options, datasets)
        if train_name:
            _refuse_overlap(name, path, cache, train_name, test_names[0], datasets)
        train = _HuggingFaceSource(name, path, train_name, cache, image, label) if train_name else None
        # The hub's test parts often come without labels, as -1: then the validation part has to do.
        tests = (_HuggingFaceSource(name, path, split, cache, image, label) for split in test_names)
        test = next((source for source in tests if source.labelled), None)
    except UserError:
        raise
    except Exception as error:  # datasets raises errors of its own, of Arrow's and of the hub's
        reason = in_one_line(error)
        raise UserError(
            f"{name}: datasets cannot load {path} ({reason}); give a name on the hub, or a folder of parquet "
            "files or images"
        ) from None
    if test is None or (train and not train.labelled):
        raise UserError(
            f"{name}: the column {label} has to hold class indices from 0 up, for training and for the test; name "
            "another by --label-column"
        )
    if test.split != test_names[0]:
        _log.warning(f"{name}: the split {test.split} is tested, since {test_names[0]} has no labels")
    if train is None:
        return test.names or tuple(map(str, range(test.largest + 1))), None, test
    if train.names != test.names:
        raise UserError(f"{name}: the splits {train.split} and {test.split} name different classes")
    classes = train.names or tuple(map(str, range(max(train.largest, test.largest) + 1)))
    if unseen := sorted(set(test.labels) - set(train.labels)):
        _log.warning(
            f"{name}: the split {train.split} has no images of {len(unseen)} classes of {test.split}, such as "
            f"{classes[unseen[0]]}"
        )
    return classes, train, test


def _with_parquet(folder: Path, name: str) -> Path | None:
    """The folder that holds a data set's Parquet files, of those where people put them; None without.

    They are in the folder itself, in its subfolder ``data`` or of a split, or in a subfolder of the data set's name:
    any other may be another data set's.
    """

    def holds(place: Path) -> bool:
        splits = [part for part in place.iterdir() if part.is_dir() and (part.name == "data" or role_of(part.name))]
        return any(next(part.glob("*.parquet"), None) for part in (place, *splits))

    own = folder / name.rsplit("/", 1)[-1]
    return next((place for place in (own, folder) if place.is_dir() and holds(place)), None)


def _columns(name: str, features: Mapping[str, Any], options: DataOptions, datasets: ModuleType) -> tuple[str, str]:
    """The columns of images and of classes."""
    images = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
    classes = [key for key, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    numbers = [key for key, feature in features.items() if "int" in str(getattr(feature, "dtype", ""))]
    image = _column(name, "image", options.image_column, images, images, list(features))
    usual = ["label"] if "label" in features else classes
    choices = list(dict.fromkeys(classes + numbers))
    return image, _column(name, "label", options.label_column, usual, choices, list(features))


def _column(name: str, kind: str, wanted: str | None, usual: list[str], choices: list[str], columns: list[str]) -> str:
    flag = f"--{kind}-column"
    if wanted is not None:
        if wanted not in choices:
            other = f"is none of its columns {', '.join(columns)}" if wanted not in columns else f"holds no {kind}s"
            raise UserError(f"{name}: {flag} {wanted} {other}; choose one of {', '.join(choices) or 'none'}")
        return wanted
    if len(usual) != 1:
        found = f"choose the one of {kind}s among {', '.join(choices)} by {flag}" if choices else f"none holds {kind}s"
        raise UserError(f"{name} has the columns {', '.join(columns)}; {found}")
    return usual[0]


def _refuse_overlap(name: str, path: str, cache: str | None, train: str, test: str, datasets: ModuleType) -> None:
    """Raise UserError where slices of one split share images."""
    if "[" not in train + test and "+" not in train + test:
        return
    bases = {part.partition("[")[0] for part in (train + "+" + test).split("+")}
    lengths = {base: len(datasets.load_dataset(path, split=base, cache_dir=cache)) for base in bases}
    rows = [
        {
            (one.splitname, row)
            for one in datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
            for row in range(one.from_ or 0, lengths[one.splitname] if one.to is None else one.to)
        }
        for split in (train, test)
    ]
    if shared := len(rows[0] & rows[1]):
        raise UserError(f"{name}: {train} and {test} share {shared} images; name splits that share none")


class _HuggingFaceSource:
    """Items of (opened file, class index), by timm's reader."""

    def __init__(self, name: str, path: str, split: str, cache: str | None, image: str, label: str):
        options: dict[str, Any] = {"split": split, "input_key": image, "target_key": label}
        self.name, self.split = name, split
        self.reader = create_dataset(f"hfds/{path}", root=cache, **options).reader
        labels = np.asarray(self.reader.dataset.with_format("numpy")[label])
        self.labelled = len(labels) > 0 and labels.dtype.kind in "iu" and labels.min() >= 0
        self.largest = int(labels.max()) if self.labelled else -1
        self.labels = labels.tolist()
        self.names = tuple(self.reader.class_to_idx)
        self.files = [file["filename"] for file in self.reader.dataset.cache_files]

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        file, label = self.reader[index]
        if isinstance(file, io.BytesIO):
            file.name = f"image {index} of the split {self.split} of {self.name}"  # for messages, files have theirs
        return file, label
