"""Full disks and losses that are not finite: one line, and nothing already saved is lost."""

import fcntl
import math
import os
import re
import resource
import shutil
import signal
import subprocess

import pytest

from cmpe_se.training.checkpoint import Checkpoints
from cmpe_se.training.run_folder import RunFolder
from tests.tiers import long_but
from tests.training.processes import SHORT, complaint_of, run, succeed
from tests.training.runs import assert_same_run, everything_in, metrics, place, result, start_until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def interrupted_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    start_until(folder, 0, 10, *SHORT).send(signal.SIGINT)
    return folder


@pytest.fixture
def stopped(interrupted_run, tmp_path):
    return shutil.copytree(interrupted_run, tmp_path / "run")


def no_large_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))


def test_no_room_for_the_first_checkpoint(tmp_path):
    done = run("train", *SHORT, "--checkpoint-steps=1", "--output", tmp_path / "run", before=no_large_files)
    assert re.search(r"cannot write checkpoint .*checkpoint\.safetensors: .*too large.*make room", done.complaint)
    assert not list((tmp_path / "run" / "state").iterdir())


@pytest.mark.long
def test_no_room_for_the_next_checkpoint(stopped, short_run):
    before = everything_in(stopped / "state")
    done = run("train", "--resume", stopped, before=no_large_files)
    assert "the last good one is kept" in done.complaint
    assert everything_in(stopped / "state") == before
    succeed("train", "--resume", stopped)
    assert_same_run(short_run, stopped)


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_full_disk(small_disk, stopped, short_run):
    run_folder = shutil.copytree(stopped, small_disk / "run")
    size = (run_folder / "state" / "checkpoint.safetensors").stat().st_size
    free = shutil.disk_usage(small_disk).free
    assert free > size
    (small_disk / "filler").write_bytes(bytes(free - size // 2))  # two checkpoints are there, and no third one fits
    at = place(run_folder)
    done = run("train", "--resume", run_folder)
    assert re.search(r"No space left on device.*the last good one is kept", done.complaint)
    assert place(run_folder) >= at
    assert Checkpoints(run_folder / "state").load()[1].name == "checkpoint.safetensors"
    assert not list((run_folder / "state").glob("*.partial"))
    (small_disk / "filler").unlink()
    succeed("train", "--resume", run_folder)
    assert_same_run(short_run, run_folder)


@pytest.mark.long
def test_no_room_for_the_model(stopped, short_run):
    (stopped / "model").write_text("a file where the folder should be")
    assert f"cannot write {stopped / 'model'}" in complaint_of("train", "--resume", stopped)
    assert not (stopped / "result.json").exists()
    assert not (stopped / "model.partial").exists()
    (stopped / "model").unlink()
    succeed("train", "--resume", stopped)
    assert_same_run(short_run, stopped)


@pytest.mark.long
def test_no_room_for_a_better_model(short_run, tmp_path):
    """The model of an earlier end stays whole while the next one is written."""
    folder = RunFolder(shutil.copytree(short_run, tmp_path / "run"))
    before = everything_in(folder.model)

    done = run("train", "--resume", folder.path, "--epochs=3", before=no_room_for_models)
    assert "cannot write" in done.complaint
    assert everything_in(folder.model) == before
    assert result(folder.path) == result(short_run)
    succeed("train", "--resume", folder.path)
    assert result(folder.path)["epochs"] == 3
    assert everything_in(folder.model) != before


def no_room_for_models():
    """Lower the limit once training is over."""
    original = RunFolder.save_model

    def save_model(*arguments, **settings):
        no_large_files()
        original(*arguments, **settings)

    RunFolder.save_model = save_model


@pytest.mark.parametrize("steps", long_but([1, 500], [1]))
def test_loss_that_is_not_finite(steps, tmp_path):
    done = run("train", *SHORT, "--lr=1e12", "--checkpoint-steps", steps, "--output", tmp_path / "run")
    found = re.search(
        r"(.*) at step (\d+) \(epoch 1\), learning rate (\S+); last good checkpoint: (.*); try a smaller --lr",
        done.complaint,
    )
    assert found, done.complaint
    assert re.search("loss is (nan|inf)|weights are not finite", found[1])
    assert 1 <= int(found[2]) <= 22
    finished = (int(found[2]) - 1) / 44  # part of the run before that step; cosine is the recipe's schedule
    assert float(found[3]) == pytest.approx(1e12 * (1 + math.cos(math.pi * finished)) / 2, rel=1e-3)
    good = found[4]
    if steps == 1:
        assert good == str(tmp_path / "run" / "state" / "checkpoint.safetensors")
        tree, _ = Checkpoints(tmp_path / "run" / "state").load()
        assert tree["batch"] < int(found[2])
        assert all(tensor.isfinite().all() for name, tensor in tree["network"].items() if name.endswith("weight"))
    else:
        assert good == "none yet"
    assert not (tmp_path / "run" / "result.json").exists()


def test_loss_that_is_not_finite_loses_nothing(short_run, tmp_path):
    folder = shutil.copytree(short_run, tmp_path / "run")
    before = everything_in(folder)
    complaint = complaint_of("train", "--resume", folder, "--epochs=3", "--schedule=constant", "--lr=1e12")
    assert f"last good checkpoint: {folder}/state/checkpoint.safetensors" in complaint
    assert "epoch 3" in complaint
    after = everything_in(folder)
    for name in before.keys() - {"config.yaml", "progress.html"}:  # which says what went wrong
        assert after[name] == before[name], name
    succeed("train", "--resume", folder, "--schedule=cosine", "--lr=0.1")
    assert metrics(folder)[:2] == metrics(short_run)
    assert result(folder)["epochs"] == 3


def test_two_processes_do_not_train_one_run(tmp_path, short_run):
    folder = tmp_path / "run"
    first = start_until(folder, 0, 10, *SHORT)
    os.kill(first.process.pid, signal.SIGSTOP)  # as if it took its time
    before = everything_in(folder)
    complaint = complaint_of("train", "--resume", folder)
    assert complaint == (f"cmpe-se: error: {folder} is being trained by another process; wait for it, or end that one")
    assert everything_in(folder) == before
    first.send(signal.SIGKILL)
    succeed("train", "--resume", folder)
    assert_same_run(short_run, folder)


def _without_locks() -> None:
    def cannot(*_):
        raise NotImplementedError("no flock here")

    fcntl.flock = cannot


@pytest.mark.long
def test_a_file_system_without_locks(tmp_path, short_run):
    done = run("train", *SHORT, "--output", tmp_path / "run", before=_without_locks)
    assert done.status == 0, done.err
    assert "cannot be locked" in done.err
    assert_same_run(short_run, tmp_path / "run")
