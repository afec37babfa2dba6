"""Runs that are killed, interrupted and gone on with end as if nothing had happened: bit for bit, on a CPU."""

import json
import re
import shutil
import signal

import pytest
import yaml

from cmpe_se.training import train
from cmpe_se.training.checkpoint import Checkpoints
from tests.tiers import long_but
from tests.training.conftest import EVERYTHING
from tests.training.processes import SHORT, complaint_of, start, succeed
from tests.training.runs import (
    assert_same_run,
    checkpoint,
    everything_in,
    metrics,
    place,
    result,
    start_until,
    weights,
)

pytestmark = pytest.mark.slow

REFERENCES = pytest.mark.parametrize(
    ("reference", "settings"), [("short_run", SHORT), ("everything_run", EVERYTHING)], ids=["plain", "everything on"]
)


@REFERENCES
@pytest.mark.parametrize("epoch", long_but([0, 1], [1]))
def test_killed_in_an_epoch(reference, settings, epoch, request, tmp_path):
    done = start_until(tmp_path / "run", epoch, 5, *settings).send(signal.SIGKILL)
    assert done.status == -signal.SIGKILL
    assert place(tmp_path / "run")[0] == epoch
    assert 5 <= place(tmp_path / "run")[1] < 22
    assert not (tmp_path / "run" / "result.json").exists()
    done = succeed("train", "--resume", tmp_path / "run")
    step = int(re.search(r"resuming after step (\d+) of 44", done.err)[1])
    assert 22 * epoch + 5 <= step < 22 * epoch + 22
    assert_same_run(request.getfixturevalue(reference), tmp_path / "run")


@pytest.mark.long
def test_killed_before_the_first_checkpoint(everything_run, tmp_path):
    """It begins anew, with each of its settings."""
    running = start("train", *EVERYTHING, "--output", tmp_path / "run")
    running.until((tmp_path / "run" / "config.yaml").exists).send(signal.SIGKILL)
    assert not (tmp_path / "run" / "state").exists()
    succeed("train", "--resume", tmp_path / "run")
    assert_same_run(everything_run, tmp_path / "run")


@pytest.mark.long
def test_killed_again_and_again(everything_run, tmp_path):
    start_until(tmp_path / "run", 0, 5, *EVERYTHING).send(signal.SIGKILL)
    for goal in ((0, 15), (1, 5), (1, 13)):  # a checkpoint every five steps: 15, 30 and 35 of 44
        running = start("train", "--resume", tmp_path / "run")
        running.until(lambda goal=goal: place(tmp_path / "run") >= goal).send(signal.SIGKILL)
    succeed("train", "--resume", tmp_path / "run")
    assert_same_run(everything_run, tmp_path / "run")


def test_killed_between_the_last_checkpoint_and_the_result(short_run, tmp_path):
    shutil.copytree(short_run, tmp_path / "run")
    for name in ("result.json", "curves.png", "metrics.jsonl"):
        (tmp_path / "run" / name).unlink()
    shutil.rmtree(tmp_path / "run" / "model")
    succeed("train", "--resume", tmp_path / "run")
    assert (tmp_path / "run" / "curves.png").exists()
    assert_same_run(short_run, tmp_path / "run")


@pytest.mark.parametrize(
    ("number", "epoch"),
    [
        pytest.param(signal.SIGINT, 1, marks=pytest.mark.long),
        (signal.SIGTERM, 1),
        pytest.param(signal.SIGINT, 0, marks=pytest.mark.long),
    ],
)
def test_interrupted(number, epoch, short_run, tmp_path):
    running = start("train", *SHORT, "--output", "here", "--checkpoint-steps=5", cwd=tmp_path)
    done = running.until(lambda: place(tmp_path / "here") >= (epoch, 5)).send(number)
    assert done.status == 130
    step, command = re.search(r"stopped and saved after step (\d+); resume with: cmpe-se (.*)", done.complaint).groups()
    assert int(step) == 22 * place(tmp_path / "here")[0] + place(tmp_path / "here")[1]
    assert not (tmp_path / "here" / "result.json").exists()
    succeed(*command.split(), cwd=tmp_path)
    assert_same_run(short_run, tmp_path / "here")


@pytest.fixture(scope="module")
def interrupted_run(tmp_path_factory):
    """A run with two good checkpoints, stopped in the second epoch."""
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    start_until(folder, 1, 10, *SHORT).send(signal.SIGINT)
    return folder


@pytest.fixture
def stopped(interrupted_run, tmp_path):
    return shutil.copytree(interrupted_run, tmp_path / "run")


TEARS = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "cut in the header": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "empty": lambda path: path.write_bytes(b""),
    "another's": lambda path: path.write_bytes(b"\x02\x00\x00\x00\x00\x00\x00\x00{}"),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_checkpoint_is_passed_over(tear, stopped):
    checkpoints = Checkpoints(stopped / "state")
    TEARS[tear](checkpoints.newest)
    tree, path = checkpoints.load()
    assert path == checkpoints.previous
    assert (tree["epoch"], tree["batch"]) >= (1, 5)
    assert bool(checkpoints.unreadable) == (tear != "gone")


@pytest.mark.parametrize("tear", ["truncated", "gone"])
def test_torn_checkpoint(tear, stopped, short_run):
    TEARS[tear](stopped / "state" / "checkpoint.safetensors")
    before = place(stopped)
    done = succeed("train", "--resume", stopped)
    assert f"resuming after step {22 * before[0] + before[1]} of 44" in done.err
    assert "previous.safetensors" in done.err
    assert_same_run(short_run, stopped)


def test_torn_checkpoint_never_replaces_the_good_one(stopped):
    checkpoints = Checkpoints(stopped / "state")
    TEARS["truncated"](checkpoints.newest)
    tree, path = checkpoints.load()
    assert path == checkpoints.previous
    good = checkpoints.previous.read_bytes()
    checkpoints.save(tree)
    assert checkpoints.previous.read_bytes() == good
    assert checkpoints.load()[1] == checkpoints.newest
    checkpoints.save(tree)
    TEARS["truncated"](checkpoints.newest)
    assert Checkpoints(stopped / "state").load()[1] == checkpoints.previous


def test_garbage_in_both_checkpoints(stopped):
    for path in (stopped / "state").iterdir():
        path.write_bytes(b"garbage")
    before = everything_in(stopped)
    complaint = complaint_of("train", "--resume", stopped)
    assert re.search(r"no checkpoint can be read.*checkpoint\.safetensors.*previous\.safetensors.*--output", complaint)
    assert everything_in(stopped) == before


def test_finished_run_returns_its_result(short_run):
    before = everything_in(short_run)
    done = succeed("train", "--resume", short_run)
    assert json.loads(done.out)["test_top1"] == pytest.approx(result(short_run)["test_top1"], rel=1e-5)
    assert "epoch" not in done.err
    assert everything_in(short_run) == before
    assert train(resume=short_run) == result(short_run)


@pytest.mark.long
def test_longer(short_run, tmp_path):
    shutil.copytree(short_run, tmp_path / "run")
    arguments = ("train", "--resume", tmp_path / "run", "--epochs", "4")
    running = start(*arguments, "--checkpoint-steps=5").until(lambda: place(tmp_path / "run") >= (2, 5))
    running.send(signal.SIGKILL)
    assert result(tmp_path / "run")["epochs"] == 2  # until there is a new one
    assert metrics(tmp_path / "run") == metrics(short_run)
    # It knows by itself that it was to have four.
    succeed("train", "--resume", tmp_path / "run")
    assert result(tmp_path / "run")["epochs"] == 4
    assert metrics(tmp_path / "run")[:2] == metrics(short_run)
    assert [record["epoch"] for record in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert result(tmp_path / "run")["test_top1"] == metrics(tmp_path / "run")[-1]["test_top1"]
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["epochs"] == 4
    shutil.copytree(short_run, tmp_path / "unkilled")
    succeed("train", "--resume", tmp_path / "unkilled", "--epochs", "4")
    assert_same_run(tmp_path / "unkilled", tmp_path / "run")


def test_output_that_holds_a_run(short_run):
    before = everything_in(short_run)
    complaint = complaint_of("train", "--epochs", "1", "--output", short_run)
    assert f"{short_run} holds a run already; resume it with --resume {short_run}" in complaint
    assert everything_in(short_run) == before


def test_resume_of_nothing(tmp_path):
    assert "is no run folder" in complaint_of("train", "--resume", tmp_path / "nothing")
    assert "is no run folder" in complaint_of("train", "--resume", tmp_path)


def test_resume_with_an_output(stopped, tmp_path):
    complaint = complaint_of("train", "--resume", stopped, "--output", tmp_path / "other")
    assert "leave --output" in complaint
    assert not (tmp_path / "other").exists()


@pytest.mark.long
def test_another_batch_size_in_an_epoch(stopped, short_run):
    before = everything_in(stopped)
    complaint = complaint_of("train", "--resume", stopped, "--batch-size", "32")
    assert re.search(r"batches of 64 images into an epoch, and batch_size 32.*resume with 64", complaint)
    assert everything_in(stopped) == before
    succeed("train", "--resume", stopped)
    assert_same_run(short_run, stopped)


def test_settings_for_a_finished_run(short_run):
    before = everything_in(short_run)
    assert "continue it with a larger --epochs" in complaint_of("train", "--resume", short_run, "--lr", "5")
    assert succeed("train", "--resume", short_run).out
    assert everything_in(short_run) == before


@pytest.mark.long
def test_torn_result(short_run, tmp_path):
    folder = shutil.copytree(short_run, tmp_path / "run")
    (folder / "result.json").write_text("{")
    complaint = complaint_of("train", "--resume", folder)
    assert "result.json cannot be read" in complaint
    (folder / "result.json").unlink()
    succeed("train", "--resume", folder)
    assert_same_run(short_run, folder)


@pytest.mark.parametrize("flags", [["--model", "resnet18"], ["--optimizer", "adamw"]])
def test_resume_with_settings_that_do_not_fit(flags, stopped, short_run):
    before = everything_in(stopped)
    assert "does not fit these settings" in complaint_of("train", "--resume", stopped, *flags)
    assert everything_in(stopped) == before


def test_nothing_is_unpickled(stopped, short_run, tmp_path):
    done = succeed("train", "--resume", stopped, before=forbid_pickle)
    assert "resuming after" in done.err
    assert_same_run(short_run, stopped)
    assert checkpoint(stopped)["epoch"] == 2
    assert weights(stopped)
    succeed("evaluate", stopped, "--output", tmp_path / "evaluation", before=forbid_pickle)


def forbid_pickle():
    """Make everything that unpickles fail."""
    import pickle

    import torch

    def fail(*_, **__):
        raise AssertionError("unpickled")

    pickle.load = pickle.loads = pickle.Unpickler = pickle._Unpickler = fail
    torch.load = torch.serialization.load = fail
