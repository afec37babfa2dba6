"""One run of the grid: from its first weights to the files that `cmpe-se train` would leave."""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.many_runs.plans import Plans
from benchmarks.many_runs.program import Program
from torch import nn

from cmpe_se.commands.compare.grid import Cell
from cmpe_se.data import SmallImages
from cmpe_se.errors import UserError
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.metrics import collect_logits, count_correct
from cmpe_se.training.network import count_gates, create_network
from cmpe_se.training.provenance import has_tf32
from cmpe_se.training.run_images import write_listing
from cmpe_se.training.seeding import seed_everything
from cmpe_se.training.summary import UNTESTED, summarise, test_record
from cmpe_se.utils.cost import count_multiply_adds, count_parameters

_CHUNK, _CHUNKS = 8, 3  # steps between two marks in a lane's queue, and marks that the host may be ahead
_TEST_BATCH = 2048  # images, on a GPU

After = Callable[[nn.Module, Cell], None]
"""Called with a trained network in eval mode, on its device, and its cell, before the network is dropped."""


class OutOfTime(Exception):
    """The deadline has come before a run's end."""


@dataclass(frozen=True)
class Start:
    """A run's first weights, on the CPU, and what its network costs."""

    config: TrainingConfig
    network: nn.Module
    model_args: dict[str, Any]
    params: int
    macs: int


def start(config: TrainingConfig, data: SmallImages, costs: tuple[int, int] | None = None) -> Start:
    """The network as `cmpe-se train` begins with it. Not for two threads at a time: seeds are the process's.

    Args:
        config: of the run.
        data: for the classes and the image size.
        costs: parameters and multiply-adds, if they have been counted for such a network.
    """
    seed_everything(config.seed)
    network, model_args = create_network(config, data)
    size = (data.in_chans, *data.image_size)
    return Start(
        config, network, model_args, *(costs or (count_parameters(network), count_multiply_adds(network, size)))
    )


def train_cell(
    cell: Cell,
    begun: Start,
    program: Program,
    plans: Plans,
    source: dict[str, Any],
    *,
    keep_weights: bool = False,
    after: After | None = None,
    on_epoch: Callable[[int], None] = lambda epoch: None,
    out_of_time: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Train and test one run, and write its files.

    Args:
        cell: the run.
        begun: its first weights; the trained ones replace them where they are kept.
        program: for a network of this kind.
        plans: of the epochs.
        source: :func:`cmpe_se.training.provenance.provenance`.
        keep_weights: write the network, too.
        after: see :data:`After`.
        on_epoch: called with the number of finished epochs.
        out_of_time: whether to stop here; asked often.

    Returns:
        The result as it was written.

    Raises:
        OutOfTime: it was; nothing is written.
        UserError: a loss that is not finite; nothing is written.
    """
    config, data = begun.config, program.data
    program.load(begun.network, config.seed)
    history: list[dict[str, Any]] = []
    for epoch in range(config.epochs):
        started = time.perf_counter()
        program.begin_epoch(plans.get(config.seed, epoch))
        _enqueue_epoch(program, out_of_time)
        images, loss, correct = program.sums.tolist()  # waits for the epoch's last step
        seconds = time.perf_counter() - started
        if not math.isfinite(loss):
            raise UserError(f"{cell.entry.label} seed {cell.seed}: the loss is {loss} in epoch {epoch + 1}")
        history.append(
            {
                "epoch": epoch + 1,
                "step": program.finished_steps,
                "lr": program.last_rate,
                "train_loss": loss / images,
                "train_top1": 100 * correct / images,
                "images_per_second": images / seconds,
                "seconds": seconds,
                **UNTESTED,
            }
        )
        on_epoch(epoch + 1)
    network = program.network.eval()
    history[-1] |= _test(program, config)
    if after is not None:
        with torch.no_grad():
            after(network, cell)
    view = getattr(network, "view", None)
    sizes = {"params": begun.params, "macs": begun.macs, "gates": count_gates(network)}
    result = summarise(config, data, history, view=view, **sizes)
    result |= {"processes": 1, "run": str(cell.run.path), "tf32": has_tf32(program.device), **source}
    cell.run.write_config(config)
    write_listing(cell.run, data, None)
    cell.run.write_metrics(history)
    if keep_weights:
        begun.network.load_state_dict(network.state_dict())
        cell.run.save_model(begun.network.eval(), model_args=begun.model_args, data=data)
    cell.run.write_result(result)  # the last file: it says that the run is finished
    return result


def _enqueue_epoch(program: Program, out_of_time: Callable[[], bool]) -> None:
    """All steps of an epoch, the host never far ahead of the device."""
    marks: deque[torch.cuda.Event] = deque()
    for step in range(program.steps_per_epoch):
        program.step()
        if step % _CHUNK == _CHUNK - 1:
            if out_of_time():
                raise OutOfTime
            if program.on_gpu:
                marks.append(torch.cuda.Event(blocking=True))
                marks[-1].record()
                if len(marks) > _CHUNKS:
                    marks.popleft().synchronize()


def _test(program: Program, config: TrainingConfig) -> dict[str, Any]:
    size = 4 * config.batch_size  # the trainer's
    batches = program.data.test_batches(
        batch_size=max(size, _TEST_BATCH) if program.on_gpu else size, device=program.device
    )
    logits, labels = collect_logits(program.network, batches, channels_last=program.channels_last)
    return test_record(count_correct(logits, labels))
