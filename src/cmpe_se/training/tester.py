"""A run's network on images that it does not learn from, shared by all processes of the run."""

from typing import TypedDict

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from cmpe_se.data import ImageData
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.metrics import collect_logits, count_correct
from cmpe_se.utils.sharding import whole


class Shard(TypedDict):
    """A process's share of a batch, as the batches of ``ImageData`` take it."""

    rank: int
    world: int
    device: torch.device


def shard_of(accelerator: Accelerator) -> Shard:
    """The share of this process."""
    return {"rank": accelerator.process_index, "world": accelerator.num_processes, "device": accelerator.device}


class Tester:
    """Tests a network that is being trained.

    Args:
        config: of the run.
        accelerator: whose processes share the images.
        trained: the network that learns.
        averaged: the one with the moving average of its weights, which is tested in its place; None without.
        whole_copy: where the networks are shared out over the processes, a plain one like them, to test on: processes
            may have one batch more than others, and shared-out networks run on all of them at once.
    """

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        trained: nn.Module,
        averaged: nn.Module | None,
        whole_copy: nn.Module | None = None,
    ):
        self._config, self._accelerator, self._copy = config, accelerator, whole_copy
        self._networks = [trained, averaged] if averaged is not None else [trained]

    @property
    def network(self) -> nn.Module:
        """What is tested and saved: the averaged weights if there are any."""
        return self._networks[-1]

    def whole(self) -> nn.Module:
        """The network on this process alone, to be run or copied; all processes call this at once."""
        if self._copy is None:
            return self.network
        self._copy.load_state_dict(whole(self.network.state_dict()))
        return self._copy

    def count(self, data: ImageData) -> Tensor:
        """Sums of :func:`cmpe_se.training.metrics.count_correct` over the test images of ``data`` (4,).

        One process tests each image once.
        """
        if self._accelerator.num_processes > 1:
            # Running statistics differ between processes: the first one's count, as they do in a checkpoint.
            for module in self._networks:
                for buffer in module.buffers():
                    buffer.copy_(broadcast(buffer))
        batches = data.test_batches(batch_size=4 * self._config.batch_size, **shard_of(self._accelerator))
        network = self.whole().eval()
        with self._accelerator.autocast():
            logits, labels = collect_logits(network, batches, channels_last=self._config.channels_last)
        sums = count_correct(logits, labels) if len(labels) else torch.zeros(4, dtype=torch.float64)
        return self._accelerator.reduce(sums.to(self._accelerator.device))
