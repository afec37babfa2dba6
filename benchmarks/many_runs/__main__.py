"""The command line; ``benchmarks/many_runs/__init__.py`` says what it is for."""

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import benchmarks.many_runs as package
import torch
import yaml
from benchmarks.many_runs.cells import After
from benchmarks.many_runs.lanes import Lanes, Queue
from benchmarks.many_runs.table import pack, print_table
from rich.console import Console
from torch import nn

from cmpe_se.commands.compare.compare import VARIED
from cmpe_se.commands.compare.differences import USUAL, ask
from cmpe_se.commands.compare.grid import Cell, Grid, parse_entries
from cmpe_se.data import SmallImages
from cmpe_se.data.corruptions import corrupted_test_sets
from cmpe_se.errors import UserError
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.data_settings import with_whole_paths, without_foreign_augmentation
from cmpe_se.training.provenance import provenance
from cmpe_se.training.robustness import corruption_metrics, write_corruption_record
from cmpe_se.training.run_data import load_configured
from cmpe_se.training.run_folder import write_text
from cmpe_se.utils.devices import choose_device
from cmpe_se.utils.text import in_one_line, split_names

_STUCK = 75  # exit status, of sysexits.h: a failure that another try may not have
_SPARE = 15.0  # seconds of the time limit that are left for the table and the archive


def main(arguments: Sequence[str] | None = None) -> Queue:
    """Train what is not finished, and say what came of it."""
    begun = time.monotonic()
    options, settings = _parse(sys.argv[1:] if arguments is None else arguments)
    console = Console(width=140, soft_wrap=True, highlight=False)
    grid, data = _prepare(options, settings)
    device = choose_device(grid.config.device)
    if device.type == "cuda":
        torch.set_num_threads(1)  # what is left to the CPU is small, and several threads do it
    waiting = [cell for cell in grid.cells if not cell.run.result.exists()]
    console.print(
        f"{len(grid.cells) - len(waiting)} of {len(grid.cells)} runs are finished; data and start took "
        f"{time.monotonic() - begun:.0f} s"
    )
    lanes = Lanes(
        grid,
        data,
        device,
        lanes=min(options.lanes, max(1, len(waiting))),
        keeps=lambda cell: (
            options.keep_weights == "all" or (options.keep_weights == "first" and cell.seed == grid.seeds[0])
        ),
        after=_corruption_test(data, device, grid.config) if options.corruptions else None,
        say=lambda line: console.print(f"{time.monotonic() - begun:5.0f} s  {line}"),
        patience=options.patience,
    )
    queue = lanes.run(waiting, begun + 60 * options.minutes - _SPARE)
    if queue.stuck:
        console.print(
            f"no epoch has ended for {options.patience:g} s: the device is stuck, and the runs under way are given up; "
            "the same command continues, and --lanes=1 keeps runs from waiting for each other"
        )
    if queue.cells:
        console.print(f"{len(queue.cells)} runs not begun: the same command continues with them")
    if any(cell.run.result.exists() for cell in grid.cells):
        print_table(grid, console)
        console.print(str(pack(grid)))
    return queue


def _corruption_test(data: SmallImages, device: torch.device, config: TrainingConfig) -> After:
    """Leaves ``corruptions.json`` as `cmpe-se compare --corruptions` does; the images are corrupted once."""
    corrupted = [(name, severity, images.to(device)) for name, severity, images in corrupted_test_sets(data)]
    source = provenance()

    def test(network: nn.Module, cell: Cell) -> None:
        metrics = corruption_metrics(
            network, data, corrupted=corrupted, batch_size=2048, device=device, channels_last=config.channels_last
        )
        cell.run.path.mkdir(parents=True, exist_ok=True)
        write_corruption_record(cell.run.path, metrics, data, source)

    return test


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, dict]:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.many_runs",
        description=package.__doc__,
        epilog="All other flags, such as --epochs=24, are settings as `cmpe-se train` takes them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # --model and --seed are not --models and --seeds
    )
    parser.add_argument("--models", required=True, help="networks with commas between, as `cmpe-se compare` takes them")
    parser.add_argument("--views", default="", help="views for each name that begins with cmpe_se_")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them")
    parser.add_argument("--recipe", default="cifar-fast", help="name or file of a recipe")
    parser.add_argument("--output", type=Path, required=True, help="folder of the comparison")
    parser.add_argument("--corruptions", action="store_true", help="test each network on corrupted images, too")
    parser.add_argument(
        "--lanes", type=int, default=1, help="runs at a time, on a GPU; several have stopped for good (results/LOG.md)"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes that decode images, at the start"
    )
    parser.add_argument("--minutes", type=float, default=1e6, help="time limit of the whole call")
    parser.add_argument("--keep-weights", choices=("none", "first", "all"), default="none", help="seeds to keep")
    parser.add_argument("--recorded-data-dir", help="data_dir to record, if another machine continues")
    parser.add_argument(
        "--patience", type=float, default=math.inf, help="seconds without a finished epoch that mean a stuck device"
    )
    report = parser.add_argument_group("for the report of `cmpe-se compare`, whose flags may be given as they are")
    report.add_argument("--primary", help="the planned comparison; only checked here")
    report.add_argument("--margin", type=float, default=USUAL.margin, help="of equivalence; only checked here")
    options, rest = parser.parse_known_args(arguments)
    return options, _settings(rest)


def _settings(arguments: Sequence[str]) -> dict:
    """``--name value`` and ``--name=value`` to fields of a configuration."""
    settings, words = {}, list(arguments)
    while words:
        name, equals, value = words.pop(0).partition("=")
        if not name.startswith("--"):
            raise UserError(f"'{name}' is no setting; write --name=value")
        if not equals and words and not words[0].startswith("--"):
            value = words.pop(0)
        if not value.strip():
            raise UserError(f"{name} has no value; write {name}=VALUE")
        try:
            settings[name.removeprefix("--").replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"{name} cannot be '{value}': {in_one_line(error)}") from None
    if given := [name for name in VARIED if name in settings]:
        raise UserError(f"a comparison sets {given[0]} by itself; give --models, --views and --seeds")
    return settings


def _prepare(options: argparse.Namespace, settings: dict) -> tuple[Grid, SmallImages]:
    """The grid, with its folder and recipe written, and the images."""
    if options.seeds < 1 or options.lanes < 1:
        raise UserError(f"seeds {options.seeds} and lanes {options.lanes} should be at least 1")
    if options.first_seed < 0:
        raise UserError(f"first_seed is {options.first_seed}, should be at least 0")
    config = with_whole_paths(TrainingConfig.from_recipe(options.recipe, **settings))
    data = load_configured(config, image_size=config.image_size, workers=options.workers)
    if not isinstance(data, SmallImages):
        raise UserError(f"{data.name} is not held in memory; many runs at a time need small images")
    config = without_foreign_augmentation(config, TrainingConfig.from_recipe(options.recipe), data)
    if options.recorded_data_dir:
        config = config.changed(data_dir=options.recorded_data_dir)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    entries = parse_entries(split_names(options.models), split_names(options.views))
    grid = Grid(options.output, entries, seeds, config, {})
    grid.check_entries()
    ask(options.primary, options.margin, [entry.label for entry in entries])
    grid.check_runs()
    (grid.folder / "cells").mkdir(parents=True, exist_ok=True)
    write_text(grid.recipe, config.to_yaml())
    return grid, data


if __name__ == "__main__":
    # Before CUDA starts: streams beyond the usual eight would wait for each other.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    try:
        queue = main()
    except UserError as error:
        sys.exit(f"many_runs: {error}")
    if queue.stuck:
        sys.stdout.flush()
        os._exit(_STUCK)  # as threads never end
    sys.exit(1 if any(reason != "out of time" for reason in queue.failures.values()) else 0)
