"""What a call leaves for people and for other machines: a table, and all small files in one."""

import tarfile
from pathlib import Path

from rich.console import Console

from cmpe_se.commands.compare.grid import Grid
from cmpe_se.commands.compare.outcomes import collect
from cmpe_se.commands.compare.statistics import compare_paired, summarise
from cmpe_se.utils.tables import number_table

_SMALL_FILES = ("config.yaml", "metrics.jsonl", "result.json", "corruptions.json", "commit")  # as in experiment.sh


def print_table(grid: Grid, console: Console) -> None:
    """Mean top-1 of each network, and its difference to the first one over the seeds that both have finished."""
    outcomes = collect(grid, {})
    table = number_table("seeds", "top-1, %", "std", "difference", "95 % interval", "p", pad_edge=False)
    for outcome in outcomes:
        own = summarise(list(outcome.seeds.values()))
        row = [outcome.label, str(own.count), f"{own.mean:.2f}", f"{own.std:.2f}" if own.count > 1 else ""]
        pairs = [seed for seed in outcome.seeds if seed in outcomes[0].seeds]
        if outcome is not outcomes[0] and pairs:
            found = compare_paired(*([o.seeds[seed] for seed in pairs] for o in (outcome, outcomes[0])))
            row.append(f"{found.mean:+.2f}")
            if found.count > 1:
                row += [f"{found.low:+.2f} to {found.high:+.2f}", f"{found.p:.4f}"]
        table.add_row(*row)
    console.print(table)


def pack(grid: Grid) -> Path:
    """``cells.tar.gz`` in the grid's folder: recipe, and all small files of the finished runs."""
    packed = grid.folder / "cells.tar.gz"
    finished = sorted(path.parent for path in grid.folder.glob("cells/*/result.json"))
    files = [grid.recipe, *(file for run in finished for name in _SMALL_FILES if (file := run / name).exists())]
    with tarfile.open(packed, "w:gz") as archive:
        for file in files:
            archive.add(file, file.relative_to(grid.folder))
    return packed
