"""``benchmarks/experiment.sh``, and the plan in ``gpu.sh``: what they keep, restore and say; training is compare's."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import yaml
from benchmarks.many_runs.table import _SMALL_FILES
from PIL import Image

from cmpe_se.commands.compare.grid import Grid, parse_entries
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.run_folder import RunFolder
from cmpe_se.utils.text import split_names
from tests.training.written import a_record, a_result

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks/experiment.sh"
RECORDS = ROOT / "results/experiments/cifar100-16px"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash"),
]
in_background = pytest.mark.skipif(
    not all(map(shutil.which, ("setsid", "taskset", "flock", "pgrep"))), reason="needs setsid, taskset, flock and pgrep"
)

# `cmpe-se compare` as the script sees it: it has a run in a session of its own, tells it once, and waits. With "go" in
# the experiment's folder a run ends; with "deaf", it does not listen; with "broken", or with code from elsewhere,
# compare fails.
COMPARE = """
import os, pathlib, signal, subprocess, sys, time

home = pathlib.Path(__file__).parents[2]
told = []

def note(number, _):
    told.append(number)
    signal.signal(number, signal.SIG_DFL)

signal.signal(signal.SIGTERM, note)
if sys.argv[1] == "train":
    run = pathlib.Path(sys.argv[2])
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text('{"epoch": 1, "images_per_second": 12.5}\\n')
    while not (home / "go").exists() and (not told or (home / "deaf").exists()):
        time.sleep(0.05)
    if told:
        time.sleep(1)
        (run / "saved").touch()
    else:
        (run / "result.json").write_text('{\\n  "commit": null\\n}')
    sys.exit()
if (home / "broken").exists() or "PYTHONPATH" in os.environ:
    sys.exit("cmpe-se: error: no such data")
flags = dict(zip(sys.argv[2::2], sys.argv[3::2]))
first, seeds = int(flags["--first-seed"]), int(flags["--seeds"])
with open(home / "calls", "a") as calls:
    print(first, seeds, *sys.argv[18:], file=calls)
for seed in range(first, first + seeds):
    run = pathlib.Path(flags["--output"]) / "cells" / f"a-seed{seed}"
    if not (run / "result.json").exists():
        process = subprocess.Popen([sys.executable, __file__, "train", run], start_new_session=True)
        while process.poll() is None and not told:
            time.sleep(0.05)
        if told:
            process.terminate()
            process.wait()
            sys.exit(130)
"""


def plan() -> list[list[str]]:
    lines = [line for line in (RECORDS / "plan.txt").read_text().splitlines() if line and not line.startswith("#")]
    return [[part.strip() for part in line.split("|")] for line in lines]


@pytest.fixture
def script(tmp_path):
    records, home = tmp_path / "records", tmp_path / "home"
    records.mkdir()
    (records / "plan.txt").write_text("# a plan\nsmall | 10k | 2 | a,b:se | 100 | 3 | --corruptions\n")

    def call(*arguments: object, path: Path = SCRIPT, **environment: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"RECORDS": str(records), "EXPERIMENT_HOME": str(home)} | environment
        return subprocess.run(
            ["bash", path, *map(str, arguments)], env=environment, capture_output=True, text=True, check=False
        )

    call.records, call.home, call.runs = records, home, home / "runs"
    return call


@pytest.fixture
def experiment(script):
    """One that is installed and unpacked, with a comparison that the tests hold in their hand."""
    (script.home / "env/bin").mkdir(parents=True)
    (script.home / "data/10k").mkdir(parents=True)
    (script.home / "data/unpacked").touch()
    (script.home / "installed").write_text("1234\n")
    (script.records / "COMMIT").write_text("1234\n")
    program = script.home / "env/bin/cmpe-se"
    program.write_text(f"#!{sys.executable}\n{COMPARE}")
    program.chmod(0o755)
    script.pid, script.log = script.home / "pid", script.home / "log"
    yield script
    if script("stop", STOP_SECONDS="1").returncode == 0:
        pytest.fail("something was left running")


def until(condition: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def alive(word: str) -> list[str]:
    """Processes that have a word in their command line."""
    found = subprocess.run(["pgrep", "-af", word], capture_output=True, text=True, check=False).stdout.splitlines()
    return [line for line in found if "pgrep" not in line]


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


def test_what_is_kept_names_no_place_and_stays(script):
    cell, kept = (folder / "a-seed100" for folder in (script.runs / "small/cells", script.records / "cells/small"))
    make_cell(cell, finished=True)
    (cell / "result.json").write_text(json.dumps({"run": str(cell), "command": f"train --output {cell}"}))
    (cell / "corruptions.json").write_text(json.dumps({"command": f"evaluate {cell}"}))
    assert script("collect").returncode == 0
    name = str(cell.relative_to(script.home))
    assert json.loads((kept / "result.json").read_text()) == {"run": name, "command": f"train --output {name}"}
    assert json.loads((kept / "corruptions.json").read_text()) == {"command": f"evaluate {name}"}
    (kept / "result.json").write_text("{}")
    assert script("collect").returncode == 0
    assert (kept / "result.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("end", "state"),
    [
        (
            "experiment.sh ended: the plan is done\nmore\nexperiment.sh ended: failed with status 3",
            "failed with status 3",
        ),
        ("experiment.sh ended: stopped on request", "stopped on request"),
    ],
)
def test_status(end, state, script):
    """Also of a comparison that has not begun."""
    with open(script.records / "plan.txt", "a") as file:
        file.write("large | 50k | 2 | a,b | 0 | 2 |\n")
    make_cell(script.runs / "small/cells/a-seed100", finished=True)
    make_cell(script.runs / "small/cells/b-se-seed100", finished=False)
    found = script("status")
    assert found.returncode == 0
    lines = [
        "small: 1 of 6 runs",
        "  b-se-seed100: 1 of 2 epochs, 701 images a second",
        "large: 0 of 4 runs",
    ]
    assert found.stdout.splitlines() == ["not running", *lines]
    log = script.home / "log"
    log.write_text(f"{end}\n")
    found = script("status").stdout.splitlines()
    assert found == [f"not running: {state}", *lines, f"the end of {log}:", *end.splitlines()]


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        (None, "no plan: "),
        ("# nothing\n\n", "plan.txt has no line"),
        ("a | 10k | 2 | x,y | 0 | 3 |\nb | 10k | 2 | x,y | 0 | 3\n", "plan.txt: 'b|10k|2|x,y|0|3' should be name | "),
        ("a | 10k | 2 | x,y | 0 | three |\n", "'a|10k|2|x,y|0|three|' should be"),
        ("a | 10k | 2 | x,y | 08 | 3 |\n", "'a|10k|2|x,y|08|3|' should be"),
        ("a | 5 k | 2 | x,y | 0 | 3 | --mixup=0.2\n", "'a|5 k|2|x,y|0|3|--mixup=0.2' should be"),
    ],
)
@pytest.mark.parametrize("command", ["status", "start", "train", "plan"])
def test_plans_that_are_none(command, plan, sentence, script):
    script.home.mkdir()
    (script.records / "plan.txt").unlink()
    if plan is not None:
        (script.records / "plan.txt").write_text(plan)
    found = script(command)
    assert found.returncode == 1
    assert sentence in found.stderr
    assert len(found.stderr.splitlines()) == 1
    assert "the plan is done" not in found.stdout


def test_small_files_are_those_of_many_runs():
    (names,) = re.findall(r"^small_files=\((.*?)\)", SCRIPT.read_text(), re.MULTILINE)
    assert names.split() == list(_SMALL_FILES)


def test_a_wheels_commit_is_kept_beside_its_runs(script, tmp_path):
    for name, commit in (("wheel", None), ("checkout", "abcd"), ("elsewhere", None)):
        make_cell(script.runs / f"small/cells/{name}-seed100", finished=True)
        text = json.dumps({"test_top1": 1.0, "commit": commit}, indent=2)
        (script.runs / f"small/cells/{name}-seed100/result.json").write_text(text)
    (script.runs / "small/cells/elsewhere-seed100/commit").write_text("5678\n")
    (script.home / "installed").write_text("1234\n")
    assert script("collect").returncode == 0
    assert script("restore", tmp_path / "other").returncode == 0
    for cells in (script.records / "cells/small", tmp_path / "other/small/cells"):
        found = {path.parent.name: path.read_text() for path in cells.glob("*/commit")}
        assert found == {"wheel-seed100": "1234\n", "elsewhere-seed100": "5678\n"}


@pytest.fixture
def archive(tmp_path) -> Path:
    """Class folders of 8x8 colour noise; 24 of 28 training images have a number below 100."""
    random = np.random.default_rng(0)
    for part, numbers in (("train", [*range(24), *range(100, 104)]), ("test", range(8))):
        for label in range(3):
            folder = tmp_path / "cifar100-16px" / part / f"class{label}"
            folder.mkdir(parents=True)
            for number in numbers:
                pixels = random.integers(80 * label, 80 * label + 90, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number:03}.png")
    path = tmp_path / "images.tar.gz"
    with tarfile.open(path, "w:gz") as file:
        file.add(tmp_path / "cifar100-16px", "cifar100-16px")
    return path


def test_unpack(script, archive, tmp_path):
    images = tmp_path / "images"
    assert script("unpack", archive, images).stdout == f"{images} has 50k/ and 10k/\n"
    counts = {name: len(list((images / name).glob("*/*/*.png"))) for name in ("50k", "10k")}
    assert counts == {"50k": 3 * 36, "10k": 3 * 32}
    assert sorted(path.name for path in images.iterdir()) == ["10k", "50k", "unpacked"]
    assert script("unpack", "not looked for", images).returncode == 0
    (images / "unpacked").unlink()
    found = script("unpack", archive, images)
    assert (found.returncode, len(found.stderr.splitlines())) == (1, 1)
    assert "10k is there, perhaps half of it: remove it" in found.stderr
    (tmp_path / "broken.tar.gz").write_text("no archive")
    found = script("unpack", tmp_path / "broken.tar.gz")
    assert (found.returncode, len(found.stderr.splitlines())) == (1, 1)
    assert "cannot unpack" in found.stderr


@in_background
def test_a_plan_to_its_end(experiment):
    """Seed by seed, then all of them, with the same flags; what is finished in between is collected.

    A comparison whose images are not there is named and left out; one that is finished is not begun.
    """
    plan = experiment.records / "plan.txt"
    done = "done | 10k | 2 | a | 0 | 1 |"
    plan.write_text(f"photos | cifar10-10k | 2 | a,b | 0 | 3 |\n{done}\n{plan.read_text()}")
    make_cell(experiment.runs / "done/cells/a-seed0", finished=True)
    (experiment.records / "done").mkdir()
    (experiment.records / "done/compare.md").touch()
    found = experiment("start", COLLECT_SECONDS="1", PYTHONPATH="the code of a checkout")
    assert found.stdout == "started; 1 runs are finished; see: benchmarks/experiment.sh status\n", found.stderr
    assert experiment("status").stdout.startswith(f"running (process {experiment.pid.read_text().strip()})\n")
    again = experiment("start")
    assert (again.returncode, "it is running already" in again.stderr) == (1, True)

    make_cell(experiment.runs / "small/cells/other-seed100", finished=True)
    until((experiment.records / "cells/small/other-seed100/result.json").exists)

    (experiment.home / "go").touch()
    until(lambda: not experiment.pid.exists())
    flags = "--corruptions"
    calls = [f"100 1 {flags}", f"101 1 {flags}", f"102 1 {flags}", f"100 3 {flags}"]
    assert (experiment.home / "calls").read_text().splitlines() == calls
    said = experiment.log.read_text().splitlines()
    assert "has no cifar10-10k/, which photos needs" in said[0]
    assert said[1] == "done: all 1 runs are finished, and compared"
    assert said[-1] == "experiment.sh ended: the plan is done, but for photos"
    status = experiment("status").stdout
    counts = ["photos: 0 of 6 runs", "done: 1 of 1 runs", "small: 4 of 6 runs"]
    assert status.splitlines()[:4] == ["not running: the plan is done, but for photos", *counts]
    commits = [path.read_text() for path in experiment.records.glob("cells/small/a-seed10?/commit")]
    assert commits == ["1234\n"] * 3
    until(lambda: not alive(str(experiment.home)))


@in_background
@pytest.mark.parametrize("paused", [False, True])
def test_stop_lets_the_run_save(paused, experiment):
    experiment("start")
    run = experiment.runs / "small/cells/a-seed100"
    until((run / "metrics.jsonl").exists)
    pid = int(experiment.pid.read_text())
    if paused:
        assert experiment("pause").returncode == 0
        assert experiment("status").stdout.startswith(f"paused (process {pid})\n")
    found = experiment("stop")
    assert (found.returncode, found.stdout) == (0, "stopped; 0 runs are finished\n")
    assert (run / "saved").exists()
    assert not alive(str(experiment.home))
    assert not experiment.pid.exists()
    assert experiment("status").stdout.startswith("not running: stopped on request\n")


@in_background
def test_stop_ends_what_does_not_listen(experiment):
    (experiment.home / "deaf").touch()
    experiment("start")
    until((experiment.runs / "small/cells/a-seed100/metrics.jsonl").exists)
    found = experiment("stop", STOP_SECONDS="3")
    said = "ended: killed, as it had not stopped after 3 s"
    assert found.stdout.splitlines() == [f"experiment.sh {said}", "stopped; 0 runs are finished"]
    until(lambda: not alive(str(experiment.home)))
    assert experiment("status").stdout.startswith("not running: killed, as it had not stopped")


@in_background
def test_a_wish_to_stop_between_two_comparisons(experiment):
    """To the script it is the same as here, where the comparison does not hear of it."""
    experiment("start")
    until((experiment.runs / "small/cells/a-seed100/metrics.jsonl").exists)
    os.kill(int(experiment.pid.read_text()), signal.SIGTERM)
    (experiment.home / "go").touch()
    until(lambda: not experiment.pid.exists())
    assert (experiment.home / "calls").read_text().splitlines() == ["100 1 --corruptions"]
    assert experiment.log.read_text().splitlines()[-1] == "experiment.sh ended: stopped on request"


@in_background
def test_a_failure_at_once_is_shown(experiment):
    (experiment.home / "broken").touch()
    found = experiment("start", START_SECONDS="60")
    assert found.returncode == 1
    said = ["cmpe-se: error: no such data", "experiment.sh ended: failed with status 1"]
    assert found.stderr.splitlines()[:2] == said
    assert "it has ended at once" in found.stderr
    assert experiment("status").stdout.startswith("not running: failed with status 1\n")


@in_background
def test_two_starts_at_once(experiment):
    command = ["flock", experiment.home / "lock", "bash", SCRIPT, "start"]
    environment = os.environ | {"RECORDS": str(experiment.records), "EXPERIMENT_HOME": str(experiment.home)}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (1, "experiment.sh: another start is at work\n")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_later_process_with_the_number_is_not_the_experiment(script):
    script.home.mkdir()
    (script.home / "pid").write_text(f"{os.getpid()}\n")
    assert script("stop").stderr == "experiment.sh: it is not running\n"
    assert script("status").stdout.startswith(f"not running: process {os.getpid()} was killed, or ")


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


WHOLE = {line[0]: line for line in plan()}.values()  # of several lines with one folder the last has all networks


@pytest.mark.parametrize("line", WHOLE, ids=lambda line: line[0])
def test_committed_runs_are_those_of_the_plan(line):
    """So that compare takes them as finished, on a machine that has nothing."""
    name, images, epochs, models, first, seeds, flags = line
    given = dict(flag.removeprefix("--").replace("-", "_", 1).split("=") for flag in flags.split())
    known = {field.name for field in fields(TrainingConfig)}
    settings = {key: yaml.safe_load(value) for key, value in given.items() if key in known}
    config = TrainingConfig.from_recipe(
        RECORDS / "recipe.yaml", epochs=int(epochs), data_dir=f"/tmp/cmpe-se-experiment/data/{images}", **settings
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


GPU = ROOT / "benchmarks/gpu.sh"


@pytest.mark.parametrize("flags", [["--models", "a,b"], ["--models=a,b"]])
def test_the_time_of_a_gpus_part(flags, script, tmp_path):
    def call(seconds: int) -> subprocess.CompletedProcess:
        return script("experiment", tmp_path, tmp_path, *flags, path=GPU, PYTHON="echo", SECONDS_LEFT=str(seconds))

    assert re.search(r"--minutes=1\.(50|48) ", call(120).stdout)
    assert "--minutes=0.00 " in call(20).stdout
    found = call(0)
    assert (found.returncode, found.stdout, found.stderr) == (124, "", "gpu.sh: the time is up\n")


def test_a_gpu_is_given_the_lines_of_the_plan(script, tmp_path):
    """Those of which the repository does not have all runs; a mistake in a line does not end the others."""
    with open(script.records / "plan.txt", "a") as file:
        file.write("done | 50k | 2 | a,b | 5 | 1 |\nlarge | 50k | 24 | a,b | 0 | 3 | --corruptions --primary a:b\n")
    for name in ("a-seed5", "b-seed5"):
        make_cell(script.records / "cells/done" / name, finished=True)
        shutil.rmtree(script.records / "cells/done" / name / "model")
    for images in ("10k", "50k"):
        (tmp_path / "images" / images).mkdir(parents=True)
    flags = ("--compile=true", "--lanes", "9")
    found = script("experiment", tmp_path / "images", tmp_path / "out", *flags, path=GPU, PYTHON="echo")
    text = found.stdout.replace(str(tmp_path), "TMP")
    said = [re.sub("--minutes=[0-9.]* --patience=60 ", "", line) for line in text.splitlines()]
    recipe = "--recipe TMP/records/recipe.yaml --data-dir TMP/images"
    written = "--recorded-data-dir TMP/home/data"
    assert said == [
        "small: 0 of 6 runs are in the repository",
        f"-m benchmarks.many_runs --models a,b:se {recipe}/10k --epochs=2 --first-seed 100 --seeds 3 {written}/10k "
        "--output TMP/out/small --corruptions --compile=true --lanes 9",
        "done: 2 of 2 runs are in the repository",
        "large: 0 of 6 runs are in the repository",
        f"-m benchmarks.many_runs --models a,b {recipe}/50k --epochs=24 --first-seed 0 --seeds 3 {written}/50k "
        "--output TMP/out/large --corruptions --primary a:b --compile=true --lanes 9",
    ]
    found = script("experiment", tmp_path / "images", tmp_path / "out", path=GPU, PYTHON="false")
    assert found.returncode == 1
    assert found.stderr.splitlines() == [f"gpu.sh: {name} ended with status 1" for name in ("small", "large")]
    found = script("experiment", tmp_path / "images", tmp_path, path=GPU, PYTHON="echo", SECONDS_LEFT="10")
    assert (found.returncode, found.stderr) == (124, "gpu.sh: the time is up before small\n")
    (tmp_path / "images/10k").rmdir()
    found = script("experiment", tmp_path / "images", tmp_path / "out", path=GPU, PYTHON="echo")
    assert (found.returncode, len(found.stderr.splitlines())) == (1, 1)
    assert "has no 10k/, which small needs" in found.stderr
    assert "--output TMP/out/large" in found.stdout.replace(str(tmp_path), "TMP")


@pytest.mark.long
def test_a_gpu_goes_on_with_the_plan(script, archive, tmp_path):
    models, recipe = "preact_resnet20,preact_resnet20:se", script.records / "recipe.yaml"
    recipe.write_text("data: folder\nbatch_size: 36\nlr: 0.05\n")
    (script.records / "plan.txt").write_text(f"tiny | 10k | 1 | {models} | 7 | 1 |\n")
    # The path that experiment.sh would have, not the one of the images here.
    config = TrainingConfig.from_recipe(recipe, epochs=1, data_dir=str(script.home / "data/10k"))
    grid = Grid(tmp_path / "out/tiny", parse_entries(split_names(models), []), range(7, 8), config, {})
    plain, gated = grid.cells
    kept = RunFolder(script.records / "cells/tiny" / plain.run.path.name)
    kept.path.mkdir(parents=True)
    kept.write_config(grid.config_of(plain))
    kept.write_metrics([a_record()])
    kept.write_result(a_result(test_top1=12.5, seed=7))

    found = script("unpack", archive, tmp_path / "images")
    assert found.returncode == 0, found.stderr
    found = script("experiment", tmp_path / "images", tmp_path / "out", path=GPU, PYTHON=sys.executable)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "1 of 2 runs are finished" in found.stdout
    assert gated.run.read_result()["train_images"] == 72
    assert gated.run.read_config() == grid.config_of(gated)
    with tarfile.open(tmp_path / "out/tiny.tar.gz") as packed:
        names = packed.getnames()
    assert {f"cells/{cell.run.path.name}/result.json" for cell in grid.cells} < set(names)
