"""The second measure of a comparison: mean accuracy on corrupted test images, paired by seed as the first one is."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from rich.console import Console

from cmpe_se.commands.compare.differences import USUAL, Question
from cmpe_se.commands.compare.grid import Cell, Grid
from cmpe_se.commands.compare.outcomes import Outcome
from cmpe_se.commands.compare.presenting import (
    ComparisonRow,
    difference_table,
    half_interval,
    markdown_table,
    p_value,
    references,
    summary_rows,
)
from cmpe_se.data import ImageData, Listing, Preprocessing, SmallImages
from cmpe_se.data.corruptions import CORRUPTIONS, corrupted_test_sets
from cmpe_se.training.robustness import (
    CorruptionRecord,
    by_corruption,
    corruption_metrics,
    read_corruptions,
    write_corruptions,
)
from cmpe_se.training.run_data import load_configured
from cmpe_se.training.run_images import read_listing
from cmpe_se.utils.devices import choose_device
from cmpe_se.utils.escaping import markdown_code
from cmpe_se.utils.tables import number_table
from cmpe_se.utils.text import counted

_CACHED_BYTES = 2**30
_COLUMNS = (
    *("difference", "difference_low", "difference_high", "p", "p_holm", "effect", "difference_std", "detectable"),
    *("p_same", "p_same_holm", "verdict"),
)  # of ``compare.csv``


def measure_corruptions(grid: Grid, cells: Sequence[Cell], console: Console) -> None:
    """Test the finished runs among ``cells`` on corrupted images, and leave ``corruptions.json`` in their folders.

    Runs that have that file, for the same data and parameters, are left alone; so are those without weights.

    Raises:
        UserError: streamed data, or a network or folder that cannot be used.
    """
    config = grid.config
    waiting = [cell for cell in cells if grid.is_finished(cell) and _read(grid, cell) is None and _has_weights(cell)]
    if not waiting:
        return
    device = choose_device(config.device)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    by_images: dict[tuple[Preprocessing, Listing], list[Cell]] = {}  # runs of several versions may take others
    for cell in waiting:
        by_images.setdefault((cell.run.preprocessing(), read_listing(cell.run)), []).append(cell)
    number = 0
    for (preprocessing, listing), alike in by_images.items():
        data = load_configured(config, preprocessing=preprocessing, listing=listing)
        corrupted = list(corrupted_test_sets(data)) if len(alike) > 1 and _fits(data) else None
        for cell in alike:
            number += 1
            metrics = corruption_metrics(
                cell.run.load_model().to(device).to(memory_format=layout),
                data,
                corrupted=corrupted,
                device=device,
                channels_last=config.channels_last,
                progress=f"corrupted images, run {number} of {len(waiting)}",
            )
            write_corruptions(cell.run.path, metrics, data)
    console.print(f"{counted(len(waiting), 'run')} tested on corrupted images", highlight=False)


class CorruptionOutcomes:
    """What the finished runs of a grid have on corrupted images; read from their folders.

    Args:
        grid: the comparison.
        outcomes: of its finished runs, as the first measure has them.
        margin: of the equivalence test, in points. Only the first measure has a primary comparison.
    """

    def __init__(self, grid: Grid, outcomes: Sequence[Outcome], margin: float = USUAL.margin):
        self._question = Question(margin)
        self._metrics: dict[str, dict[int, CorruptionRecord]] = {}
        self.missing: list[Cell] = []
        """Finished runs without a corruption accuracy: neither weights nor a file of it are there."""
        for cell in grid.cells:
            if not grid.is_finished(cell):
                continue
            metrics = _read(grid, cell)
            if metrics is None:
                self.missing.append(cell)
            else:
                self._metrics.setdefault(cell.entry.label, {})[cell.seed] = metrics
        self.outcomes = [
            outcome._replace(seeds={seed: each["mean"] for seed, each in self._metrics[outcome.label].items()})
            for outcome in outcomes
            if outcome.label in self._metrics
        ]
        """Networks with the mean corruption accuracy in the place of the clean one, those without one left out."""
        self._has_reference = bool(self.outcomes) and self.outcomes[0].label == outcomes[0].label

    def columns(self, label: str) -> dict[str, Any]:
        """More columns for a network's row of ``compare.csv``; None where something is not known."""
        row: Mapping[str, Any] = next((row for row in self._rows() if row["model"] == label), {})
        names = {"corruption_seeds": "seeds"}
        names |= {f"corruption_{end}": f"top1_{end}" for end in ("mean", "low", "high", "std")}
        names |= {f"corruption_{name}": name for name in _COLUMNS}
        return {name: row.get(source) for name, source in names.items()}

    def cell_columns(self, cell: Cell) -> dict[str, float | None]:
        """More columns for a run's row of ``cells.csv``: accuracies over all corruptions, and over each."""
        metrics = self._metrics.get(cell.entry.label, {}).get(cell.seed)
        names = ["corruption_mean", *(f"corruption_{name}" for name in CORRUPTIONS)]
        if metrics is None:
            return dict.fromkeys(names)
        values = [metrics["mean"], *map(fmean, by_corruption(metrics).values())]
        return {name: round(value, 4) for name, value in zip(names, values, strict=True)}

    def to_markdown(self) -> str:
        """The measure's part of ``compare.md``: its table, and tables of differences with Holm's adjustment each."""
        parts = ["## Corrupted images", _METHOD]
        if self.missing:
            names = ", ".join(f"{markdown_code(cell.entry.label)} seed {cell.seed}" for cell in self.missing)
            parts.append(f"**Left out**: {names}, without weights and corruptions.json.")
        if not self.outcomes:
            return "\n\n".join(parts)
        head = ["network", "mean corruption accuracy, %", "seeds", *CORRUPTIONS]
        rows = []
        for outcome, row in zip(self.outcomes, self._rows(), strict=True):
            half = half_interval(row["top1_low"], row["top1_high"])
            each = [by_corruption(metrics) for metrics in self._metrics[outcome.label].values()]
            means = [f"{fmean(fmean(accuracies[name]) for accuracies in each):.2f}" for name in CORRUPTIONS]
            rows.append([markdown_code(outcome.label), f"{row['top1_mean']:.2f}{half}", str(row["seeds"]), *means])
        parts.append(markdown_table(head, *rows))
        if not self._has_reference:
            return "\n\n".join(parts)
        for reference in references(self.outcomes):
            heading = "### Corrupted images, against"
            parts.append(difference_table(self.outcomes, reference, self._question, heading=heading))
        return "\n\n".join(filter(None, parts))

    def show(self, console: Console) -> None:
        """Print what matters most of it, and which runs are left out."""
        table = number_table("corrupted", "difference", "p", pad_edge=False, padding=(0, 1, 0, 0))
        for row in self._rows():
            table.add_row(
                row["model"],
                f"{row['top1_mean']:.2f}",
                _plus_minus(row),
                "" if row["p_holm"] is None else p_value(row["p_holm"]),
            )
        console.print(table)
        for cell in self.missing:
            console.print(
                f"{cell.entry.label} seed {cell.seed} has no corruption accuracy: neither its weights nor "
                f"corruptions.json are in {cell.run.path}",
                highlight=False,
                soft_wrap=True,
            )

    def _rows(self) -> list[ComparisonRow]:
        """Rows of the first measure's form; without a reference they hold no differences."""
        if self._has_reference:
            return summary_rows(self.outcomes, self._question)
        return [summary_rows([outcome])[0] for outcome in self.outcomes]


_METHOD = (
    "Mean test top-1 over five corruptions (contrast, brightness, noise, blur and JPEG compression), each with five "
    "severities; `corruptions.json` of each run has their parameters. All networks are tested on the same images. The "
    "statistics are those of the first measure, and Holm's adjustment counts the comparisons of a table."
)


def _plus_minus(row: ComparisonRow) -> str:
    if row["difference"] is None:
        return ""
    return f"{row['difference']:+.2f}{half_interval(row['difference_low'], row['difference_high'])}"


def _read(grid: Grid, cell: Cell) -> CorruptionRecord | None:
    return read_corruptions(cell.run.path, grid.config.data)


def _has_weights(cell: Cell) -> bool:
    return (cell.run.model / "model.safetensors").is_file()


def _fits(data: ImageData) -> bool:
    """Whether all corrupted test images may be held at once."""
    height, width = data.image_size
    size = data.test_size * data.in_chans * height * width
    return isinstance(data, SmallImages) and 5 * len(CORRUPTIONS) * size <= _CACHED_BYTES
