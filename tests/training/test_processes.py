"""Two real processes on a CPU: the same recipe, and every test image once.

One run is started as users do, by ``torchrun`` with all its imports; the others by the same functions of the same
launchers in a process that has imported everything.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cmpe_se.commands.evaluate import evaluate
from cmpe_se.training.launching import processes_left_out
from tests.training.processes import SHORT, SMALL, Done, Running, empty_folder, run, start
from tests.training.runs import checkpoint, metrics, result, weights
from tests.training.warm import RANKS, warm_starts

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
# --standalone finds a free port, so that two tests do not meet.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "cmpe_se"]


def torchrun(arguments: list[str]) -> None:
    from torch.distributed.run import main

    main([*TORCHRUN[3:], *arguments])


def accelerate_launch(arguments: list[str], processes: int = 1) -> None:
    """Of one process: without accelerators it starts no more."""
    from accelerate.commands.accelerate_cli import main

    sys.argv = ["accelerate", "launch", "--num_processes", str(processes), "-m", "cmpe_se", *arguments]
    main()


def accelerate_launch_two(arguments: list[str]) -> None:
    accelerate_launch(arguments, processes=2)


WARM = {"env": {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, "before": warm_starts}


def launch(*arguments) -> Done:
    """``torchrun --nproc-per-node 2 -m cmpe_se ARGUMENTS`` on one thread each, without GPUs or imports."""
    return run(*arguments, program=torchrun, **WARM)


def launch_from_nothing(*arguments) -> subprocess.CompletedProcess:
    """The same, as users start it."""
    command = [*TORCHRUN, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=240, cwd=empty_folder())


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """Two epochs of digits, as two processes."""
    folder = tmp_path_factory.mktemp("two") / "run"
    done = launch_from_nothing("train", *SHORT, "--output", folder)
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.mark.slow
def test_there_were_two(two_processes):
    folder, done = two_processes
    assert result(folder)["processes"] == 2
    assert done.stderr.count("run folder") == 1  # one of them speaks
    assert done.stdout.count('"test_top1"') == 1


@pytest.mark.slow
def test_every_test_image_once(two_processes, tmp_path):
    folder, _ = two_processes
    assert result(folder)["test_images"] == 360
    alone = evaluate(str(folder), output=str(tmp_path))
    for name in ("test_top1", "test_top5"):
        assert result(folder)[name] == pytest.approx(alone[name], abs=1e-9)
    assert result(folder)["test_loss"] == pytest.approx(alone["test_loss"], rel=1e-5)


@pytest.mark.slow
def test_same_recipe(two_processes, short_run):
    folder, _ = two_processes
    two, one = metrics(folder), metrics(short_run)
    assert [record["step"] for record in two] == [record["step"] for record in one]
    assert [record["lr"] for record in two] == [record["lr"] for record in one]
    # The same images in the same order: only the batch norms see other halves.
    assert two[0]["train_loss"] == pytest.approx(one[0]["train_loss"], rel=0.1)
    assert weights(folder).keys() == weights(short_run).keys()


@pytest.mark.long
def test_odd_test_set_and_interruption(digit_folder, tmp_path):
    """29 x 4 + 1 test images do not halve; a stop reaches both processes and both go on."""
    extra = next((digit_folder / "train" / "0").iterdir())
    folder = tmp_path / "run"
    data = tmp_path / "data"
    subprocess.run(["cp", "-r", digit_folder, data], check=True)
    (data / "test" / "0" / "extra.png").write_bytes(extra.read_bytes())
    settings = (*SMALL, "--data", "folder", "--data-dir", data, "--batch-size", 20, "--checkpoint-steps", 3)
    running = start("train", "--epochs=30", *settings, "--output", folder, program=torchrun, **WARM)
    running.until((folder / "metrics.jsonl").exists)
    assert running.send(signal.SIGINT, group=True).status != 0
    reached = checkpoint(folder)["epoch"]
    assert 1 <= reached < 30
    done = launch("train", "--resume", folder, "--epochs", reached + 1)
    assert done.status == 0, done.err
    assert result(folder)["test_images"] == 29
    assert result(folder)["epochs"] == reached + 1


@pytest.mark.slow
def test_mistake(tmp_path):
    done = launch("train", "--data", "folder", "--data-dir", tmp_path / "nowhere")
    assert done.status != 0
    assert done.err.count("cmpe-se: error:") == 1
    assert str(tmp_path / "nowhere") in done.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_accelerate_without_accelerators_says_how_to_start_two(tmp_path):
    flags = (*SMALL, "--epochs=1", "--batch-size=256", "--output", tmp_path / "run")
    done = run("train", *flags, program=accelerate_launch_two, **WARM)
    assert done.status == 0, done.err
    assert result(tmp_path / "run")["processes"] == 1
    (said,) = lines_of_ours(done.err)
    assert said.endswith("for two: torchrun --nproc-per-node 2 -m cmpe_se train")


SEVERAL = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "left_out"),
    [
        (SEVERAL, True),
        (SEVERAL | {"RANK": "0"}, False),
        (SEVERAL | {"PMI_SIZE": "2"}, False),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, False),
        ({"MASTER_PORT": "29500"}, False),
        ({}, False),
    ],
)
def test_processes_are_left_out_where_accelerate_meant_several_and_none_has_a_rank(environment, left_out, monkeypatch):
    for name in (*SEVERAL, "RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert (processes_left_out() is not None) == left_out


def lines_of_ours(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("cmpe-se: ")]


LONG = ["train", *SMALL, "--epochs=200", "--checkpoint-steps=5", "--output"]


def alive_in_session(leader: int) -> list[psutil.Process]:
    def is_in(process: psutil.Process) -> bool:
        try:
            return os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE
        except (ProcessLookupError, psutil.NoSuchProcess):
            return False

    return [process for process in psutil.process_iter() if is_in(process)]


def has_begun(folder: Path) -> bool:
    return (folder / "state" / "checkpoint.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [torchrun, accelerate_launch])
@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_a_signal_to_all_processes_saves_once(number, launcher, tmp_path):
    """The launcher has the signal too, and hands it on: the second one must not end what is being saved."""
    running: Running = start(*LONG, tmp_path / "run", program=launcher, **WARM)
    running.until(lambda: has_begun(tmp_path / "run"))
    os.killpg(running.process.pid, getattr(signal, number))
    end = time.monotonic() + 60
    while alive_in_session(running.process.pid):  # accelerate ends before what it has started
        assert time.monotonic() < end
        time.sleep(0.05)
    said = lines_of_ours(running.wait().err)
    assert len(said) == 1
    assert said[0].startswith("cmpe-se: stopped and saved after step ")
    tree = checkpoint(tmp_path / "run")
    assert f"step {22 * tree['epoch'] + tree['batch']};" in said[0]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_is_one_sentence(rank, tmp_path):
    env = WARM["env"] | {RANKS: str(tmp_path)}
    running = start(*LONG, tmp_path / "run", program=torchrun, before=warm_starts, env=env)
    running.until(lambda: has_begun(tmp_path / "run"))
    try:
        os.kill(int((tmp_path / str(rank)).read_text()), signal.SIGKILL)
    except OSError:
        running.process.terminate()  # the launcher, which ends the others
        raise
    done = running.wait()
    assert done.status != 0
    text = done.err
    (said,) = lines_of_ours(text)
    assert "another process of this run has ended without a word, perhaps for want of memory" in said
    assert said.endswith(f"resume with: cmpe-se train --resume {tmp_path / 'run'}")
    assert "cmpe_se/" not in text  # no trace of ours; the launcher has one of its own


@pytest.mark.long
@pytest.mark.parametrize("share", [0, 1])
def test_one_process_that_fails_says_why_alone(share, digit_folder, tmp_path):
    """A broken test image in the share of either process."""
    data = shutil.copytree(digit_folder, tmp_path / "data")
    images = sorted((data / "test").rglob("*.png"))
    images[share].write_bytes(b"no image")
    settings = ("--data=folder", "--data-dir", data, "--image-size=112", "--model=test_resnet", "--batch-size=8")
    done = launch("train", "--epochs=1", *settings, "--output", tmp_path / "run")
    assert done.status not in (0, None)
    (said,) = lines_of_ours(done.err)
    assert str(images[share]) in said
    assert "cmpe_se/" not in done.err
