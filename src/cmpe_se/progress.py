"""What a training run shows while it goes."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class TrainingProgress:
    """A bar over the whole run on a terminal, one line an epoch elsewhere, and nothing but on the main process.

    Args:
        epochs: of the run.
        steps: of the run, all epochs together.
        enabled: False shows nothing.
    """

    def __init__(self, epochs: int, steps: int, *, enabled: bool = True):
        self.epochs, self.enabled = epochs, enabled
        self.console = Console(stderr=True, quiet=not enabled)
        self.bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not enabled or not self.console.is_terminal,
        )
        self.task = self.bar.add_task("", total=steps, epoch=f"1/{epochs}", figures="")

    def __enter__(self) -> "TrainingProgress":
        self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        self.bar.stop()

    def start(self, step: int) -> None:
        """Say where the run starts, for a resumed one."""
        self.bar.reset(self.task, completed=step)

    def update(self, epoch: int, step: int, loss: float, top1: float | None, images_per_second: float) -> None:
        """Show the figures of the epoch so far: mean loss and, where labels are not mixed, accuracy in percent."""
        accuracy = "" if top1 is None else f"  top-1 {top1:.1f} %"
        figures = f"{images_per_second:,.0f} images/s  loss {loss:.3f}{accuracy}"
        self.bar.update(self.task, completed=step, epoch=f"{epoch}/{self.epochs}", figures=figures)

    def end_epoch(self, record: dict[str, Any]) -> None:
        """Leave a line for a finished epoch."""
        self.console.print(
            f"epoch {record['epoch']:>3}/{self.epochs}  loss {record['train_loss']:.3f}  test loss "
            f"{record['test_loss']:.3f}  test top-1 {record['test_top1']:.2f} %  "
            f"{record['images_per_second']:,.0f} images/s",
            highlight=False,
        )

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        self.console.print(message, highlight=False, soft_wrap=True, markup=False)
