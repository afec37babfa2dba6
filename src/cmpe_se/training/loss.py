"""The training loss: cross-entropy, with weights of the classes or without."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cmpe_se.data import ImageData


def balanced_class_weights(data: ImageData) -> Tensor:
    """A weight for each class, float32 (classes,), by which all classes weigh the same in the training loss.

    It is images / (present classes * images of the class), so that the mean over the training images is 1; 0 for a
    class without training images.

    Raises:
        UserError: a data set that is read in sequence (WebDataset shards).
    """
    counts = torch.bincount(data.train_labels(), minlength=len(data.classes)).double()
    present = counts > 0
    return torch.where(present, counts.sum() / (present.sum() * counts.clamp_min(1)), 0.0).float()


def cross_entropy(logits: Tensor, targets: Tensor, *, weights: Tensor | None, label_smoothing: float) -> Tensor:
    """Mean cross-entropy over the images, each times its class's weight.

    The weighted sum is divided by the number of images, not by the sum of their weights as PyTorch does for labels: so
    the gradient of a batch is the mean of its parts' gradients, whatever classes fall into which part or process.

    Args:
        logits: (B, classes).
        targets: labels (B,), or mixed ones (B, classes).
        weights: of the classes (classes,), or None.
        label_smoothing: from 0 to below 1.
    """
    if weights is None:
        return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    total = F.cross_entropy(logits, targets, weight=weights, label_smoothing=label_smoothing, reduction="sum")
    return total / len(logits)
