"""The ``compare`` command: train a grid of networks and seeds, and test the differences."""

from pathlib import Path
from typing import Any

from rich.console import Console

from cmpe_se.commands.compare.corruptions import CorruptionOutcomes, measure_corruptions
from cmpe_se.commands.compare.differences import USUAL, Question, ask
from cmpe_se.commands.compare.estimate import estimate, line_about_machines, table_of_costs
from cmpe_se.commands.compare.grid import VARIED, Cell, Grid, parse_entries
from cmpe_se.commands.compare.latency import measure_latencies
from cmpe_se.commands.compare.networks import check_networks
from cmpe_se.commands.compare.outcomes import Latency, collect
from cmpe_se.commands.compare.places import Machine, Place
from cmpe_se.commands.compare.power import POWER, seeds_needed
from cmpe_se.commands.compare.presets import preset_grids, without_published
from cmpe_se.commands.compare.ray_cluster import OnRay, RayCluster
from cmpe_se.commands.compare.report import write_report
from cmpe_se.commands.compare.running import finish_or_complain, run_cells
from cmpe_se.data import ImageData
from cmpe_se.errors import UserError
from cmpe_se.training.config import DEFAULT_RECIPE, TrainingConfig, recipe_names
from cmpe_se.training.data_settings import paths_of, refuse_idle_folder, with_whole_paths, without_foreign_augmentation
from cmpe_se.training.gate_settings import without_recipe_gates
from cmpe_se.training.run_data import load_configured
from cmpe_se.utils.files import os_errors_as, write_text
from cmpe_se.utils.terminal import Terminal
from cmpe_se.utils.text import in_points, split_names


def compare(
    *,
    models: str | None = None,
    views: str = "",
    seeds: int = 3,
    first_seed: int = 0,
    preset: str | None = None,
    recipe: str | Path = DEFAULT_RECIPE,
    output: str | Path | None = None,
    jobs: int | None = None,
    part: str = "1/1",
    ray: bool | str | None = None,
    ray_cpus: int | None = None,
    ray_gpus: float | None = None,
    primary: str | None = None,
    margin: float = USUAL.margin,
    corruptions: bool = False,
    dry_run: bool = False,
    plan: bool = False,
    effect: float | None = None,
    sd: float | None = None,
    power: float | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Train networks under one recipe with several seeds, and compare them seed by seed.

    cmpe-se compare --models preact_resnet20,se_preact_resnet20,cmpe_se_preact_resnet20 --views pair_view_1x1,folded_3x3

    For one seed, all networks are trained on the same images in the same order with the same augmentation. The same
    command continues after an interruption and skips finished runs; more networks or seeds can be added to it. It
    writes compare.md, compare.csv, cells.csv and plots. A recipe sets everything else and flags win over it; the
    defaults below are those of the recipe that is named.

    Args:
        models: networks to compare, separated by commas, the first one as the baseline: names in timm, NAME:VIEW for a
            view of the attention (which converts networks of timm), and NAME:VIEW:key=value for a gate
            setting of that network alone (start, reduction, min_hidden, bias, mask).
        views: views to train each of the networks named cmpe_se_... with, separated by commas.
        seeds: number of seeds.
        first_seed: first seed; the others follow it.
        preset: networks and recipe under one word, instead of models, views and recipe; one comparison for each base
            network and column, and --data and --mixup choose columns. paper-resnet, paper-wrn, paper-svhn and
            paper-imagenet have the paper's networks, and its published results where they are at hand;
            imagenet-classic, imagenet-a3 and imagenet-a2 have ResNet-50 plain, with SE and with competitive gates.
        recipe: name of a recipe (cifar-fast, cifar-paper, cifar100-fast, digits, finetune, imagenet, imagenet-a2,
            imagenet-a3, imagenet-classic or svhn), or path of a YAML file.
        output: folder of the comparison; runs/compare-DATA if left out.
        jobs: number of runs at a time; one on each GPU, or one on each core, if left out.
        part: part of the runs to train, I/N for every N-th run from the I-th on (for SLURM arrays). A last call without
            it writes the report.
        ray: train on a Ray cluster: of this machine, started here if there is none, or of an address that follows. All
            its machines need to see the output folder.
        ray_cpus: CPU cores of a run on the cluster, and its threads; 1 if left out.
        ray_gpus: GPUs of a run on the cluster, such as 0.5 for two runs on each; 1 if the cluster has any, else 0, if
            left out.
        primary: planned comparison, A:B (or A,B) for network A against network B. It is reported first and without
            adjustment; all others become secondary.
        margin: largest difference, in percentage points, that the equivalence test counts as none.
        corruptions: test on corrupted images too (as ``cmpe-se evaluate --corruptions`` does), and compare the mean
            accuracy over them as a second measure.
        dry_run: measure a few steps, print the cost of the comparison, and train nothing.
        plan: print the number of seeds that show --effect at --sd, and train nothing; no networks are needed.
        effect: difference to show, in percentage points (with --plan).
        sd: standard deviation over the seeds of the difference between two networks, in percentage points (with
            --plan).
        power: probability of showing the effect (with --plan); 0.8 if left out.
        settings: fields of :class:`cmpe_se.training.config.TrainingConfig`; they win over the recipe.

    Returns:
        The rows of ``compare.csv``, one for each network (of a dry run: of its table), grid after grid. Of a plan, one
        row with ``effect``, ``sd``, ``power`` and ``seeds``.

    Raises:
        UserError: settings that cannot be used, runs in the folder that were made with others, or runs that failed.
        ComparisonInterrupted: Ctrl-C or SIGTERM; current runs have saved checkpoints.
    """
    console = Terminal(stderr=True)
    planned = {name: value for name, value in (("effect", effect), ("sd", sd), ("power", power)) if value is not None}
    if plan:
        others = {"models": models, "views": views, "preset": preset, "jobs": jobs, "ray": ray, "primary": primary}
        others |= {"ray_cpus": ray_cpus, "ray_gpus": ray_gpus is not None}
        others |= {"corruptions": corruptions, "dry_run": dry_run, "seeds": seeds != 3, "first_seed": first_seed}
        others |= {"part": part != "1/1", "margin": margin != USUAL.margin, "recipe": recipe != DEFAULT_RECIPE}
        others |= settings
        if ignored := [name for name, value in others.items() if value]:
            raise UserError(
                f"a plan needs no {ignored[0]}; give --plan --effect POINTS --sd POINTS [--power], and nothing else"
            )
        return [_plan(**planned)]
    if planned:
        raise UserError(f"{next(iter(planned))} is for a plan; add --plan, or leave it out")
    if given := [name for name in VARIED if name in settings]:
        raise UserError(f"a comparison sets {given[0]} by itself; give --models, --views and --seeds")
    if seeds < 1 or (jobs is not None and jobs < 1):
        raise UserError(f"seeds {seeds} and jobs {jobs} should be at least 1")
    if first_seed < 0:
        raise UserError(f"first_seed is {first_seed}, should be at least 0")
    if preset is not None and (models or views):
        raise UserError("a preset has its own networks; leave --models and --views out")
    on_ray = OnRay.of(ray, ray_cpus, ray_gpus)
    numbers = range(first_seed, first_seed + seeds)
    if preset is not None:
        grids = preset_grids(preset, Path(output or f"runs/compare-{preset}"), numbers, settings)
    else:
        grids = [_own_grid(models, views, numbers, recipe, output, settings)]
    if len(grids) > 1 and primary is not None:
        raise UserError(f"primary is for one comparison, and {preset} has {len(grids)}; choose one column by --data")
    if preset is not None and (note := without_published(preset)):
        console.print(note, soft_wrap=True)
    question = ask(primary, margin, [entry.label for entry in grids[0].entries])
    own, parts = _part(part)
    shares: dict[Path, list[Cell]] = {}
    number = 0
    for grid in grids:
        grid.check_runs()
        shares[grid.folder] = [cell for index, cell in enumerate(grid.cells, start=number) if index % parts == own]
        number += len(grid.cells)
    if dry_run:
        return _estimate_all(grids, shares, console)
    if preset is not None:
        for config in {grid.config.data: grid.config for grid in grids}.values():
            _load(config)
    for grid in grids:
        _prepare(grid)
    place = _place(grids, shares, jobs, on_ray, console)
    rows = []
    try:
        for grid in grids:
            if len(grids) > 1:
                console.rule(str(grid.folder))
            failures = run_cells(grid, shares[grid.folder], place, console)
            if corruptions:
                measure_corruptions(grid, shares[grid.folder], console)
            rows += _report(grid, question, console, corruptions=corruptions)
            finish_or_complain(failures)
    except BaseException:
        place.stop()  # or closing waits for the end of what is being trained
        raise
    finally:
        place.close()
    return rows


def _plan(effect: float | None = None, sd: float | None = None, power: float = POWER) -> dict[str, Any]:
    if effect is None or sd is None:
        raise UserError("a plan needs --effect and --sd in points, such as --effect 0.3 --sd 0.4")
    seeds = seeds_needed(effect, sd, power)
    Terminal().print(
        f"{seeds} seeds show a difference of {in_points(effect)} with a power of {100 * power:g} %, if the differences "
        f"between two networks have a standard deviation of {in_points(sd)} (paired t-test, two-sided 5 %)",
        highlight=False,
        soft_wrap=True,
    )
    return {"effect": effect, "sd": sd, "power": power, "seeds": seeds}


def _own_grid(
    models: str | None, views: str, seeds: range, recipe: str | Path, output: str | Path | None, settings: dict
) -> Grid:
    if not models:
        raise UserError("name the networks: --models preact_resnet20,se_preact_resnet20,cmpe_se_preact_resnet20")
    entries = parse_entries(split_names(models), split_names(views))
    config = with_whole_paths(TrainingConfig.from_recipe(recipe, **settings))
    refuse_idle_folder(config.data, config.data_dir)
    if str(recipe) in recipe_names():  # its settings of gates are for its own network, and here there are others
        config = without_recipe_gates(config, settings)
    data = _load(config)
    config = without_foreign_augmentation(config, TrainingConfig.from_recipe(recipe), data)
    grid = Grid(Path(output or f"runs/compare-{config.data.replace('/', '_')}"), entries, seeds, config, {})
    grid.check_entries()
    check_networks({entry.label: config.changed(**entry.settings) for entry in entries}, data)
    return grid


def _load(config: TrainingConfig) -> ImageData:
    """The data; this fetches and decodes it once, before runs side by side would all do so."""
    return load_configured(config, download=config.download, image_size=config.image_size)


def _part(part: str) -> tuple[int, int]:
    """I/N as the rest and the divisor of a run's number."""
    own, slash, parts = part.partition("/")
    if not (slash and own.isdigit() and parts.isdigit() and 1 <= int(own) <= int(parts)):
        raise UserError(f"part is '{part}': give I/N with I from 1 to N, such as 2/8")
    return int(own) - 1, int(parts)


def _estimate_all(grids: list[Grid], shares: dict[Path, list[Cell]], console: Console) -> list[dict[str, Any]]:
    rows = []
    for grid in grids:
        costs = estimate(grid, shares[grid.folder], console)
        Terminal().print(table_of_costs(grid, costs))
        rows += costs
    if len(grids) > 1:
        Terminal().print(f"total: {sum(row['hours'] for row in rows):,.1f} hours", highlight=False)
    if line := line_about_machines(rows):
        Terminal().print(line, highlight=False, soft_wrap=True)
    return rows


def _prepare(grid: Grid) -> None:
    with os_errors_as(f"cannot make the folder {grid.folder}"):
        (grid.folder / "cells").mkdir(parents=True, exist_ok=True)
    write_text(grid.recipe, grid.config.to_yaml())


def _place(
    grids: list[Grid], shares: dict[Path, list[Cell]], jobs: int | None, on_ray: OnRay | None, console: Console
) -> Place:
    cpu = grids[0].config.device == "cpu"
    runs = max(len(cells) for cells in shares.values())
    if on_ray is None:
        return Machine(jobs, runs, cpu=cpu)
    read = {path for grid in grids for path in paths_of(grid.config)}
    return RayCluster(on_ray, jobs, runs, cpu=cpu, folder=grids[0].folder, read=sorted(read), console=console)


def _report(grid: Grid, question: Question, console: Console, *, corruptions: bool) -> list[dict[str, Any]]:
    """Write and print what is known; forward passes are timed once all runs have finished."""
    open_cells = [cell for cell in grid.cells if not grid.is_finished(cell)]
    if len(open_cells) == len(grid.cells):
        return []
    latencies: dict[str, Latency] = {}
    if not open_cells:
        try:
            latencies = measure_latencies(grid, console)
        except UserError as error:  # a network that cannot be merged takes nothing from what was trained
            console.print(f"latency left out: {error}", highlight=False, soft_wrap=True)
    outcomes = collect(grid, latencies)
    second = CorruptionOutcomes(grid, outcomes, question.margin) if corruptions else None
    return write_report(grid, outcomes, missing=len(open_cells), question=question, corruptions=second)
