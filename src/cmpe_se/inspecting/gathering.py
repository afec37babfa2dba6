"""A finished run's network on its test images: predictions, and statistics of its gates, in one pass."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cmpe_se.errors import UserError
from cmpe_se.inspecting import look
from cmpe_se.inspecting.statistics import BlockStatistics


@dataclass(frozen=True, eq=False)
class Gathered:
    """What a pass over the test images leaves.

    Args:
        logits: (N, classes), float32.
        labels: (N,).
        blocks: statistics of each gate, in order.
    """

    logits: Tensor
    labels: Tensor
    blocks: list[BlockStatistics]

    @property
    def predicted(self) -> Tensor:
        """Most likely class of each image, (N,)."""
        return self.logits.argmax(1)

    @property
    def confidence(self) -> Tensor:
        """Probability of that class, (N,)."""
        return self.logits.softmax(1).amax(1)


def gather(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], classes: int) -> Gathered:
    """Run a network over batches of images (B, C, ...) and labels (B,).

    Raises:
        UserError: outputs that are not finite.
    """
    logits, labels = [], []
    blocks: list[BlockStatistics] = []
    for images, targets in batches:
        output, views = look(model, images)
        if not output.isfinite().all():
            raise UserError("the network gives no finite values for some test images; its weights are damaged")
        logits.append(output.float().cpu())
        labels.append(targets.cpu())
        blocks = blocks or [BlockStatistics(view, classes) for view in views]
        for block, view in zip(blocks, views, strict=True):
            block.add(view, labels[-1])
    return Gathered(torch.cat(logits), torch.cat(labels), blocks)
