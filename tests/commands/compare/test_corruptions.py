"""The second measure: read from run folders, paired by seed, and left out where there is nothing to measure it with."""

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from scipy import stats

from cmpe_se.commands.compare import corruptions as module
from cmpe_se.commands.compare.corruptions import CorruptionOutcomes, measure_corruptions
from cmpe_se.commands.compare.grid import Grid, parse_entries
from cmpe_se.commands.compare.outcomes import collect
from cmpe_se.commands.compare.presenting import to_markdown
from cmpe_se.commands.compare.report import write_report
from cmpe_se.data import load_data
from cmpe_se.data.corruptions import CORRUPTIONS, SEVERITIES
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.robustness import write_corruptions
from tests.training.written import a_record, a_result

MODELS = ["preact_resnet20", "se_preact_resnet20", "cmpe_se_preact_resnet20"]
CORRUPTED = {MODELS[0]: [60.0, 61.0, 60.5], MODELS[1]: [61.9, 63.0, 62.4], MODELS[2]: [60.1, 61.4, 60.0]}
RESULT = {
    "train_images": 1437, "test_images": 360, "commit": "abc", "versions": {"torch": "2", "timm": "1"},
    "hardware": {"cpu": "CPU", "threads": 1, "gpu": None},
}  # fmt: skip


def grid_in(folder: Path) -> Grid:
    return Grid(folder, parse_entries(MODELS, []), range(3), TrainingConfig(device="cpu"), {})


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """Finished runs of three networks and three seeds, with corruption accuracies and without weights."""
    grid = grid_in(tmp_path_factory.mktemp("grid"))
    for cell in grid.cells:
        cell.run.write_config(grid.config_of(cell))
        cell.run.write_result(a_result(**RESULT, test_top1=90.0 + cell.seed))
        cell.run.write_metrics([a_record()])
        mean = CORRUPTED[cell.entry.label][cell.seed]
        metrics = {"clean": 90.0, "mean": mean} | {name: [mean] * len(SEVERITIES) for name in CORRUPTIONS}
        write_corruptions(cell.run.path, metrics, load_data("digits"))
    return grid.folder


@pytest.fixture
def grid(written, tmp_path) -> Grid:
    """A copy of it."""
    return grid_in(shutil.copytree(written, tmp_path / "grid"))


@pytest.fixture
def untested(grid):
    """The same, but for the file of one run."""
    cell = grid.cell(grid.entries[2], 1)
    (cell.run.path / "corruptions.json").unlink()
    return grid, cell


def second(grid: Grid) -> CorruptionOutcomes:
    return CorruptionOutcomes(grid, collect(grid, {}))


def measure(grid: Grid) -> str:
    console = Console(file=io.StringIO(), width=200)
    measure_corruptions(grid, grid.cells, console)
    return console.file.getvalue()


@pytest.mark.slow
def test_columns_by_hand(grid):
    measured = second(grid)
    plain, se = (measured.columns(model) for model in MODELS[:2])
    assert (plain["corruption_mean"], plain["corruption_seeds"], plain["corruption_difference"]) == (60.5, 3, None)
    own, other = CORRUPTED[MODELS[1]], CORRUPTED[MODELS[0]]
    assert se["corruption_difference"] == pytest.approx(sum(own) / 3 - sum(other) / 3, abs=0.006)
    assert se["corruption_p"] == pytest.approx(stats.ttest_rel(own, other).pvalue, abs=1e-5)
    assert se["corruption_p_holm"] == pytest.approx(2 * se["corruption_p"], abs=1e-5)  # two comparisons in the table
    assert measured.cell_columns(grid.cell(grid.entries[1], 2))["corruption_mean"] == 62.4
    assert not measured.missing


def test_document_and_tables(grid):
    outcomes = collect(grid, {})
    write_report(grid, outcomes, missing=0, corruptions=second(grid))
    text = (grid.folder / "compare.md").read_text()
    assert text.index("## Corrupted images") < text.index("## Every seed")
    against_plain = text.split("### Corrupted images, against `preact_resnet20`")[1].split("###")[0]
    assert against_plain.count("| better |") == 1
    assert against_plain.count("| no difference shown |") == 1
    assert "### Corrupted images, against `se_preact_resnet20`" in text
    assert "nan" not in text.lower()
    for name, column in (("compare.csv", "corruption_p_holm"), ("cells.csv", "corruption_blur")):
        assert column in (grid.folder / name).read_text()
    assert (grid.folder / "differences_corruptions.png").stat().st_size > 10_000


def test_without_the_flag_nothing_is_said_of_it(grid):
    assert "orrupt" not in to_markdown(collect(grid, {}), title="", notes=[])
    write_report(grid, collect(grid, {}), missing=0)
    for name in ("compare.csv", "cells.csv"):
        lines = (grid.folder / name).read_text().splitlines()
        assert not any("corruption" in line for line in lines if not line.startswith("#"))


def test_finished_cells_are_taken_as_they_are(grid, monkeypatch):
    monkeypatch.setattr(module, "load_configured", None)  # fails where something is to be measured
    assert measure(grid) == ""


@pytest.mark.slow
def test_no_weights_and_no_file_are_left_out(untested, capsys):
    grid, cell = untested
    assert measure(grid) == ""
    measured = second(grid)
    assert [(each.entry, each.seed) for each in measured.missing] == [(cell.entry, cell.seed)]
    assert measured.columns(cell.entry.label)["corruption_seeds"] == 2
    assert measured.cell_columns(cell)["corruption_mean"] is None
    write_report(grid, collect(grid, {}), missing=0, corruptions=measured)
    assert f"`{cell.entry.label}` seed 1" in (grid.folder / "compare.md").read_text()
    assert "neither its weights nor corruptions.json" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("left", [[], MODELS[1:]])
def test_without_the_first_network_there_are_no_differences(left, grid):
    for cell in grid.cells:
        if cell.entry.label not in left:
            (cell.run.path / "corruptions.json").unlink()
    measured = second(grid)
    assert "against" not in measured.to_markdown()
    assert all(measured.columns(model)["corruption_p"] is None for model in MODELS)
    write_report(grid, collect(grid, {}), missing=0, corruptions=measured)


def test_weights_are_tested(untested):
    import timm

    grid, cell = untested
    data = load_data("digits")
    args = {"num_classes": 10, "in_chans": 1}
    cell.run.save_model(timm.create_model(cell.entry.model, **args), model_args=args, data=data)
    assert "1 run tested" in measure(grid)
    found = json.loads(Path(cell.run.path, "corruptions.json").read_text())
    assert 0 <= found["mean"] <= 100
    assert not second(grid).missing
