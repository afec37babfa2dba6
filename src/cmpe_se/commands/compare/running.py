"""The runs of a comparison, with a table of their progress."""

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from statistics import fmean

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table

from cmpe_se.commands.compare.cells import ELSEWHERE, STOPPED, Job
from cmpe_se.commands.compare.grid import Cell, Grid
from cmpe_se.commands.compare.places import Place
from cmpe_se.errors import UserError
from cmpe_se.training.interruption import Interrupted, Interruption

_LOOK = 0.5  # seconds between two looks at the runs
_SAID = 60.0  # seconds between two lines about them, where there is no terminal to redraw


class ComparisonInterrupted(Interrupted):
    """A comparison ended early on request; its runs have saved what they had."""

    def __init__(self, finished: int, total: int):
        super().__init__(f"stopped with {finished} of {total} runs finished; run the same command to continue")


def run_cells(grid: Grid, cells: Sequence[Cell], place: Place, console: Console) -> dict[Cell, str]:
    """Train the unfinished ones of ``cells``; returns why some have not finished, one line each.

    Raises:
        ComparisonInterrupted: Ctrl-C or SIGTERM.
    """
    waiting = [cell for cell in cells if not cell.run.result.exists()]
    failures: dict[Cell, str] = {}
    if not waiting:
        return failures
    console.print(
        f"{len(cells) - len(waiting)} of {len(cells)} runs are finished, {len(waiting)} to go: {place.describe()}",
        highlight=False,
    )
    board = _Board(grid, failures)
    with Interruption() as interruption, Live(console=console, transient=True, auto_refresh=False) as live:
        futures = {place.submit(_job(grid, cell)): cell for cell in waiting}
        stopping, said = False, time.monotonic()
        while futures:
            if interruption.requested and not stopping:
                stopping = True
                console.print("stopping: the current runs save checkpoints", highlight=False)
                place.stop()
            for future in [future for future in futures if future.done()]:
                cell = futures.pop(future)
                # The recipe and the flags make the settings in another process: what they made is in the run's folder.
                if reason := _outcome(future) or grid.mismatch(cell):
                    failures[cell] = reason
                if not console.is_terminal:
                    console.print(board.line(cell), highlight=False, soft_wrap=True)
            if console.is_terminal:
                live.update(board.table(), refresh=True)
            elif time.monotonic() - said > _SAID and (line := board.begun(futures.values())):
                said = time.monotonic()
                console.print(line, highlight=False, soft_wrap=True)
            time.sleep(_LOOK if futures else 0)
    if interruption.requested:
        raise ComparisonInterrupted(sum(cell.run.result.exists() for cell in cells), len(cells))
    return failures


def _job(grid: Grid, cell: Cell) -> Job:
    run, recipe = (str(path.absolute()) for path in (cell.run.path, grid.recipe))
    return Job(run, recipe, tuple(grid.settings_of(cell).items()))


def _outcome(future: Future) -> str | None:
    if future.cancelled():
        return STOPPED
    error = future.exception()
    return future.result() if error is None else " ".join(str(error).split())[-300:]


class _Board:
    """What is known of each run during the comparison."""

    def __init__(self, grid: Grid, failures: dict[Cell, str]):
        self.grid, self.failures = grid, failures

    def table(self) -> Table:
        """A row for each network, a column for each seed."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("test top-1, %")
        for seed in self.grid.seeds:
            table.add_column(f"seed {seed}", justify="right", no_wrap=True)
        table.add_column("mean", justify="right")
        for entry in self.grid.entries:
            cells = [self.grid.cell(entry, seed) for seed in self.grid.seeds]
            finished = [cell for cell in cells if cell.run.result.exists() and cell not in self.failures]
            accuracies = [cell.run.read_result()["test_top1"] for cell in finished]
            mean = f"{fmean(accuracies):.2f}" if finished else ""
            table.add_row(entry.label, *(self.state(cell) for cell in cells), mean)
        return table

    def line(self, cell: Cell) -> str:
        """A run that has ended, where there is no terminal to redraw."""
        return f"{cell.entry.label} seed {cell.seed}: {self.failures.get(cell) or self.state(cell) + ' %'}"

    def begun(self, cells: Iterable[Cell]) -> str:
        """The epochs of those of ``cells`` that have begun, in one line; empty if none has."""
        states = ((cell, self.state(cell)) for cell in cells)
        return ", ".join(f"{cell.entry.label} seed {cell.seed}: {state}" for cell, state in states if "/" in state)

    def state(self, cell: Cell) -> str:
        """Accuracy of a finished run, epochs of one under way."""
        if cell in self.failures:
            return self.failures[cell] if self.failures[cell] in (STOPPED, ELSEWHERE) else "failed"
        if cell.run.result.exists():
            return f"{cell.run.read_result()['test_top1']:.2f}"
        if not cell.run.config.exists():
            return "-"
        try:
            epochs = len(cell.run.metrics.read_text().splitlines())
        except OSError:
            epochs = 0
        return f"{epochs}/{self.grid.config.epochs}"


def finish_or_complain(failures: dict[Cell, str]) -> None:
    """Name the runs that failed.

    Raises:
        UserError: if there are any.
    """
    failed = {cell: reason for cell, reason in failures.items() if reason != ELSEWHERE}
    if failed:
        cell, reason = next(iter(failed.items()))
        others = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise UserError(
            f"{cell.entry.label} with seed {cell.seed} failed{others}: {reason}; its log is {cell.log}; correct "
            "the cause, then run the same command to continue"
        )
