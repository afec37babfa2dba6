"""The data set that a run was trained on."""

from collections.abc import Callable

from cmpe_se.data import ImageData, load_data
from cmpe_se.errors import UserError
from cmpe_se.training.run_folder import RunFolder


def load_run_data(folder: RunFolder, load: Callable[..., ImageData] = load_data) -> ImageData:
    """The data set that a run was trained on.

    Args:
        folder: of the run.
        load: ``load_data``, or one that remembers what it has loaded.

    Raises:
        UserError: it is not there any more, or is another one by now.
    """
    config, trained = folder.read_config(), folder.model_config()
    data = load(config.data, config.data_dir, image_size=config.image_size, workers=config.workers)
    now = (data.classes, (data.in_chans, *data.image_size), data.mean, data.std)
    if now != tuple(tuple(trained[key]) for key in ("label_names", "input_size", "mean", "std")):
        raise UserError(f"{config.data} has other images or classes than when {folder.path} was trained on it")
    return data
