"""``benchmarks/experiment.sh``: what it keeps, restores and says; the training itself is compare's."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from cmpe_se.comparing.grid import Grid, parse_entries
from cmpe_se.config import TrainingConfig, split_names
from cmpe_se.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks/experiment.sh"
RECORDS = ROOT / "results/experiments/cifar100-16px"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def plan() -> list[list[str]]:
    lines = [line for line in (RECORDS / "plan.txt").read_text().splitlines() if line and not line.startswith("#")]
    return [[part.strip() for part in line.split("|")] for line in lines]


@pytest.fixture
def script(tmp_path):
    records, home = tmp_path / "records", tmp_path / "home"
    records.mkdir()
    (records / "plan.txt").write_text("# a plan\nsmall | 10k | 2 | a,b:se | 100 | 3 | --corruptions\n")

    def call(*arguments: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"RECORDS": str(records), "EXPERIMENT_HOME": str(home)}
        return subprocess.run(
            ["bash", SCRIPT, *arguments], env=environment, capture_output=True, text=True, check=False
        )

    call.records, call.runs = records, home / "runs"
    return call


def make_cell(folder: Path, *, finished: bool) -> None:
    (folder / "model").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"epoch": 1, "images_per_second": 701.5, "seconds": 2}\n')
    (folder / "config.yaml").write_text("epochs: 2\n")
    (folder / "model/weights").write_text("large")
    if finished:
        (folder / "result.json").write_text(json.dumps({"test_top1": 1.0}))


def test_finished_runs_are_collected_without_their_weights(script):
    make_cell(script.runs / "small/cells/a-seed100", finished=True)
    make_cell(script.runs / "small/cells/b-se-seed100", finished=False)
    assert script("collect").returncode == 0
    kept = sorted(str(path.relative_to(script.records / "cells")) for path in (script.records / "cells").rglob("*.*"))
    assert kept == [f"small/a-seed100/{name}" for name in ("config.yaml", "metrics.jsonl", "result.json")]


def test_status(script):
    make_cell(script.runs / "small/cells/a-seed100", finished=True)
    make_cell(script.runs / "small/cells/b-se-seed100", finished=False)
    assert script("status").stdout.splitlines() == [
        "not running",
        "small: 1 of 6 runs",
        "  b-se-seed100: 1 of 2 epochs, 701 images a second",
    ]


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        ([], 2, "usage: benchmarks/experiment.sh start ARCHIVE | status | stop"),
        (["go"], 2, "usage: "),
        (["stop"], 1, "it is not running"),
        (["pause"], 1, "it is not running"),
    ],
)
def test_mistakes(script, arguments, status, sentence):
    found = script(*arguments)
    assert found.returncode == status
    assert sentence in found.stderr
    assert len(found.stderr.splitlines()) == 1


@pytest.mark.parametrize("line", plan(), ids=lambda line: line[0])
def test_committed_runs_are_those_of_the_plan(line):
    """So that compare takes them as finished, on a machine that has nothing."""
    name, images, epochs, models, first, seeds, _ = line
    config = TrainingConfig.from_recipe(
        RECORDS / "recipe.yaml", epochs=int(epochs), data_dir=f"/tmp/cmpe-se-experiment/data/{images}"
    )
    seeds = range(int(first), int(first) + int(seeds))
    grid = Grid(RECORDS / "cells" / name, parse_entries(split_names(models), []), seeds, config, {})
    cells = {cell.run.path.name: cell for cell in grid.cells}
    for folder in (RECORDS / "cells" / name).glob("*/"):
        cell = cells[folder.name]
        run = RunFolder(folder)
        assert run.read_config() == grid.config_of(cell)
        assert len(run.read_metrics()) == int(epochs)
        assert run.read_result()["seed"] == cell.seed
