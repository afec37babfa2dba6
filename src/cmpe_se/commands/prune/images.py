"""The images that a run is pruned with."""

from torch import Tensor

from cmpe_se.data import ImageData, plain_training_batches
from cmpe_se.errors import UserError
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.run_data import load_configured, load_run_data
from cmpe_se.training.run_folder import RunFolder
from cmpe_se.training.run_images import read_listing

BATCH = 250


def load_images(folder: RunFolder, config: TrainingConfig, *, moved: bool) -> ImageData:
    """The run's data set, from where it was or from another place.

    Raises:
        UserError: it is not there, or has other classes.
    """
    if not moved:
        try:
            return load_run_data(folder)
        except UserError as error:
            raise UserError(f"pruning needs the run's images: {error}; name their folder by --data-dir") from None
    data = load_configured(config, preprocessing=folder.preprocessing(), listing=read_listing(folder))
    if data.classes != folder.preprocessing().classes:
        raise UserError(f"{config.data_dir} has other classes than {folder.path} was trained on; give its own images")
    return data


def batches_to_measure(data: ImageData, most: int) -> list[tuple[Tensor, Tensor]]:
    """Training images without augmentation, in batches whose feature maps and gradients fit into memory."""
    height, width = data.image_size
    return list(plain_training_batches(data, most, batch_size=max(8, min(BATCH, BATCH * 64**2 // (height * width)))))
