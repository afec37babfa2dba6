"""Which epoch's network a run keeps: the one with the best validation accuracy."""

import copy
from typing import Any

from torch import nn

from cmpe_se.training.summary import BestState, ValidationRecord
from cmpe_se.utils.sharding import shared_out_like, whole


class BestEpoch:
    """The best epoch so far and its weights. Equal accuracies: the smaller loss, then the earlier epoch."""

    def __init__(self) -> None:
        self.epoch = 0  # counted from 1; 0 before the first
        self._score = (float("-inf"), float("-inf"))
        self._weights: dict[str, Any] = {}

    def offer(self, epoch: int, record: ValidationRecord, network: nn.Module) -> None:
        """Keep a network's weights if its validation metrics are the best so far."""
        score = (record["validation_top1"], -record["validation_loss"])
        if score > self._score:
            self.epoch, self._score = epoch, score
            self._weights = copy.deepcopy(whole(network.state_dict()))

    def waited(self, epoch: int) -> int:
        """Epochs since the best one."""
        return epoch - self.epoch

    def load_into(self, network: nn.Module) -> None:
        """Give a network the weights of the best epoch."""
        network.load_state_dict(shared_out_like(self._weights, network.state_dict()))

    def state_dict(self) -> BestState | None:
        """For a checkpoint; None before the first epoch."""
        if not self.epoch:
            return None
        return {"epoch": self.epoch, "score": list(self._score), "weights": self._weights}

    def load_state_dict(self, state: BestState) -> None:
        """From a checkpoint."""
        accuracy, loss = state["score"]
        self.epoch, self._score, self._weights = state["epoch"], (accuracy, loss), state["weights"]
