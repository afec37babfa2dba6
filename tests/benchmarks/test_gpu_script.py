"""``benchmarks/gpu.sh``: its parts' commands are right, in tiny sizes and without a GPU."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Class folders of 8x8 colour noise, a mean of its own for each class."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for part, count in (("train", 24), ("test", 8)):
        for label in range(3):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(80 * label, 80 * label + 90, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    command = [str(ROOT / "benchmarks" / "gpu.sh"), *map(str, arguments)]
    surroundings = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "COLUMNS": "160"} | environment
    return subprocess.run(command, capture_output=True, text=True, env=surroundings, cwd="/", check=False)


@pytest.mark.long
def test_experiment(images, tmp_path):
    models = "--models=preact_resnet20,se_preact_resnet20"
    done = run(
        "experiment", images, tmp_path, models, "--seeds=1", "--epochs=1", "--batch-size=36", "--warmup-epochs=0"
    )
    assert done.returncode == 0, done.stderr
    assert "se_preact_resnet20 seed 0:" in done.stdout
    with tarfile.open(tmp_path / "cells.tar.gz") as archive:
        assert "cells/se_preact_resnet20-seed0/result.json" in archive.getnames()


@pytest.mark.parametrize(("statuses", "calls"), [("75 0", 2), ("1", 1), ("75 75 0", 3)])
def test_a_stuck_device_goes_on_with_one_run_at_a_time(statuses, calls, tmp_path):
    """A stand-in for Python notes how it was called, and ends as it is told."""
    python, log, left = tmp_path / "python", tmp_path / "calls", tmp_path / "statuses"
    left.write_text("\n".join(statuses.split()) + "\n")
    python.write_text(f'#!/bin/sh\necho "$*" >>{log}\nread -r status <{left}\nsed -i 1d {left}\nexit "$status"\n')
    python.chmod(0o755)
    done = run("experiment", "-", tmp_path, "--models=plain", "--lanes=6", PYTHON=str(python))
    assert done.returncode == int(statuses.split()[-1])
    lines = log.read_text().splitlines()
    assert len(lines) == calls
    assert "--patience=60" in lines[0]
    assert [line.endswith("--lanes=1") for line in lines] == [False] + [True] * (calls - 1)


@pytest.mark.long
def test_benchmark(tmp_path):
    sizes = {"BATCH": "2", "SMALL_BATCH": "2", "SIDE": "32", "TURNS": "3", "CONTENDERS": "static"}
    done = run("benchmark", "-", tmp_path, ENGINES="eager", MODES="forward", **sizes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("forward, bfloat16, eager, merged") == 1
    assert done.stdout.count("forward, float32, eager, merged") == 1
    with tarfile.open(tmp_path / "benchmark.tar.gz") as archive:
        assert sum(name.endswith(".csv") for name in archive.getnames()) == 2


def test_what_could_not_be_measured_is_named(tmp_path):
    done = run("benchmark", "-", tmp_path, ENGINES="cudagraphs", MODES="forward", PYTHON="false")
    assert done.returncode == 1
    assert "not measured: resnet50 --batch-sizes 128" in done.stdout


@pytest.mark.long
def test_wrn(images, tmp_path):
    done = run("wrn", images, tmp_path, "--dry-run", "--precision=float32", "--compile=false", "--batch-size=8")
    assert done.returncode == 0, done.stderr
    assert "cmpe_se_wrn16_4:folded_3x3" in done.stdout


@pytest.mark.long
def test_tests_are_skipped_without_a_gpu(tmp_path):
    done = run("tests", "-", tmp_path, "--co")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tests/gpu/test_many_runs.py" in (tmp_path / "tests.log").read_text()


@pytest.mark.parametrize("arguments", [("everything", "-", "OUTPUT"), ("tests",), ()])
def test_usage(arguments, tmp_path):
    done = run(*(tmp_path if word == "OUTPUT" else word for word in arguments))
    assert done.returncode != 0
    assert "usage: benchmarks/gpu.sh" in done.stderr
