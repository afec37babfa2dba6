"""All that watches one training, in one object that the loop calls at a few places."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cmpe_se.data import ImageData
from cmpe_se.errors import UserError
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.interruption import Interrupted
from cmpe_se.training.loss import loss_label
from cmpe_se.training.run_folder import RunFolder
from cmpe_se.training.step_sums import TrainingMetrics
from cmpe_se.training.summary import EpochRecord
from cmpe_se.training.tester import shard_of
from cmpe_se.training.watching.gates import (
    GatesRecord,
    GateWatch,
    has_gates,
    read_records,
    tracked_numbers,
    warning_of,
    write_records,
)
from cmpe_se.training.watching.page import REFRESH, Status, render_page
from cmpe_se.training.watching.profiling import StepProfiler
from cmpe_se.training.watching.trackers import Trackers, tracker_names
from cmpe_se.utils.files import write_text
from cmpe_se.utils.text import data_name, duration, in_one_line

_PART = 0.01  # of an epoch's time that a page may take, where it is written more often than a browser looks
_SILENCE = 600.0  # seconds without a new page that need not mean anything: a test, a slow disk


class Watch:
    """Trackers, gates, the page and the profiler of one run. All processes have one; the main one writes.

    Args:
        config: of the run.
        data: it trains on.
        network: that learns, not compiled or wrapped.
        run: its folder.
        accelerator: of the run.
        say: prints a line.
        history: records of the finished epochs, which the loop adds to.
        step: finished steps.
        steps: of the whole run.
    """

    def __init__(
        self,
        config: TrainingConfig,
        data: ImageData,
        network: nn.Module,
        run: RunFolder,
        accelerator: Accelerator,
        say: Callable[[str], None],
        *,
        history: Sequence[EpochRecord],
        step: int,
        steps: int,
    ):
        self._config, self._data, self._run, self._accelerator, self._say = config, data, run, accelerator, say
        self._main, self._history, self._step, self._steps = accelerator.is_main_process, history, step, steps
        self._gates = GateWatch(network, data.train_size) if has_gates(network) else None
        self._images: Tensor | None = None
        self._is_last = False
        self._records: list[GatesRecord] = []
        self._trackers = Trackers(tracker_names(config) if self._main else [], run.path, run.trackers, say)
        self._profiler: StepProfiler | None = None
        self._began, self._first_step, self._page_at, self._page_seconds = time.monotonic(), step, 0.0, 0.0
        self._broken: set[str] = set()
        self._facts: list[tuple[str, str]] = []

    def __enter__(self) -> "Watch":
        if self._main:
            self._trackers.start(self._config, len(self._history))
            self._read_records()
            if self._config.profile and self._run.trace.exists():
                self._say(f"profile: {self._run.trace} is there already; delete it for a new one")
            elif self._config.profile and self._step < self._steps:
                left, device = self._steps - self._step, self._accelerator.device
                self._profiler = StepProfiler(self._run.trace, left, device, self._say)
            self._page("running", now=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self._profiler:
            self._profiler.stop()
        if not self._main:
            return
        if error is None:
            self._page("finished", now=True)
        elif isinstance(error, (Interrupted, KeyboardInterrupt)):
            self._page("stopped", now=True)
        else:
            self._page("failed", now=True, reason=in_one_line(error))
        self._trackers.finish()

    def before_step(self, images: Tensor, *, last: bool) -> None:
        """Keep some of an epoch's last images (B, C, H, W) for the gates: mixup writes over them."""
        self._is_last = last
        if last and self._gates:
            self._images = images[: self._gates.images].clone()

    def after_backward(self, step: int) -> None:
        """Look at the gradients of a step, counted from 1."""
        if self._gates:
            self._gates.see_gradients(step, last=self._is_last)

    def after_step(self) -> None:
        """Count a step."""
        self._step += 1
        if self._profiler:
            self._profiler.step()

    def looked(self, step: int, metrics: TrainingMetrics) -> None:
        """Show the metrics of the epoch so far, at one of the steps where the loop waits for the device."""
        if self._main:
            self._facts = [
                ("loss of this epoch so far", f"{metrics['train_loss']:.4f}"),
                ("images a second", f"{metrics['images_per_second']:,.0f}"),
            ]
            self._page("running")

    def measure_gates(self) -> None:
        """After an epoch, on all processes: statistics of the gates, and a line for each that has died."""
        if not self._gates:
            return
        gradients = self._accelerator.reduce(self._gates.take_gradients(self._accelerator.device)).tolist()
        if "gates" in self._broken:
            return
        record = self._history[-1]
        try:
            images = self._images if self._images is not None else self._last_images(record["epoch"] - 1)
            self._images = None
            if self._config.channels_last and images.ndim == 4:
                images = images.to(memory_format=torch.channels_last)
            before = self._records[-1]["gates"] if self._records else {}
            gates = self._gates.measure(images, gradients, before=before, autocast=self._accelerator.autocast())
        except Exception as error:  # a gate of one's own that cannot be seen, memory that does not reach
            self._give_up("gates", f"the gates are not measured: {in_one_line(error)}")
            return
        if not self._main:
            return
        count = min(len(images), self._gates.images)
        known = {block for old in self._records for block, each in old["gates"].items() if each["dead"]}
        self._records.append({"epoch": record["epoch"], "step": record["step"], "images": count, "gates": gates})
        for block, statistics in gates.items():
            if block not in known and (warning := warning_of(block, statistics, record["epoch"])):
                self._say(warning)
        self._write("gates.jsonl", lambda: write_records(self._run.gates, self._records))

    def end_epoch(self) -> None:
        """Tell trackers and page of a finished epoch, once its checkpoint is written."""
        if not self._main:
            return
        self._tell_trackers()
        self._facts = []
        cheap = self._page_seconds < _PART * self._history[-1]["seconds"]
        self._page("running", now=cheap)

    def _tell_trackers(self) -> None:
        self._trackers.log(self._history, {record["epoch"]: tracked_numbers(record) for record in self._records})

    def finish(self, kept: EpochRecord) -> None:
        """Tell trackers the test of the epoch that the run keeps, on the main process."""
        if self._config.validation:
            self._trackers.log_test(kept, self._history[-1])

    def _last_images(self, epoch: int) -> Tensor:
        """Those of a run that is resumed right after an epoch's last step, which has not passed here."""
        batches = self._data.train_batches(
            epoch,
            batch_size=self._config.batch_size,
            seed=self._config.seed,
            augmentation=self._config.augmentation,
            start=self._data.steps_per_epoch(self._config.batch_size) - 1,
            **shard_of(self._accelerator),
        )
        return next(iter(batches))[0]

    def _read_records(self) -> None:
        try:
            self._records = read_records(self._run.gates, len(self._history))
        except (OSError, ValueError) as error:
            self._say(f"{self._run.gates} cannot be read and begins anew: {in_one_line(error)}")

    def _page(self, state: str, *, now: bool = False, reason: str = "") -> None:
        """Write ``progress.html``, unless a browser has not looked at the last one yet."""
        began = time.monotonic()
        if not now and began - self._page_at < REFRESH:
            return
        name = data_name(self._config.data, self._config.data_dir)
        gates = self._config.view or self._config.convert
        title = f"{self._config.model}{f' ({gates})' if gates else ''} on {name}"
        per_epoch = max((record["seconds"] for record in self._history), default=0.0)
        status = Status(state, self._all_facts(state), max(_SILENCE, 3 * per_epoch), reason)
        blocks = self._records[-1]["gates"] if self._records else {}
        ranges = {block: self._gates.range_of(block) for block in blocks} if self._gates else {}
        loss = loss_label(self._config)
        parts = (title, status, self._config.epochs, self._history, self._records, ranges, loss)
        self._write("progress.html", lambda: write_text(self._run.progress, render_page(*parts)))
        self._page_at = time.monotonic()
        self._page_seconds = self._page_at - began

    def _all_facts(self, state: str) -> list[tuple[str, str]]:
        done, last = self._step - self._first_step, self._history[-1] if self._history else None
        facts = [
            ("run", str(self._run.path)),
            ("finished epochs", f"{len(self._history)} of {self._config.epochs}"),
            ("step", f"{self._step:,} of {self._steps:,}"),
            *self._facts,
        ]
        if last:
            tested = "validation" if last.get("validation_top1") is not None else "test"
            known = [record for record in self._history if record.get(f"{tested}_top1") is not None]
            if known:
                facts.append((f"{tested} top-1", f"{known[-1][f'{tested}_top1']:.2f} %"))  # type: ignore[literal-required]
        if state == "running" and done:
            left = (time.monotonic() - self._began) / done * (self._steps - self._step)
            facts.append(("time left, about", duration(left)))
        return facts

    def _write(self, name: str, write: Callable[[], Any]) -> None:
        """Write a file that training can do without."""
        if name in self._broken:
            return
        try:
            write()
        except UserError as error:
            self._give_up(name, f"{name} is written no more, training goes on: {error}")

    def _give_up(self, what: str, message: str) -> None:
        self._broken.add(what)
        self._say(message)
