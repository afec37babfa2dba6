"""A finished run's network on its test images: predictions, and statistics of its gates, in one pass."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cmpe_se.errors import UserError
from cmpe_se.inspecting import look
from cmpe_se.inspecting.statistics import BlockStatistics


@dataclass(frozen=True, eq=False)
class Gathered:
    """What a pass over the test images leaves: three numbers of an image, and sums.

    Logits are not kept: of 50,000 images and 1,000 classes they and their probabilities are 0.4 GB.

    Args:
        predicted: most likely class of each image, (N,).
        confidence: probability of that class, (N,).
        labels: (N,).
        blocks: statistics of each gate, in order.
    """

    predicted: Tensor
    confidence: Tensor
    labels: Tensor
    blocks: list[BlockStatistics]

    @classmethod
    def of_logits(cls, logits: Tensor, labels: Tensor, blocks: Sequence[BlockStatistics] = ()) -> "Gathered":
        """From logits (N, classes), float32, and labels (N,)."""
        return cls(logits.argmax(1), logits.softmax(1).amax(1), labels, list(blocks))

    @property
    def top1(self) -> float:
        """Accuracy in percent."""
        return 100 * (self.predicted == self.labels).double().mean().item()


def gather(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], classes: int) -> Gathered:
    """Run a network over batches of images (B, C, ...) and labels (B,).

    Raises:
        UserError: outputs that are not finite.
    """
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    blocks: list[BlockStatistics] = []
    for images, targets in batches:
        output, views = look(model, images)
        if not output.isfinite().all():
            raise UserError("the network gives no finite values for some test images; its weights are damaged")
        batch = Gathered.of_logits(output.float().cpu(), targets.cpu())
        parts.append((batch.predicted, batch.confidence, batch.labels))
        blocks = blocks or [BlockStatistics(view, classes) for view in views]
        for block, view in zip(blocks, views, strict=True):
            block.add(view, batch.labels)
    predicted, confidence, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    return Gathered(predicted, confidence, labels, blocks)
