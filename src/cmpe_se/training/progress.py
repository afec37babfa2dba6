"""Progress of a training run on the terminal."""

from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from cmpe_se.data import ImageData
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.summary import EpochRecord
from cmpe_se.utils.terminal import Terminal
from cmpe_se.utils.text import counted, data_name, gate_words, pruned_word


def opening(
    config: TrainingConfig,
    data: ImageData,
    *,
    validation_images: int,
    view: str | None,
    params: int,
    steps_per_epoch: int,
    device: torch.device,
    run: Path,
) -> str:
    """What is trained on what, for how long, where, and where it goes to: the first line of a run.

    Args:
        config: of the run.
        data: that it trains on.
        validation_images: number of those held out.
        view: the network's own; None for one without gates, or one that is converted.
        params: trainable parameters.
        steps_per_epoch: of the optimiser.
        device: of the first process.
        run: its folder.
    """
    own = f" with view {view}" if view else ""
    gates = f" converted to {config.convert}" if config.convert else own
    threads = f" ({counted(torch.get_num_threads(), 'thread')})" if device.type == "cpu" else ""
    height, width = data.train_image_size
    tested = "" if data.image_size == data.train_image_size else " (tested at {}x{})".format(*data.image_size)
    held_out = f", {counted(validation_images, 'validation image')}" if validation_images else ""
    return (
        f"{config.model}{gates}{gate_words(config.gate_settings)}{pruned_word(config.widths)} ({params:,} parameters) "
        f"on {data_name(config.data, config.data_dir)}: {counted(data.train_size, 'training image')}{held_out} and "
        f"{counted(data.test_size, 'test image')} of {height}x{width} pixels{tested}, "
        f"{counted(config.epochs, 'epoch')} of {counted(steps_per_epoch, 'step')} of "
        f"{counted(config.batch_size, 'image')} on {device.type}{threads}, "
        f"run folder {run}"
    )


def only_warmup(config: TrainingConfig) -> str | None:
    """A sentence on a run that ends before its learning rate has risen; None for others."""
    if config.epochs > config.warmup_epochs:
        return None
    warmup = "its first epoch" if config.warmup_epochs == 1 else f"its first {config.warmup_epochs} epochs"
    return (
        f"all of this run is warm-up: the learning rate rises to {config.lr:g} over {warmup}, and epochs is "
        f"{config.epochs}; give more --epochs, or --warmup-epochs 0"
    )


class TrainingProgress:
    """A bar over the whole run on a terminal, one line an epoch elsewhere, and nothing but on the main process.

    Args:
        epochs: of the run.
        steps: of the run, all epochs together.
        enabled: False shows nothing.
    """

    def __init__(self, epochs: int, steps: int, *, enabled: bool = True):
        self.epochs, self.steps, self.enabled = epochs, steps // epochs, enabled
        self.console = Terminal(stderr=True, quiet=not enabled)
        self.bar = Progress(
            TextColumn("epoch {task.fields[epoch]}  step {task.fields[step]}"),
            TextColumn("{task.fields[metrics]}"),
            TextColumn("whole run"),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:.0f} %, left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not enabled or not self.console.is_terminal,
        )
        self.task = self.bar.add_task("", total=steps, epoch=f"1/{epochs}", step=f"0/{self.steps}", metrics="")

    def __enter__(self) -> "TrainingProgress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def start(self, step: int) -> None:
        """Say where the run starts, for a resumed one."""
        self.bar.reset(self.task, completed=step)

    def update(self, epoch: int, step: int, loss: float, top1: float | None, images_per_second: float) -> None:
        """Show the metrics of the epoch so far: mean loss and, where labels are not mixed, accuracy in percent."""
        accuracy = "" if top1 is None else f"  top-1 {top1:.1f} %"
        metrics = f"{images_per_second:,.0f} images/s  loss {loss:.3f}{accuracy}"
        done = f"{step - (epoch - 1) * self.steps}/{self.steps}"
        self.bar.update(self.task, completed=step, epoch=f"{epoch}/{self.epochs}", step=done, metrics=metrics)

    def end_epoch(self, record: EpochRecord) -> None:
        """Leave a line for a finished epoch."""
        tested = ""
        if (top1 := record.get("validation_top1")) is not None:
            tested = f"validation loss {record['validation_loss']:.3f}  validation top-1 {top1:.2f} %  "
        elif record["test_top1"] is not None:
            tested = f"test loss {record['test_loss']:.3f}  test top-1 {record['test_top1']:.2f} %  "
        self.console.print(
            f"epoch {record['epoch']:>3}/{self.epochs}  loss {record['train_loss']:.3f}  {tested}"
            f"{record['images_per_second']:,.0f} images/s",
            soft_wrap=True,
        )

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        self.console.print(message, soft_wrap=True)
