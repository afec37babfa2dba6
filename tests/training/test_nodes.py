"""Two machines of two processes each, on the loopback address: no folder of one is there for the other.

The network has no batch norm, so that all splits of a batch over processes give the same weights but for rounding.
"""

import os
import shutil
import signal
import socket
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from cmpe_se.commands.evaluate import evaluate
from tests.training.processes import Done, Running, empty_folder, start, succeed, trained_run
from tests.training.runs import assert_same_run, metrics, place, result, weights
from tests.training.test_processes import WARM, lines_of_ours
from tests.training.warm import RANKS, warm_starts

pytestmark = pytest.mark.slow
NETWORK = ("--model=test_efficientnet_gn", "--momentum=0.9", "--lr=0.01", "--checkpoint-steps=5")
RUN = "runs/test_efficientnet_gn-digits-seed0"
"""Where a run goes that is given no --output."""
MOST = 2e-3
"""Largest difference of a weight between splits of the batches, after some steps: sums of float32 in another order."""


def torchrun(options: tuple[str, ...], arguments: list[str]) -> None:
    from torch.distributed.run import main

    main([*options, "-m", "cmpe_se", *arguments])


def accelerate(arguments: list[str]) -> None:
    from accelerate.commands.accelerate_cli import main

    sys.argv = ["accelerate", "launch", "--config_file", "machines.yaml", "-m", "cmpe_se", *arguments]
    main()


def alone(processes: int, *options: str) -> partial:
    return partial(torchrun, ("--standalone", f"--nproc-per-node={processes}", *options))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_nodes(*arguments, fixed: bool = False, folders: list[Path] | None = None, options=()) -> list[Running]:
    """Start ``torchrun --nnodes 2 --nproc-per-node 2 -m cmpe_se ARGUMENTS`` once for each machine.

    Args:
        arguments: of the command line.
        fixed: the first machine has the main process; else torchrun chooses.
        folders: working directory of each machine; empty ones if left out.
        options: more of torchrun.
    """
    port, running = free_port(), []
    for node, folder in enumerate(folders or [empty_folder(), empty_folder()]):
        meeting = ("--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=test")
        if fixed:
            meeting = (f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}")
        program = partial(torchrun, ("--nnodes=2", "--nproc-per-node=2", "--monitor-interval=0.1", *meeting, *options))
        env = WARM["env"] | {RANKS: str(folder), "CMPE_SE_CACHE": str(folder / "cache")}
        running.append(start(*arguments, cwd=folder, program=program, before=warm_starts, env=env))
    return running


def folder_with_run(folders: list[Path]) -> Path:
    """The run's folder, which is on one machine alone."""
    (found,) = [folder / RUN for folder in folders if (folder / RUN).exists()]
    return found


def assert_close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], most: float = MOST) -> None:
    assert first.keys() == second.keys()
    worst = max((first[name].float() - second[name].float()).abs().max().item() for name in first)
    assert worst < most


@pytest.fixture(scope="module")
def one_process() -> Path:
    """Two epochs on one process, never interrupted."""
    return trained_run(*NETWORK, "--epochs=2")


@pytest.fixture(scope="module")
def four_processes(tmp_path_factory) -> Path:
    """The same on four processes."""
    folder = tmp_path_factory.mktemp("four") / "run"
    succeed("train", *NETWORK, "--epochs=2", "--output", folder, program=alone(4), **WARM)
    return folder


@pytest.fixture(scope="module")
def killed_and_started_again() -> tuple[Path, list[Done]]:
    """The same on two machines, without --output; a process of the second is killed in the second epoch."""
    folders = [empty_folder(), empty_folder()]
    running = start_nodes("train", *NETWORK, "--epochs=2", folders=folders, options=("--max-restarts=2",))
    paths = [folder / RUN for folder in folders]
    running[0].until(lambda: any(path.exists() and place(path) >= (1, 5) for path in paths))
    victim = next(folder for folder in folders if not (folder / RUN).exists())
    rank = next(file for file in victim.iterdir() if file.name.isdigit())
    os.kill(int(rank.read_text()), signal.SIGKILL)
    done = [one.wait() for one in running]
    assert [one.status for one in done] == [0, 0], [one.err for one in done]
    return folder_with_run(folders), done


def test_two_machines_train_as_one_process(killed_and_started_again, one_process):
    folder, _ = killed_and_started_again
    assert result(folder)["processes"] == 4
    many, one = metrics(folder), metrics(one_process)
    assert [(record["step"], record["lr"]) for record in many] == [(record["step"], record["lr"]) for record in one]
    assert many[0]["train_loss"] == pytest.approx(one[0]["train_loss"], rel=1e-4)
    assert many[1]["train_loss"] == pytest.approx(one[1]["train_loss"], rel=1e-3)
    assert_close(weights(folder), weights(one_process))
    assert result(folder)["test_top1"] == pytest.approx(result(one_process)["test_top1"], abs=0.6)  # two images of 360


def test_two_machines_test_every_image_once(killed_and_started_again, tmp_path):
    folder, _ = killed_and_started_again
    assert result(folder)["test_images"] == 360
    own = evaluate(str(folder), output=str(tmp_path))
    assert result(folder)["test_top1"] == pytest.approx(own["test_top1"], abs=1e-9)
    assert result(folder)["test_loss"] == pytest.approx(own["test_loss"], rel=1e-5)


@pytest.mark.long
def test_a_killed_process_changes_nothing(killed_and_started_again, four_processes):
    """Until the kill bit for bit. Afterwards DDP adds up the four gradients in another order for one step."""
    folder, _ = killed_and_started_again
    killed, whole = metrics(folder), metrics(four_processes)
    assert killed[0] == whole[0]
    assert killed[1]["train_loss"] == pytest.approx(whole[1]["train_loss"], rel=1e-5)
    assert_close(weights(folder), weights(four_processes), most=1e-4)


@pytest.mark.long
def test_two_processes_are_the_same_bit_for_bit_after_a_kill(tmp_path):
    """Of two numbers the sum is the same in any order."""
    once, again = tmp_path / "once", tmp_path / "again"
    command = ("train", *NETWORK, "--epochs=1", "--output")
    succeed(*command, once, program=alone(2), **WARM)
    env = WARM["env"] | {RANKS: str(tmp_path)}
    running = start(*command, again, program=alone(2, "--max-restarts=1"), before=warm_starts, env=env)
    running.until(lambda: place(again) >= (0, 5))
    os.kill(int((tmp_path / "1").read_text()), signal.SIGKILL)
    done = running.wait()
    assert done.status == 0, done.err
    assert "resuming after step" in done.err
    assert_same_run(again, once)


def test_a_restart_is_said_once(killed_and_started_again):
    _, done = killed_and_started_again
    text = "".join(one.err for one in done)
    said = lines_of_ours(text)
    assert len(said) <= 1  # none where torchrun has ended the others before they have seen it
    assert all("torchrun starts all of them again" in line for line in said)
    assert text.count("resuming after step") == 1
    assert "cmpe_se/" not in text  # no trace of ours
    assert sum(one.out.count('"test_top1"') for one in done) == 1


@pytest.fixture(scope="module")
def resumed(four_processes, tmp_path_factory) -> dict[int, Path]:
    """A third epoch after the two of four processes: on one process, and on three."""
    folders = {}
    for processes in (1, 3):
        folder = folders[processes] = tmp_path_factory.mktemp("resumed") / "run"
        shutil.copytree(four_processes, folder)
        succeed("train", "--resume", folder, "--epochs=3", program=alone(processes), **WARM)
    return folders


@pytest.mark.long
def test_resumed_on_another_number_of_processes(resumed):
    """Three processes have 22, 21 and 21 of the 64 images of a batch; each image weighs the same."""
    one, three = resumed[1], resumed[3]
    assert (result(one)["processes"], result(three)["processes"]) == (1, 3)
    assert metrics(three)[2]["train_loss"] == pytest.approx(metrics(one)[2]["train_loss"], rel=1e-3)
    assert result(one)["test_images"] == result(three)["test_images"] == 360
    assert_close(weights(one), weights(three))


@pytest.mark.long
def test_resumed_where_one_machine_alone_has_the_folder(four_processes, resumed):
    """The second machine gets settings and weights from the main process, which the first one has."""
    folders = [empty_folder(), empty_folder()]
    shutil.copytree(four_processes, folders[0] / "run")
    done = [one.wait() for one in start_nodes("train", "--resume=run", "--epochs=3", fixed=True, folders=folders)]
    assert [one.status for one in done] == [0, 0], [one.err for one in done]
    assert not (folders[1] / "run").exists()
    assert_close(weights(folders[0] / "run"), weights(resumed[1]))
    assert done[0].err.count("resuming after step 44 of 66") == 1
    assert done[1].err.count("resuming") == 0


def test_a_mistake_is_said_once():
    folders = [empty_folder(), empty_folder()]
    done = [one.wait() for one in start_nodes("train", "--resume=nowhere", fixed=True, folders=folders)]
    assert all(one.status not in (0, None) for one in done)
    (said,) = lines_of_ours("".join(one.err for one in done))
    assert "nowhere is no run folder" in said
    assert "cmpe_se/" not in "".join(one.err for one in done)


CONFIGURATION = """\
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
num_machines: 2
num_processes: 2
machine_rank: {rank}
main_process_ip: 127.0.0.1
main_process_port: {port}
mixed_precision: "no"
"""


def test_accelerates_configuration_file_for_two_machines():
    """Without GPUs too: MULTI_GPU makes Accelerate start torchrun, and the run is told that the CPU is meant."""
    port, running, folders = free_port(), [], [empty_folder(), empty_folder()]
    for rank, folder in enumerate(folders):
        (folder / "machines.yaml").write_text(CONFIGURATION.format(rank=rank, port=port))
        command = ("train", *NETWORK, "--epochs=1", "--batch-size=256")
        running.append(start(*command, cwd=folder, program=accelerate, **WARM))
    done = [one.wait() for one in running]
    assert [one.status for one in done] == [0, 0], [one.err for one in done]
    folder = folder_with_run(folders)
    assert (result(folder)["processes"], result(folder)["test_images"]) == (2, 360)
    assert sum(one.out.count('"test_top1"') for one in done) == 1
