"""A validation split: training images held out, to choose by them what test images shall not choose."""

import logging

import numpy as np
import torch

from cmpe_se.data.interface import ImageData
from cmpe_se.errors import UserError

_log = logging.getLogger(__name__)


def validation_split(data: ImageData, share: float) -> tuple[ImageData, ImageData]:
    """Hold a share of each class's training images out.

    Which images these are depends on the data set and the share alone: runs of all seeds hold out the same ones.

    Args:
        data: data set.
        share: of the training images of each class, above 0 and below 1; rounded to whole images, of which a class
            keeps at least one for training and, where it has two or more, gives at least one.

    Returns:
        The data set without them, and one whose test images they are.

    Raises:
        UserError: a data set that is read in sequence (WebDataset shards).
    """
    labels = data.train_labels().numpy()
    held: list[int] = []
    single = 0
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) == 1:
            single += 1
            continue
        count = min(max(1, round(len(members) * share)), len(members) - 1)
        held += np.random.default_rng(0).permutation(members)[:count].tolist()
    if not held:
        raise UserError(f"{data.name} has no class with two training images, so none can be held out for validation")
    if single:
        _log.warning(f"{single} class(es) of {data.name} have one training image, and none for validation")
    return data.held_out(torch.tensor(sorted(held)))
