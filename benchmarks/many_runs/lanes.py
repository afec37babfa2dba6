"""Who trains what and when: a thread and a stream for each lane, until all runs are done or the time is up."""

import copy
import faulthandler
import math
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from benchmarks.many_runs.cells import After, OutOfTime, Start, start, train_cell
from benchmarks.many_runs.plans import Plans
from benchmarks.many_runs.program import Program, check_config

from cmpe_se.commands.compare.grid import Cell, Entry, Grid
from cmpe_se.data import SmallImages
from cmpe_se.errors import UserError
from cmpe_se.training.provenance import provenance
from cmpe_se.utils.text import in_one_line

_FAILURES = 3  # failed runs, if no more have finished, after which none is begun
_PACE_EPOCHS = 3  # of the first runs, after which a pace is printed
_LOOK = 0.5  # seconds between two looks at whether the lanes go on


@dataclass
class Queue:
    """Runs that are to be trained, and how long one takes; for several threads.

    Args:
        cells: in the order of their turn.
        deadline: of ``time.monotonic``.
        epochs: of a run.
    """

    cells: list[Cell]
    deadline: float
    epochs: int
    finished: list[Cell] = field(default_factory=list)
    failures: dict[Cell, str] = field(default_factory=dict)
    stuck: bool = False  # lanes had stopped for good when they were left
    _sign: float = field(default_factory=time.monotonic)  # when an epoch or a run was last begun or done
    _under_way: dict[Cell, tuple[float, float]] = field(default_factory=dict)  # beginning, and seconds of all of it
    _seconds: list[float] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self) -> Cell | None:
        """The next run; None if there is none, it could not finish, or what fails is more than a run or two."""
        with self._lock:
            if len(self.failures) > max(_FAILURES, len(self.finished)):
                return None
            if not self.cells or time.monotonic() + self.estimate() > self.deadline:
                return None
            cell = self.cells.pop(0)
            self._sign = time.monotonic()
            self._under_way[cell] = (self._sign, 0.0)
            return cell

    def estimate(self) -> float:
        """Seconds of a run: the longest of the last ones; before any has finished, by the epochs of those under way."""
        return max(self._seconds[-8:] or [whole for _, whole in self._under_way.values()] or [0.0])

    def note_epoch(self, cell: Cell, epoch: int) -> None:
        """So many epochs of a run are done."""
        with self._lock:
            self._sign = time.monotonic()
            beginning, _ = self._under_way[cell]
            self._under_way[cell] = (beginning, (self._sign - beginning) / epoch * self.epochs)

    def silence(self) -> float:
        """Seconds in which no epoch and no run was begun or done."""
        return time.monotonic() - self._sign

    def end(self, cell: Cell, failure: str | None = None) -> float:
        """A run has ended; returns its seconds."""
        with self._lock:
            self._sign = time.monotonic()
            seconds = self._sign - self._under_way.pop(cell)[0]
            if failure is None:
                self.finished.append(cell)
                self._seconds.append(seconds)
            else:
                self.failures[cell] = failure
            return seconds


class Lanes:
    """Trains the runs of a grid, several at a time.

    Args:
        grid: the comparison.
        data: that its configuration names.
        device: to train on; anything but a GPU has one lane, and no graphs.
        lanes: runs at a time.
        keeps: whether to keep the weights of a run.
        after: see :data:`benchmarks.many_runs.cells.After`; called by several threads.
        say: prints a line.
        patience: seconds without a finished epoch after which lanes are given up, as a device that is stuck never
            returns.
    """

    def __init__(
        self,
        grid: Grid,
        data: SmallImages,
        device: torch.device,
        *,
        lanes: int = 1,
        keeps: Callable[[Cell], bool] = lambda cell: False,
        after: After | None = None,
        say: Callable[[str], None] = print,
        patience: float = math.inf,
    ):
        check_config(grid.config)
        self.grid, self.data, self.device, self.keeps, self.after, self.say = grid, data, device, keeps, after, say
        self.patience = patience
        self.on_gpu = device.type == "cuda"
        self.lanes = lanes if self.on_gpu else 1
        self.plans = Plans(data, grid.config, kept=4 * self.lanes + 4)
        self.source = provenance()
        # Seeding, compiling and capturing are of the whole process: one thread at a time.
        self._making = threading.Lock()
        self._idle: dict[Entry, list[Program]] = defaultdict(list)
        self._costs: dict[Entry, tuple[int, int]] = {}

    def run(self, cells: list[Cell], deadline: float) -> Queue:
        """Train these runs, the earlier ones first, and start none that would not be done by the deadline.

        Where the queue comes back ``stuck``, threads wait for ever: the process can neither train nor end as usual.
        """
        queue = Queue(list(cells), deadline, self.grid.config.epochs)
        if self.on_gpu:
            sys.setswitchinterval(1e-4)  # a thread that draws or captures shall not keep the others from enqueueing
            next(iter(self.data.test_batches(batch_size=1, device=self.device)))  # brings the images there
            torch.cuda.synchronize()
        lanes = range(self.lanes)
        threads = [threading.Thread(target=self._lane, args=(queue,), name=f"lane {n}", daemon=True) for n in lanes]
        try:
            for thread in threads:
                thread.start()
            self._wait(threads, queue)
        finally:
            queue.deadline = -math.inf  # on Ctrl-C the lanes stop as at the deadline
            self._wait(threads, queue)
            self.plans.close()
        return queue

    def _wait(self, threads: list[threading.Thread], queue: Queue) -> None:
        """Until the threads have ended, or are stuck: then where each of them waits is printed."""
        while not queue.stuck and (alive := [thread for thread in threads if thread.is_alive()]):
            if math.isfinite(self.patience):  # this thread may be kept from looking, too
                faulthandler.dump_traceback_later(2 * self.patience + _LOOK, exit=True)
            alive[0].join(_LOOK)
            queue.stuck = queue.silence() > self.patience
        faulthandler.cancel_dump_traceback_later()
        if queue.stuck:
            faulthandler.dump_traceback()

    def _lane(self, queue: Queue) -> None:
        stream = torch.cuda.stream(torch.cuda.Stream(self.device)) if self.on_gpu else nullcontext()
        with stream:
            while cell := queue.take():
                failure: str | None = None
                try:
                    result = self._train(cell, queue)
                except OutOfTime:
                    failure = "out of time"
                except UserError as error:
                    failure = str(error)
                except Exception as error:  # of one run, which shall not end the others
                    failure = f"{type(error).__name__}: {in_one_line(error)}"
                    if not queue.failures:
                        traceback.print_exc()
                seconds = queue.end(cell, failure)
                said = failure or f"{result['test_top1']:.2f} %"
                self.say(f"{cell.entry.label} seed {cell.seed}: {said}, {seconds:.0f} s")

    def _train(self, cell: Cell, queue: Queue) -> dict[str, Any]:
        with self._making:
            begun = start(self.grid.config_of(cell), self.data, self._costs.get(cell.entry))
            self._costs[cell.entry] = begun.params, begun.macs
            program = self._program(cell.entry, begun)
        try:
            return train_cell(
                cell,
                begun,
                program,
                self.plans,
                self.source,
                keep_weights=self.keeps(cell),
                after=self.after,
                on_epoch=lambda epoch: self._note(queue, cell, epoch),
                out_of_time=lambda: time.monotonic() > queue.deadline,
            )
        finally:
            if self.on_gpu:
                torch.cuda.current_stream().synchronize()
            self._idle[cell.entry].append(program)

    def _note(self, queue: Queue, cell: Cell, epoch: int) -> None:
        queue.note_epoch(cell, epoch)
        if epoch == _PACE_EPOCHS and not queue.finished and cell.seed == self.grid.seeds[0]:
            self.say(f"{cell.entry.label}: {epoch} epochs; at this pace a run takes {queue.estimate():.0f} s")

    def _program(self, entry: Entry, begun: Start) -> Program:
        """One that has finished a run of such a network, or a new one."""
        if self._idle[entry]:
            return self._idle[entry].pop()
        program = Program(begun.config, self.data, copy.deepcopy(begun.network), self.device)
        if self.on_gpu:
            program.capture(compile_blocks=begun.config.compile)
        return program
