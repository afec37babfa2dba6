"""The order, crops and flips of each epoch, drawn once for all networks and before they are asked for."""

import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from cmpe_se.data import SmallImages
from cmpe_se.training.config import TrainingConfig


class Plans:
    """Plans of epochs, which are the same for every network with a seed.

    Args:
        data: whose images are drawn.
        config: batch size, augmentation and number of epochs.
        kept: plans that are remembered; one for each run under way, and the next of each, is enough.
    """

    def __init__(self, data: SmallImages, config: TrainingConfig, kept: int):
        self.data, self.config, self.kept = data, config, kept
        self._pool = ThreadPoolExecutor(2, "plans")
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[int, int], Future[Tensor]] = OrderedDict()

    def get(self, seed: int, epoch: int) -> Tensor:
        """Plan of an epoch, int64 (steps, B, 6) on the CPU; the next epoch's is begun."""
        with self._lock:
            wanted = self._ask(seed, epoch)
            if epoch + 1 < self.config.epochs:
                self._ask(seed, epoch + 1)
            while len(self._known) > self.kept:
                self._known.popitem(last=False)
        return wanted.result()

    def close(self) -> None:
        """Draw no more."""
        self._pool.shutdown(cancel_futures=True)

    def _ask(self, seed: int, epoch: int) -> Future[Tensor]:
        place = (seed, epoch)
        if place not in self._known:
            self._known[place] = self._pool.submit(self._draw, seed, epoch)
        self._known.move_to_end(place)
        return self._known[place]

    def _draw(self, seed: int, epoch: int) -> Tensor:
        return torch.stack(list(self.data.plans(epoch, self.config.batch_size, seed, self.config.augmentation)))
