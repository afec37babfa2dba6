"""The data set that a run was trained on, or trains on."""

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cmpe_se.data import DataOptions, ImageData, Preprocessing, SmallImages, is_fixed_size, load_data
from cmpe_se.data.copies import find_copies
from cmpe_se.data.folders import scan_class_folders
from cmpe_se.errors import UserError
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.data_settings import refuse_idle_folder
from cmpe_se.training.run_folder import RunFolder
from cmpe_se.training.run_images import read_listing

_log = logging.getLogger(__name__)


def load_configured(config: TrainingConfig, load: Callable[..., ImageData] | None = None, **options: Any) -> ImageData:
    """The data set that a run's settings name.

    Args:
        config: of the run.
        load: ``load_data``, or one that remembers what it has loaded.
        options: more keyword arguments of ``load_data``; they win over the settings.

    Raises:
        UserError: as ``load_data``.
    """
    settings: dict[str, Any] = {"workers": config.workers, "options": config.data_options}
    settings["in_memory"] = _may_be_in_memory(config)
    if options.get("preprocessing") is None:
        settings |= {"test_image_size": config.test_image_size, "test_crop": config.test_crop}
    elif config.test_image_size is not None:  # the preprocessing is that of tests
        settings["image_size"] = config.image_size
    return (load or load_data)(config.data, config.data_dir, **(settings | options))


def _may_be_in_memory(config: TrainingConfig) -> bool:
    """Whether small images may be held there: not where tests crop them in another way than training does."""
    return config.test_image_size is None and config.test_crop is None


def load_run_data(folder: RunFolder, load: Callable[..., ImageData] = load_data) -> ImageData:
    """The data set that a run was trained on, with the run's preprocessing.

    Args:
        folder: of the run.
        load: ``load_data``, or one that remembers what it has loaded.

    Raises:
        UserError: it is not there any more, or is another one by now.
    """
    config, trained = folder.read_config(), folder.preprocessing()
    data = load_configured(config, load, preprocessing=trained, listing=read_listing(folder))
    # Images in memory were normalised by their own mean and deviation, which other images hardly share.
    others = isinstance(data, SmallImages) and data.statistics != (trained.mean, trained.std)
    if others or data.classes != trained.classes:
        raise UserError(f"{config.data} has other images or classes than when {folder.path} was trained on it")
    _refuse_another_split(folder, data)
    return data


def load_tested(
    folder: RunFolder,
    data: str | None = None,
    data_dir: str | None = None,
    *,
    workers: int = 2,
    options: DataOptions | None = None,
    skip_unreadable: bool = False,
) -> ImageData:
    """The data set to test a finished run on, with the run's preprocessing, whatever size its images have.

    Without ``data`` and ``data_dir``, or where they are the run's own, these are the run's test images: never those
    that it was trained on. Of other class folders all images are tested, or those of their part for the test. A label
    is an index into the run's classes in any case. A log message says how many of other images the run was trained on.

    Args:
        folder: of the run.
        data: data set to test on; the run's own if left out.
        data_dir: folder of that data set.
        workers: processes that decode images.
        options: names of columns and splits where they are not the usual ones.
        skip_unreadable: pass over images that cannot be used.

    Raises:
        UserError: no such data set, or classes that the run does not have.
    """
    config, preprocessing = folder.read_config(), folder.preprocessing()
    name, options = data or config.data, options or DataOptions()
    common: dict[str, Any] = {
        "preprocessing": preprocessing,
        "workers": workers,
        "skip_unreadable": skip_unreadable,
        "in_memory": _may_be_in_memory(config),
    }
    if name == config.data:  # what is not said is as in training
        mixed = {key: value or getattr(config, key) for key, value in options._asdict().items()}
        options = DataOptions(**mixed)
    if name == config.data and options == config.data_options and _is_same_folder(data_dir, config.data_dir):
        own = load_data(name, config.data_dir, options=options, listing=read_listing(folder), **common)
        _refuse_another_split(folder, own)
        if own.classes != preprocessing.classes:
            raise UserError(
                f"{own.name} has the classes {', '.join(own.classes[:5])}, ... ({len(own.classes)}), but {folder.path} "
                f"was trained on {', '.join(preprocessing.classes[:5])}, ... ({len(preprocessing.classes)}); test on "
                "the same classes"
            )
        return own
    refuse_idle_folder(name, data_dir)
    if data_dir is None and _share_a_folder(name, config.data):
        data_dir = config.data_dir
    other = load_data(name, data_dir, options=options._replace(train_split=None), hold_out=True, **common)
    _warn_of_training_images(folder, config, other)
    return other


def _refuse_another_split(folder: RunFolder, data: ImageData) -> None:
    """Raise UserError where a run has not kept its test images, and their folder has another number of images now."""
    if data.folders is None or not data.folders.drawn or read_listing(folder).version > 1:
        return
    result: Mapping[str, Any] = folder.read_result()
    now = data.train_size + len(data.folders.test)
    if "train_images" in result and now != (then := result["train_images"] + result["test_images"]):
        raise UserError(
            f"{data.folders.root} has {now} images, and had {then} when {folder.path} was trained on it: which of them "
            "were held out cannot be told any more; restore them, or test a hold-out by --data-dir"
        )


def _is_same_folder(path: str | None, own: str | None) -> bool:
    if path is None or own is None:
        return path is None
    return os.path.realpath(Path(path).expanduser()) == os.path.realpath(own)


def _share_a_folder(name: str, own: str) -> bool:
    """Whether both data sets are kept in one folder, so that it need not be said again."""
    return (is_fixed_size(name) and is_fixed_size(own)) or (name.startswith("hfds/") and own.startswith("hfds/"))


def _warn_of_training_images(folder: RunFolder, config: TrainingConfig, other: ImageData) -> None:
    """Log how many of other class folders' images a run was trained on, if its own folder can still be read."""
    if other.folders is None or config.data not in ("folder", "imagenet") or config.data_dir is None:
        return
    roles, options = ("test", "val") if config.data == "folder" else ("val",), config.data_options
    try:
        trained = scan_class_folders(
            Path(config.data_dir),
            roles,
            train_split=options.train_split,
            test_split=options.test_split,
            listing=read_listing(folder),
            log=lambda _: None,
        ).train
    except (UserError, OSError):
        return
    found = find_copies([path for path, _ in trained], [path for path, _ in other.folders.test])
    if found.example:
        _log.warning(
            f"{found.number:,} of {found.looked_at:,} images were trained on, byte for byte, such as "
            f"{found.example[0]} and {found.example[1]}: the accuracy does not tell how it does on new images"
        )


_OF_PREPROCESSING = ("data", "image_size", "test_image_size", "test_crop")


def image_options(config: TrainingConfig, folder: RunFolder, before: TrainingConfig) -> dict[str, Any]:
    """What ``load_data`` needs to know of a run's images, to resume the run with the same images.

    Args:
        config: settings that the run resumes with.
        folder: of the run.
        before: its settings so far.

    Returns:
        Keyword arguments.

    Raises:
        UserError: none of the checkpoints can be read.
    """
    loaded = folder.checkpoints.load(tensors=False)  # the trainer reads the rest
    if loaded is None or any(getattr(config, name) != getattr(before, name) for name in _OF_PREPROCESSING):
        return {"image_size": config.image_size}
    tree, path = loaded
    if "preprocessing" in tree:
        return {"preprocessing": Preprocessing.from_dict(tree["preprocessing"], str(path))}
    return {"image_size": config.image_size, "resize": folder.resize_before_preprocessing()}
