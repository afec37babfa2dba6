"""Settings of a run that depend on where its data are, and what they are."""

import logging
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from cmpe_se.data import Augmentation, ImageData
from cmpe_se.errors import UserError
from cmpe_se.training.config import TrainingConfig
from cmpe_se.utils.files import whole_path

_log = logging.getLogger(__name__)


def with_whole_paths(config: TrainingConfig) -> TrainingConfig:
    """Paths from the root, so that the run is understood from every working directory."""
    paths = {"data_dir": config.data_dir}
    if config.pretrained and whole_path(config.pretrained).exists():  # else it is a name
        paths["pretrained"] = config.pretrained
    return config.changed(**{key: str(whole_path(path).absolute()) for key, path in paths.items() if path})


def paths_of(config: TrainingConfig) -> list[str]:
    """What a run reads from the disk, of a configuration :func:`with_whole_paths`; another machine needs it too."""
    named = [config.data_dir, config.pretrained, config.data.partition("/")[2]]  # the last of wds/ and hfds/
    return [path for path in named if path and path.startswith("/") and whole_path(path).exists()]


def refuse_idle_folder(data: str, data_dir: str | None) -> None:
    """Raise UserError for a folder of images that a data set without any would not look at."""
    if data == "digits" and data_dir is not None:
        raise UserError(
            f"data_dir is {data_dir}, but digits come with scikit-learn and the folder would not be looked at; add "
            "--data folder for its images, or leave it out"
        )


def without_foreign_test_size(config: TrainingConfig, settings: Mapping[str, Any]) -> TrainingConfig:
    """Leave out a recipe's size of tests where the user gives another size of training images alone."""
    if config.test_image_size is None or "image_size" not in settings or "test_image_size" in settings:
        return config
    _log.warning(
        f"the recipe's test_image_size {config.test_image_size} left out: image_size {config.image_size} was given; "
        "give --test-image-size too for tests at another size"
    )
    return config.changed(test_image_size=None)


def without_foreign_augmentation(config: TrainingConfig, recipe: TrainingConfig, data: ImageData) -> TrainingConfig:
    """Leave out what only the recipe asks for and these images do not know; what the user asks for stays, and fails."""
    foreign = {
        field.name: field.default
        for field in fields(Augmentation)
        if field.name not in data.augmentation_fields
        and getattr(config, field.name) == getattr(recipe, field.name) != field.default
    }
    if foreign:
        size = "x".join(map(str, data.image_size))
        _log.warning(
            f"the recipe's {', '.join(foreign)} left out: {data.name} is loaded as {size} images, which take "
            f"{', '.join(data.augmentation_fields)}"
        )
    return config.changed(**foreign)
