"""The training losses: cross-entropy and binary cross-entropy, with weights of the classes or without."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from cmpe_se.data import ImageData
from cmpe_se.training.config import TrainingConfig


def create_loss(config: TrainingConfig, weights: Tensor | None) -> Callable[..., Tensor]:
    """The loss of a configuration: a function of logits, targets and ``label_smoothing``.

    Args:
        config: of the run.
        weights: of the classes, float32 (classes,), on the device of the logits; None for each class the same.
    """
    if config.loss == "bce":
        return partial(binary_cross_entropy, weights=weights, threshold=config.bce_threshold)
    return partial(cross_entropy, weights=weights)


def loss_label(config: TrainingConfig) -> str:
    """What the losses of a run are, for plots: those of tests are cross-entropy, whatever is trained with."""
    return (
        "cross-entropy"
        if config.loss == "cross_entropy"
        else "binary cross-entropy in training, cross-entropy in tests"
    )


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


def binary_cross_entropy(
    logits: Tensor, targets: Tensor, *, weights: Tensor | None, label_smoothing: float, threshold: float | None
) -> Tensor:
    """Mean over images and classes of the binary cross-entropy of each class (arXiv 2110.00476, section 3.1).

    It is timm's ``BinaryCrossEntropy``, with weights of the images as :func:`cross_entropy` has them.

    Args:
        logits: (B, classes).
        targets: labels (B,), or mixed ones (B, classes).
        weights: of the classes (classes,), by which each image weighs as its classes do; or None.
        label_smoothing: from 0 to below 1.
        threshold: targets above it become 1 and others 0, after smoothing; None leaves them as they are.
    """
    classes = logits.shape[1]
    if targets.ndim == 1:
        targets = F.one_hot(targets, classes)
    targets = targets.to(logits.dtype) * (1 - label_smoothing) + label_smoothing / classes
    of_images = None if weights is None else (targets @ weights)[:, None]  # before the threshold: they add up to 1
    if threshold is not None:
        targets = (targets > threshold).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, targets, weight=of_images)
