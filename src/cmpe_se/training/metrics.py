"""Test metrics of a network: logits over batches, accuracy and cross-entropy."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def collect_logits(
    model: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]], *, channels_last: bool = False
) -> tuple[Tensor, Tensor]:
    """Run a network over batches.

    Args:
        model: network in eval mode, or another function of images (B, C, H, W) to logits (B, classes).
        batches: (images (B, C, H, W), labels (B,)).
        channels_last: bring images to that memory format.

    Returns:
        Logits (N, classes) in float32 and labels (N,), both on the CPU.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    logits, labels = [torch.empty(0)], [torch.empty(0, dtype=torch.int64)]
    for images, targets in batches:
        logits.append(model(images.to(memory_format=layout)).float().cpu())
        labels.append(targets.cpu())
    start = 1 if len(logits) > 1 else 0
    return torch.cat(logits[start:]), torch.cat(labels[start:])


class EvaluationMetrics(TypedDict):
    """Accuracies in percent, and mean cross-entropy."""

    test_top1: float
    test_top5: float
    test_loss: float


def test_metrics(logits: Tensor, labels: Tensor) -> EvaluationMetrics:
    """Top-1 and top-5 accuracy in percent and mean cross-entropy of logits (N, classes) and labels (N,).

    With fewer than five classes, top-5 counts all of them.
    """
    total, loss, top1, top5 = count_correct(logits, labels).tolist()
    return {"test_top1": 100 * top1 / total, "test_top5": 100 * top5 / total, "test_loss": loss / total}


def among(logits: Tensor, classes: Sequence[int]) -> Tensor:
    """Logits (N, K) with those of all but ``classes`` minus infinity: softmax and ranks are among these alone."""
    kept = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
    kept[list(classes)] = True
    return logits.masked_fill(~kept, -torch.inf)


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Sums, float64 (4,): images, cross-entropies, correct in the first place, correct in the first five."""
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # (N, 5)
    loss = F.cross_entropy(logits.double(), labels, reduction="sum")
    sums = [torch.tensor(float(len(labels))), loss, ranked[:, 0].sum(), ranked.any(1).sum()]
    return torch.stack([value.double() for value in sums])
