"""The images that an export is verified, calibrated and tested with."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from cmpe_se.data import Augmentation, ImageData, SmallImages, load_data
from cmpe_se.errors import UserError
from cmpe_se.run_folder import RunFolder

_CALIBRATION_BATCH = 32


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


def first_test_images(data: ImageData, count: int) -> Tensor:
    """Normalised, float32 (count, C, H, W); some of them again where there are too few."""
    images, _ = next(data.test_batches(batch_size=count))
    return images[torch.arange(count) % len(images)]


def random_images(input_size: Sequence[int], count: int) -> Tensor:
    """Noise of mean 0 and deviation 1, as normalised images are, float32 (count, C, H, W); the same every time."""
    return torch.randn(count, *input_size, generator=torch.Generator().manual_seed(0))


def training_batches(data: ImageData, count: int) -> Iterator[Tensor]:
    """At most ``count`` training images, drawn evenly, in normalised batches (B, C, H, W).

    They are as they stand in the data set, or, where they are of many sizes, the largest square of each.
    """
    plain = Augmentation() if isinstance(data, SmallImages) else Augmentation(scale=(1.0, 1.0), ratio=(1.0, 1.0))
    batch_size = min(_CALIBRATION_BATCH, count)
    batches = data.train_batches(0, batch_size=batch_size, seed=0, augmentation=plain)
    for images, _ in islice(batches, -(-count // batch_size)):
        yield images[:count]
        count -= len(images)
