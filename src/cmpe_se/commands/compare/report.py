"""Files of a comparison: compare.md, compare.csv, cells.csv and plots."""

from typing import Any

from cmpe_se.commands.compare.corruptions import CorruptionOutcomes
from cmpe_se.commands.compare.differences import USUAL, Question
from cmpe_se.commands.compare.grid import Cell, Grid
from cmpe_se.commands.compare.outcomes import Outcome
from cmpe_se.commands.compare.plots import plot_differences, plot_learning_curves, plot_pareto
from cmpe_se.commands.compare.presenting import references, summary_rows, to_markdown, to_rich
from cmpe_se.training.provenance import Hardware, provenance, write_table
from cmpe_se.training.summary import RunResult
from cmpe_se.utils.escaping import markdown_code
from cmpe_se.utils.files import os_errors_as, write_text
from cmpe_se.utils.terminal import Terminal
from cmpe_se.utils.text import counted, data_name, shortened


def write_report(
    grid: Grid,
    outcomes: list[Outcome],
    *,
    missing: int,
    question: Question = USUAL,
    corruptions: CorruptionOutcomes | None = None,
) -> list[dict[str, Any]]:
    """Write all of it into the grid's folder and print the table; returns the rows of ``compare.csv``.

    Args:
        grid: that the outcomes are of.
        outcomes: networks with at least one finished run.
        missing: runs that have not finished.
        question: margin and primary comparison.
        corruptions: the second measure, where it was asked for.
    """
    folder, config = grid.folder, grid.config
    compared = summary_rows(outcomes, question)
    rows = [{**row, **(corruptions.columns(row["model"]) if corruptions else {})} for row in compared]
    sections = [corruptions.to_markdown()] if corruptions else []
    data = shortened(data_name(config.data, config.data_dir), 60)
    order = [outcome.label for outcome in outcomes]
    title = f"{counted(len(outcomes), 'network')} on {data}, {counted(config.epochs, 'epoch')}"
    results = [(cell, cell.run.read_result()) for cell in grid.cells if grid.is_finished(cell)]
    notes = _notes(grid, [result for _, result in results], missing)
    with os_errors_as(f"cannot write to {folder}"):
        write_table(folder / "compare.csv", rows)
        write_table(folder / "cells.csv", _cell_rows(results, corruptions))
        text = to_markdown(outcomes, title=title, notes=notes, question=question, sections=sections)
        write_text(folder / "compare.md", text)
        plot_pareto(outcomes, title, folder / "accuracy_latency.png")
        plot_learning_curves(outcomes, title, folder / "learning_curves.png")
        for reference, name in zip(references(outcomes), ("differences.png", "differences_to_se.png"), strict=False):
            others = outcomes if reference is outcomes[0] else outcomes[1:]
            label = reference.label
            plot_differences(others, title, folder / name, reference=label, question=question, order=order)
        if corruptions and corruptions.outcomes:
            below = f"{title}, mean corruption accuracy"
            plot_differences(corruptions.outcomes, below, folder / "differences_corruptions.png", order=order)
    console = Terminal()
    console.print(to_rich(outcomes, question))
    if corruptions:
        corruptions.show(console)
    console.print(f"{folder / 'compare.md'}", highlight=False, soft_wrap=True)
    return rows


def _cell_rows(results: list[tuple[Cell, RunResult]], corruptions: CorruptionOutcomes | None) -> list[dict[str, Any]]:
    """A row for each finished run, with what made it."""
    return [
        {
            "model": cell.entry.label,
            "seed": cell.seed,
            "params": result["params"],
            "macs": result["macs"],
            "test_top1": result["test_top1"],
            "test_top5": result["test_top5"],
            "test_loss": result["test_loss"],
            "epochs": result["epochs"],
            **(corruptions.cell_columns(cell) if corruptions else {}),
            "train_seconds": round(result["train_seconds"], 1),
            "images_per_second": round(result["images_per_second"], 1),
            "cpu": result["hardware"]["cpu"],
            "threads": result["hardware"]["threads"],
            "gpu": result["hardware"]["gpu"],
            "torch": result["versions"]["torch"],
            "timm": result["versions"]["timm"],
            "commit": result["commit"],
        }
        for cell, result in results
    ]


def _notes(grid: Grid, results: list[RunResult], missing: int) -> list[str]:
    """What a reader has to know beside the tables."""
    config = grid.config
    hardware = sorted({_device(result["hardware"]) for result in results})
    commits = sorted({result["commit"] or "not known" for result in results})
    tf32 = ", TF32 in convolutions" if any(result.get("tf32") for result in results) else ""
    notes = [
        f"{counted(results[0]['train_images'], 'training image')}, all of "
        f"{counted(results[0]['test_images'], 'test image')} after the last epoch; batch {config.batch_size}, "
        f"{config.optimizer} at {config.lr:g}, {config.schedule} schedule, "
        f"weight decay {config.weight_decay:g}, {config.precision}{tf32}. `recipe.yaml` has everything.",
        f"Trained on {', '.join(hardware)}; commit {', '.join(commits)}; {_versions(results)}.",
        "Training time is the median over seeds, as it was: of runs beside others where several shared the machine. "
        "Latency is of merged networks (`cmpe_se.merge`, the same outputs), in float32 and in turns on one device, "
        "as a ratio to the first network with its 95 % interval.",
        f"Command: {markdown_code(provenance()['command'])}",
    ]
    if unlike := _unlike_seeds(results):
        seeds = f"seed{'s' if len(unlike) > 1 else ''} {', '.join(map(str, unlike))}"
        notes.insert(
            0,
            f"**Of {seeds} the networks were not all trained on the same hardware with the same versions** "
            "(`cells.csv`): what these change, rounding at least, is part of their differences.",
        )
    if missing:
        notes.insert(
            0,
            f"**{counted(missing, 'run')} still to finish**; the differences are over the seeds that two networks "
            "share.",
        )
    return notes


def _versions(results: list[RunResult]) -> str:
    """Of the runs, not of this process: ``torch 2.14.1, timm 1.0.29 or 1.0.31``."""
    names = dict.fromkeys(name for result in results for name in result["versions"])
    found = {name: sorted({result["versions"].get(name, "not known") for result in results}) for name in names}
    return ", ".join(f"{name} {' or '.join(versions)}" for name, versions in found.items())


def _unlike_seeds(results: list[RunResult]) -> list[int]:
    """Seeds whose networks differ in more than the network: device, threads, TF32, or a version of PyTorch or timm."""
    made: dict[int, set[tuple]] = {}
    for result in results:
        versions = [result["versions"].get(name) for name in ("torch", "timm")]
        made.setdefault(result["seed"], set()).add((_device(result["hardware"]), bool(result.get("tf32")), *versions))
    return sorted(seed for seed, ways in made.items() if len(ways) > 1)


def _device(hardware: Hardware) -> str:
    return hardware["gpu"] or f"{hardware['cpu']} ({counted(hardware['threads'], 'thread')})"
