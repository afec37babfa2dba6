"""Data sets behind timm's readers: Hugging Face data sets and WebDataset shards."""

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
from timm.data import create_dataset

from cmpe_se.data.preprocessing import Preprocessing
from cmpe_se.data.streamed import StreamedImages
from cmpe_se.errors import UserError
from cmpe_se.utils.text import in_one_line

_TEST_SPLITS = ("test", "validation", "val", "valid")


def open_hugging_face(
    name: str, path: str, data_dir: str | Path | None
) -> tuple[tuple[str, ...], "_HuggingFaceSource", "_HuggingFaceSource"]:
    """Class names, training and test part of what ``datasets`` finds at ``path``, on the hub or in a folder.

    ``data_dir`` is where it is kept. It needs a split train and one of ``_TEST_SPLITS``, one column of images, and one
    of classes: ``label``, or the only one of the type ClassLabel.
    """
    if not find_spec("datasets"):
        raise UserError(f"{name} needs the package datasets: pip install 'cmpe-se[hfds]'")
    import datasets

    cache = None if data_dir is None else str(data_dir)
    folder = Path(path).resolve()
    kept = Path(cache or "", folder.name).resolve()
    if cache and folder.is_dir() and folder in (kept, *kept.parents):
        raise UserError(
            f"{name}: data_dir is where datasets puts its own copy, and in {cache} that would get in among the images; "
            "give another folder, or leave data_dir out"
        )
    try:
        splits = datasets.get_dataset_split_names(path)
        test_names = _test_splits(name, splits)
        image, label = _columns(name, datasets.load_dataset(path, split="train", cache_dir=cache).features, datasets)
        train = _HuggingFaceSource(name, "train", cache, image, label)
        # The hub's test parts often come without labels, as -1: then the validation part has to do.
        tests = (_HuggingFaceSource(name, split, cache, image, label) for split in test_names)
        test = next((source for source in tests if source.labelled), None)
    except UserError:
        raise
    except Exception as error:  # datasets raises errors of its own, of Arrow's and of the hub's
        reason = in_one_line(error)
        raise UserError(
            f"{name}: datasets cannot load {path} ({reason}); give a name on the hub, or a folder of parquet "
            "files or images"
        ) from None
    if test is None or not train.labelled:
        raise UserError(
            f"{name}: the column {label} has to hold class indices from 0 up, for training and for the test"
        )
    if train.names != test.names:
        raise UserError(f"{name}: the splits {train.split} and {test.split} name different classes")
    classes = train.names or tuple(map(str, range(max(train.largest, test.largest) + 1)))
    return classes, train, test


def _test_splits(name: str, splits: list[str]) -> list[str]:
    tests = [split for split in _TEST_SPLITS if split in splits]
    if "train" not in splits or not tests:
        raise UserError(
            f"{name} has the splits {', '.join(splits)}; expected train and one of {', '.join(_TEST_SPLITS)}"
        )
    return tests


def _columns(name: str, features: Mapping[str, Any], datasets: ModuleType) -> tuple[str, str]:
    images = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
    labels = [key for key, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    labels = ["label"] if "label" in features else labels
    if len(images) != 1 or len(labels) != 1:
        raise UserError(f"{name} has the columns {', '.join(features)}; expected one of images and a column label")
    return images[0], labels[0]


class _HuggingFaceSource:
    """Items of (opened file, class index), by timm's reader."""

    def __init__(self, name: str, split: str, cache: str | None, image: str, label: str):
        options: dict[str, Any] = {"split": split, "input_key": image, "target_key": label}
        self.name, self.split = name, split
        self.reader = create_dataset(name, root=cache, **options).reader
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


def load_web_dataset(
    name: str, root: Path, *, create: Callable[[tuple[str, ...]], Preprocessing], workers: int
) -> StreamedImages:
    """The shards of ``root``, described by timm's ``_info.json``.

    The file may also hold ``classes``, a list of names; without it the shards are gone through once for their labels
    (``.cls``). ``create`` makes the preprocessing of the class names.
    """
    if not find_spec("webdataset"):
        raise UserError(f"{name} needs the package webdataset: pip install 'cmpe-se[wds]'")
    info_file = root / "_info.json"
    try:
        info = json.loads(info_file.read_text())
        test = _test_splits(name, list(info["splits"]))[0]
        shards = [root / shard for split in ("train", test) for shard in info["splits"][split]["filenames"]]
        classes = tuple(info.get("classes") or ())
    except FileNotFoundError:
        raise UserError(f"{root} has no _info.json; expected timm's description of the shards there") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{info_file} cannot be used ({type(error).__name__}: {error}); expected "
            '{"splits": {"train": {"name": "train", "num_samples": N, "filenames": [...], "shard_lengths": [...]}}}'
        ) from None
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        raise UserError(f"{info_file} names {len(missing)} shards that are not there, the first {missing[0]}")
    if not classes:
        classes = tuple(map(str, range(_largest_label(info_file, shards) + 1)))
    try:
        return StreamedImages(
            name, root, preprocessing=create(classes), train_split="train", test_split=test, workers=workers
        )
    except (RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"{info_file} cannot be used ({type(error).__name__}: {error})") from None


def _largest_label(info_file: Path, shards: list[Path]) -> int:
    labels = []
    for shard in shards:
        try:
            with tarfile.open(shard) as tar:
                files = (tar.extractfile(member) for member in tar if member.name.endswith(".cls"))
                labels += [int(file.read()) for file in files if file is not None]  # a folder has none
        except (OSError, ValueError, tarfile.TarError) as error:
            raise UserError(
                f"{shard} is no complete tar file of images and .cls files ({error}); write it again"
            ) from None
    if not labels:
        raise UserError(f'the shards hold no labels as .cls files; add "classes": [names] to {info_file}')
    return max(labels)
