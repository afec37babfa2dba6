"""The data set that a run was trained on, or trains on."""

from collections.abc import Callable
from typing import Any

from cmpe_se.data import ImageData, Preprocessing, SmallImages, load_data
from cmpe_se.errors import UserError
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.run_folder import RunFolder


def load_run_data(folder: RunFolder, load: Callable[..., ImageData] = load_data) -> ImageData:
    """The data set that a run was trained on, with the run's preprocessing.

    Args:
        folder: of the run.
        load: ``load_data``, or one that remembers what it has loaded.

    Raises:
        UserError: it is not there any more, or is another one by now.
    """
    config, trained = folder.read_config(), folder.preprocessing()
    data = load(config.data, config.data_dir, preprocessing=trained, workers=config.workers)
    # Images in memory were normalised by their own mean and deviation, which other images hardly share.
    others = isinstance(data, SmallImages) and data.statistics != (trained.mean, trained.std)
    if others or data.classes != trained.classes:
        raise UserError(f"{config.data} has other images or classes than when {folder.path} was trained on it")
    return data


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
    if loaded is None or (config.data, config.image_size) != (before.data, before.image_size):
        return {"image_size": config.image_size}
    tree, path = loaded
    if "preprocessing" in tree:
        return {"preprocessing": Preprocessing.from_dict(tree["preprocessing"], str(path))}
    return {"image_size": config.image_size, "resize": folder.resize_before_preprocessing()}
