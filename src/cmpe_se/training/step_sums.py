"""Sums of images, losses and correct predictions over an epoch, without waiting for the device at every step."""

import math
from typing import TypedDict

import torch
from accelerate import Accelerator
from torch import Tensor


class TrainingMetrics(TypedDict):
    """Mean loss, accuracy in percent (None where labels are mixed) and images per second."""

    train_loss: float
    train_top1: float | None
    images_per_second: float


class StepSums:
    """Sums over the epoch under way, and the steps not yet added to them.

    Args:
        accelerator: whose processes share the images of a step.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.unread: list[tuple[int, float, Tensor]] = []  # step, learning rate and sums of this process
        self.reset()

    def reset(self) -> None:
        """Start an epoch."""
        self.total = torch.zeros(3, dtype=torch.float64)  # images, losses, correct ones, over all processes

    def add(self, step: int, rate: float, sums: Tensor) -> None:
        """Note the sums (3,) of a step, on the device."""
        self.unread.append((step, rate, sums))

    def read(self) -> tuple[int, float, float] | None:
        """Add up what was noted, which waits for the device; the first (step, rate, loss) that is not finite."""
        steps, rates, sums = zip(*self.unread, strict=True)
        self.unread = []
        values = self.accelerator.reduce(torch.stack(sums)).cpu().double()  # (steps, 3)
        self.total += values.sum(0)
        losses = (values[:, 1] / values[:, 0]).tolist()
        return next((bad for bad in zip(steps, rates, losses, strict=True) if not math.isfinite(bad[2])), None)

    def metrics(self, seconds: float, *, accuracy: bool) -> TrainingMetrics:
        """Mean loss, accuracy in percent (None where labels are mixed) and images per second so far."""
        images, loss, correct = self.total.tolist()
        return {
            "train_loss": loss / max(images, 1),
            "train_top1": 100 * correct / max(images, 1) if accuracy else None,
            "images_per_second": images / max(seconds, 1e-9),
        }


def part_sums(logits: Tensor, targets: Tensor, loss: Tensor) -> Tensor:
    """Sums over images (3,): images, losses, correct ones (by the heavier label, where labels are mixed).

    Args:
        logits: (B, classes).
        targets: labels (B,), or mixed ones (B, classes).
        loss: mean over the images.
    """
    labels = targets if targets.ndim == 1 else targets.argmax(1)
    correct = (logits.argmax(1) == labels).sum()
    count = torch.full_like(loss, len(logits), dtype=torch.float32)
    return torch.stack([count, loss.float() * count, correct.float()])
