"""Cost of a comparison, estimated from a few steps of each network."""

import heapq
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from cmpe_se.commands.compare.grid import Cell, Grid
from cmpe_se.errors import UserError
from cmpe_se.layers.precision import emulation_warning
from cmpe_se.runtimes.engines import make_step
from cmpe_se.runtimes.timing import keep_heap, take_turns
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.network import create_network
from cmpe_se.training.run_data import load_configured
from cmpe_se.utils.devices import choose_device
from cmpe_se.utils.progress import with_progress
from cmpe_se.utils.tables import number_table
from cmpe_se.utils.text import counted, data_name

_TURNS = 3
_MOST_PIXELS = 2**19  # of a measured step on a CPU: 512 images of 32x32, 10 of 224x224


class Shape(NamedTuple):
    """What the cost depends on of a data set."""

    classes: tuple[str, ...]
    in_chans: int
    train_image_size: tuple[int, int]
    image_size: tuple[int, int]
    train_size: int
    test_size: int


_KNOWN = {  # classes, training images, test images, side
    "cifar10": (10, 50_000, 10_000, 32),
    "cifar100": (100, 50_000, 10_000, 32),
    "svhn": (10, 73_257, 26_032, 32),
    "svhn_extra": (10, 604_388, 26_032, 32),
    "imagenet": (1000, 1_281_167, 50_000, 224),
}


def shape_of(grid: Grid) -> Shape:
    """Of the grid's data; those that are the same everywhere need not be there, ImageNet where no folder is named."""
    config = grid.config
    if config.data in _KNOWN and (config.data != "imagenet" or config.data_dir is None):
        classes, train_size, test_size, side = _KNOWN[config.data]
        trained = config.image_size or side
        tested = config.test_image_size or trained
        return Shape(("",) * classes, 3, (trained, trained), (tested, tested), train_size, test_size)
    data = load_configured(config, image_size=config.image_size)
    return Shape(data.classes, data.in_chans, data.train_image_size, data.image_size, data.train_size, data.test_size)


def _images_at_a_time(config: TrainingConfig, shape: Shape, device: torch.device) -> int:
    """Images of a measured step: a part of the batch as accumulation makes it, and on a CPU what its memory holds."""
    part = -(-min(config.batch_size, shape.train_size) // config.accumulate)
    if device.type != "cpu":
        return part
    height, width = shape.image_size
    return max(2, min(part, _MOST_PIXELS // (height * width)))


def estimate(grid: Grid, cells: list[Cell], console: Console) -> list[dict[str, Any]]:
    """Hours that the unfinished runs of a grid take on this device, one after the other.

    Returns:
        A row for each network: ``model``, ``runs`` (unfinished), ``milliseconds`` of a training step (median of three),
        ``hours`` for all its runs. A step of more images than fit is measured with fewer and multiplied.
    """
    shape, config = shape_of(grid), grid.config
    device = choose_device(config.device)
    if device.type == "cpu":
        keep_heap()
    if warning := emulation_warning(config.precision, device.type):
        console.print(warning, soft_wrap=True)
    batch = min(config.batch_size, shape.train_size)
    measured = _images_at_a_time(config, shape, device)
    rows = []
    for entry in with_progress(grid.entries, "measuring", console=console):
        while True:
            try:
                seconds_an_image = _measure(config.changed(**entry.settings, pretrained=None), shape, device, measured)
                break
            except torch.OutOfMemoryError:
                if measured == 1:
                    raise UserError(f"out of memory: not even one image of {entry.label} fits on this device") from None
            torch.accelerator.empty_cache()
            measured = -(-measured // 2)
            console.print(
                f"the batch does not fit on this device: {counted(measured, 'image')} at a time are measured, and "
                f"training needs --accumulate {-(-batch // measured)}",
                soft_wrap=True,
            )
        runs = sum(cell.entry == entry and not cell.run.result.exists() for cell in cells)
        step = batch * seconds_an_image["training"]
        tests = -(-config.epochs // config.test_interval)
        training = config.epochs * max(1, shape.train_size // batch) * step
        seconds = training + tests * shape.test_size * seconds_an_image["forward"]
        rows.append(
            {
                "model": entry.label,
                "runs": runs,
                "milliseconds": round(1000 * step, 2),
                "hours": runs * seconds / 3600,
            }
        )
    return rows


def _measure(config: TrainingConfig, shape: Shape, device: torch.device, count: int) -> dict[str, float]:
    """Seconds an image of ``training`` and ``forward``, by steps of ``count`` images: the median of a few."""
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    dtype = "float32" if config.precision == "float32" else "bfloat16"
    labels = torch.randint(len(shape.classes), (count,)).to(device)
    steps = {}
    for mode, size in (("training", shape.train_image_size), ("forward", shape.image_size)):
        images = torch.randn(count, shape.in_chans, *size).to(device, memory_format=layout)
        network, _ = create_network(config, shape)
        network = network.to(device).to(memory_format=layout)
        engine = "compiled" if config.compile and mode == "training" else "eager"
        steps[mode] = make_step(network, images, labels, engine, mode, dtype)
    taken = take_turns(steps, range(_TURNS), device)
    return {mode: sorted(times)[_TURNS // 2] / count for mode, times in taken.items()}


def table_of_costs(grid: Grid, rows: list[dict[str, Any]]) -> Table:
    """The rows for the screen, with their sum."""
    config = grid.config
    cpu = choose_device(config.device).type == "cpu"
    unit = "GPU-hours" if not cpu else f"hours on {counted(torch.get_num_threads(), 'CPU thread')}"
    table = number_table(
        *("runs", "ms a step", "hours"),
        title=f"{grid.folder}: {counted(config.epochs, 'epoch')} of {data_name(config.data, config.data_dir)}, "
        f"batch {config.batch_size}, {config.precision}",
        title_justify="left",
        caption=f"{unit} for the runs to go, from {_TURNS} steps of each; without optimiser and augmentation",
        caption_justify="left",
    )
    for row in rows:
        table.add_row(row["model"], str(row["runs"]), f"{row['milliseconds']:.1f}", f"{row['hours']:.2f}")
    table.add_section()
    table.add_row("total", str(sum(row["runs"] for row in rows)), "", f"{sum(row['hours'] for row in rows):.2f}")
    return table


def hours_on_machines(rows: Sequence[Mapping[str, Any]], machines: int) -> float:
    """Hours until all runs of the rows are done on so many machines like this one, a run at a time on each.

    The runs begin with the longest ones, each on the machine that is free first. A comparison begins with the first
    seed, and may take up to a run longer.
    """
    free_at = [0.0] * machines
    runs = [row["hours"] / row["runs"] for row in rows for _ in range(row["runs"])]
    for hours in sorted(runs, reverse=True):
        heapq.heapreplace(free_at, free_at[0] + hours)
    return max(free_at)


def line_about_machines(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The hours on more machines, up to one for each run; None where there is one run, or none."""
    runs = sum(row["runs"] for row in rows)
    if runs < 2:
        return None
    numbers = sorted({2**power for power in range(1, 11) if 2**power < runs} | {runs})
    times = ", ".join(f"{hours_on_machines(rows, number):.2f} h on {number:,}" for number in numbers)
    total = sum(row["hours"] for row in rows)
    alone = f"{total:,.2f} h on one such machine, a run at a time"
    return f"{counted(runs, 'run')}, {total:,.2f} machine-hours: {alone}; {times}"
