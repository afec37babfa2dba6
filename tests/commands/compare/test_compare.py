"""The command in real processes: from a question to a table, killed and resumed, and in parts."""

import csv
import functools
import io
import json
import os
import re
import shutil
import signal
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest
from rich.console import Console

from cmpe_se.commands.compare import running
from cmpe_se.commands.compare.estimate import hours_on_machines, line_about_machines
from cmpe_se.commands.compare.grid import Grid, parse_entries
from cmpe_se.training.config import TrainingConfig
from tests.training.conftest import write_digits
from tests.training.processes import complaint_of, empty_folder, run, shown_on_terminal, start, succeed
from tests.training.warm import warm_starts

MODELS = "preact_resnet20,se_preact_resnet20,cmpe_se_preact_resnet20"
TWO = "preact_resnet20,se_preact_resnet20"


@functools.cache
def few_digits() -> Path:
    """130 images for training, two steps, and 200 for the test."""
    return write_digits(empty_folder() / "digits", {"train": 13, "test": 20}, digits=range(10))


def short(models: str, *, epochs: int = 1) -> list[str]:
    """A comparison that trains each network for two steps an epoch."""
    data = ("--data=folder", f"--data-dir={few_digits()}", "--batch-size=64")
    return ["compare", "--models", models, *data, "--device=cpu", f"--epochs={epochs}"]


def cells(folder):
    return sorted(path.parent.name for path in folder.glob("cells/*/result.json"))


def table(path):
    return list(csv.DictReader(line for line in path.read_text().splitlines() if not line.startswith("#")))


@pytest.fixture(scope="module")
def finished():
    """Three networks, two seeds; what the command printed."""
    folder = empty_folder() / "comparison"
    return folder, succeed(*short(MODELS), "--seeds=2", "--jobs=2", "--output", folder, before=warm_starts)


@pytest.mark.slow
def test_a_grid_is_trained_and_reported(finished):
    folder, done = finished
    assert len(cells(folder)) == 6
    rows = table(folder / "compare.csv")
    assert [row["model"] for row in rows] == MODELS.split(",")
    for row in rows:
        own = [json.loads((folder / "cells" / f"{row['model']}-seed{seed}/result.json").read_text()) for seed in (0, 1)]
        assert float(row["top1_mean"]) == pytest.approx(sum(result["test_top1"] for result in own) / 2, abs=0.006)
        assert int(row["params"]) == own[0]["params"]
        assert int(row["macs"]) == own[0]["macs"]
    assert float(rows[0]["latency_ratio"]) == 1
    difference = float(rows[2]["top1_mean"]) - float(rows[0]["top1_mean"])
    assert float(rows[2]["difference"]) == pytest.approx(difference, abs=0.011)
    text = (folder / "compare.md").read_text()
    assert all(name in text for name in MODELS.split(","))
    assert "Holm" in text
    for name in ("accuracy_latency", "differences"):
        assert (folder / f"{name}.png").stat().st_size > 10_000
    assert not (folder / "learning_curves.png").exists()  # of one epoch
    assert "preact_resnet20 seed 0: " in done.err
    assert "cmpe_se_preact_resnet20" in done.out


@pytest.mark.long
def test_a_table_lives_on_a_terminal():
    folder = empty_folder() / "comparison"
    long_enough_to_be_seen = ["compare", "--models", TWO, "--batch-size=256", "--device=cpu", "--epochs=2"]
    text = shown_on_terminal(
        *long_enough_to_be_seen, "--test-interval=2", "--seeds=1", "--jobs=1", "--output", folder, before=warm_starts
    )
    assert re.search(r"se_preact_resnet20 +1/2", text)  # epochs of the run under way
    assert re.search(r"preact_resnet20 +(\d\d\.\d\d) +\1", text)  # accuracy of a finished one, and the mean
    assert len(cells(folder)) == 2


@pytest.mark.slow
def test_each_run_is_what_train_makes(finished):
    folder = finished[0]
    alone = empty_folder() / "alone"
    succeed("train", "--recipe", folder / "recipe.yaml", "--model=se_preact_resnet20", "--seed=1", "--output", alone)
    own = folder / "cells" / "se_preact_resnet20-seed1"
    assert (own / "config.yaml").read_text() == (alone / "config.yaml").read_text()
    ours, theirs = (json.loads((path / "result.json").read_text()) for path in (own, alone))
    assert ours["test_top1"] == pytest.approx(theirs["test_top1"], abs=2)  # bit for bit only on as many threads


@pytest.mark.slow
def test_finished_runs_are_left_alone_and_seeds_can_be_added(finished):
    folder = shutil.copytree(finished[0], empty_folder() / "copy")
    before = {path: path.stat().st_mtime_ns for path in folder.glob("cells/*/result.json")}
    done = succeed(*short(MODELS), "--seeds=3", "--output", folder, before=warm_starts)
    assert "6 of 9 runs are finished, 3 to go" in done.err
    assert len(cells(folder)) == 9
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert {row["seeds"] for row in table(folder / "compare.csv")} == {"3"}


@pytest.mark.slow
def test_other_settings_are_refused_in_the_same_folder(finished):
    folder = finished[0]
    complaint = complaint_of(*short(MODELS), "--seeds=2", "--lr=0.3", "--output", folder)
    assert "was made with lr 0.1, and this comparison has 0.3" in complaint


@pytest.mark.long
def test_ctrl_c_saves_and_the_same_command_goes_on():
    """Each run of the first command started from nothing, as for users; all others are forked."""
    folder = empty_folder() / "comparison"
    command = [*short(TWO, epochs=4000), "--seeds=1", "--jobs=2", "--output", folder]
    running = start(*command)
    running.until(lambda: len(list(folder.glob("cells/*/metrics.jsonl"))) == 2)
    done = running.send(signal.SIGINT, group=True)
    assert done.status == 130
    assert "stopped with 0 of 2 runs finished; run the same command to continue" in done.complaint
    logs = [path.read_text() for path in folder.glob("cells/*.log")]
    assert all("stopped and saved after step" in log for log in logs)
    epochs = {path: len(path.read_text().splitlines()) for path in folder.glob("cells/*/metrics.jsonl")}
    assert all(0 < count < 4000 for count in epochs.values())
    again = start(*command, before=warm_starts)
    again.until(lambda: all(len(path.read_text().splitlines()) > count for path, count in epochs.items()))
    assert "0 of 2 runs are finished, 2 to go" in again.err
    again.send(signal.SIGTERM)
    assert all("resuming after step" in path.read_text() for path in folder.glob("cells/*.log"))


@pytest.mark.long
def test_a_killed_comparison_takes_its_runs_along_and_they_go_on_from_there():
    folder = empty_folder() / "comparison"
    command = [*short("test_resnet,test_resnet:se", epochs=100), "--seeds=1", "--jobs=2", "--output", folder]
    running = start(*command, before=warm_starts)
    running.until(lambda: len(list(folder.glob("cells/*/metrics.jsonl"))) == 2)
    os.kill(running.process.pid, signal.SIGKILL)
    succeed(*command, before=warm_starts)  # at once, while they are saving
    for log in folder.glob("cells/*.log"):
        text = log.read_text()
        assert "stopped and saved after step" in text or "epoch 100" in text, text
        assert "another process" not in text, text
    assert len(cells(folder)) == 2


@pytest.mark.slow
def test_a_failed_run_is_named_and_the_others_are_finished():
    folder = empty_folder() / "comparison"
    (folder / "cells").mkdir(parents=True)
    (folder / "cells" / "se_preact_resnet20-seed0").write_text("in the way")
    done = run(*short(TWO), "--seeds=1", "--output", folder, before=warm_starts)
    assert "se_preact_resnet20 with seed 0 failed" in done.complaint
    assert "its log is" in done.complaint
    assert cells(folder) == ["preact_resnet20-seed0"]
    assert "**1 run still to finish**" in (folder / "compare.md").read_text()


@pytest.mark.long
def test_parts_share_a_grid_and_a_last_call_reports():
    folder = empty_folder() / "comparison"
    for part in ("1/2", "2/2"):
        succeed(*short(TWO), "--seeds=1", "--part", part, "--output", folder, before=warm_starts)
        if part == "1/2":
            assert cells(folder) == ["preact_resnet20-seed0"]
            assert all(row["latency_ms"] == "" for row in table(folder / "compare.csv"))
    assert len(cells(folder)) == 2
    succeed(*short(TWO), "--seeds=1", "--output", folder, before=warm_starts)
    assert all(float(row["latency_ms"]) > 0 for row in table(folder / "compare.csv"))


def test_a_dry_run_says_what_it_would_cost():
    folder = empty_folder() / "comparison"
    done = succeed(*short(TWO), "--seeds=2", "--dry-run", "--output", folder)
    assert "total" in done.out
    assert "on 1 CPU thread" in " ".join(done.out.split())
    assert re.search(r"4 runs, \d+\.\d\d machine-hours: .* on one such machine, a run at a time; .* h on 2, ", done.out)
    assert not folder.exists()


def test_hours_on_several_machines():
    rows = [{"runs": 2, "hours": 6.0}, {"runs": 0, "hours": 0.0}, {"runs": 3, "hours": 3.0}]  # two of 3 h, three of 1 h
    assert [hours_on_machines(rows, machines) for machines in (1, 2, 3, 5)] == [9, 5, 3, 3]
    assert line_about_machines(rows) == (
        "5 runs, 9.00 machine-hours: 9.00 h on one such machine, a run at a time; 5.00 h on 2, 3.00 h on 4, 3.00 h on 5"
    )
    assert line_about_machines([{"runs": 1, "hours": 6.0}]) is None


@pytest.mark.slow
def test_the_log_says_how_far_runs_are(finished, monkeypatch):
    folder = shutil.copytree(finished[0], empty_folder() / "copy")
    monkeypatch.setattr(running, "_SAID", 0)
    monkeypatch.setattr(running, "_LOOK", 0)
    cell = folder / "cells" / "preact_resnet20-seed0"
    kept = (cell / "result.json").rename(folder / "kept.json")

    class Place:
        """Finishes its run at the second look."""

        def describe(self):
            return "here"

        def submit(self, job):
            future = Future()
            threading.Timer(0.3, lambda: (kept.rename(cell / "result.json"), future.set_result(None))).start()
            return future

    config = TrainingConfig.from_recipe(folder / "recipe.yaml")
    grid = Grid(folder, parse_entries(MODELS.split(","), []), range(2), config, {})
    console = Console(file=io.StringIO(), width=200)
    assert running.run_cells(grid, grid.cells, Place(), console) == {}
    said = console.file.getvalue()
    assert "preact_resnet20 seed 0: 1/1\n" in said
    assert said.count("seed") == said.count("preact_resnet20 seed 0")


def test_a_plan_is_a_number_of_seeds():
    done = succeed("compare", "--plan", "--effect=0.3", "--sd=0.4")
    assert done.out.startswith("16 seeds show a difference of 0.3 points with a power of 80 %")
    assert "22 seeds" in succeed("compare", "--plan", "--effect=0.3", "--sd=0.4", "--power=0.91").out
    assert "sd is 0, should be a number of points above 0" in complaint_of("compare", "--plan", "--effect=1", "--sd=0")


@pytest.mark.long
def test_a_presets_dry_run_needs_no_data():
    command = ["compare", "--preset=paper-resnet", "--data=cifar10", "--mixup=0", "--batch-size=2", "--dry-run"]
    done = succeed(*command, "--device=cpu")
    assert done.out.count("total ") == 2
    assert "total: " in done.out
    assert "cmpe_se_preact_resnet164:pair_view_2x1" in done.out


def test_a_presets_missing_data_is_found_before_anything_is_made(tmp_path):
    folder, nowhere = tmp_path / "comparison", tmp_path / "nowhere"
    complaint = complaint_of(
        "compare", "--preset=paper-wrn", "--data=cifar10", "--data-dir", nowhere, "--output", folder
    )
    assert str(nowhere) in complaint
    assert not folder.exists()
