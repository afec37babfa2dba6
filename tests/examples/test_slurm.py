"""The SLURM scripts, with stand-ins for SLURM's commands that start, stop and queue real processes on this machine."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from cmpe_se.commands.compare.places import usable_cores
from tests.commands.compare.test_compare import few_digits, table
from tests.training.processes import CONSOLE_SCRIPT, empty_folder
from tests.training.runs import metrics, weights

SCRIPTS = Path(__file__).parents[2] / "examples" / "slurm"
# `srun` starts the command once for each node; `scancel` signals all that it has started, and not the script.
COMMANDS = {
    "srun": """
        [ "${1#--}" = "$1" ] || shift
        for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
          SLURM_NODEID=$node "$@" & echo $! >> "$JOB/steps"
        done
        status=0; for process in $(jobs -p); do wait "$process" || status=$?; done; exit "$status" """,
    "scancel": """
        [ "$1" = --signal=TERM ] && kill -TERM $(cat "$JOB/steps")""",
    "scontrol": """
        if [ "$1 $2" = "show hostnames" ]; then printf '%s\\n' 127.0.0.1 127.0.0.1
        elif [ "$1" = requeue ]; then echo "$2" >> "$JOB/requeued"
        else exit 1; fi""",
}


class Job:
    """A script in the queue of one machine."""

    def __init__(self, script: str, *arguments: object, nodes: int = 1, **variables: str):
        self.folder = empty_folder()
        for name, body in COMMANDS.items():
            (self.folder / name).write_text(f"#!/bin/bash\n{body}\n")
            (self.folder / name).chmod(0o755)
        self.command = ["bash", str(SCRIPTS / script), *map(str, arguments)]
        self.environment = os.environ | variables
        self.environment |= {"JOB": str(self.folder), "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "n[1-2]"}
        self.environment |= {"SLURM_JOB_NUM_NODES": str(nodes), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        paths = (self.folder, CONSOLE_SCRIPT.parent, os.environ["PATH"])
        self.environment["PATH"] = os.pathsep.join(map(str, paths))
        self.start()

    def start(self) -> None:
        """As SLURM does it for the first time and after each requeue."""
        (self.folder / "steps").unlink(missing_ok=True)
        with open(self.folder / "log", "a") as log:  # --open-mode=append
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, env=self.environment)

    def until(self, condition: Callable[[], bool], timeout: float = 400) -> None:
        end = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, self.log
            assert time.monotonic() < end, self.log
            time.sleep(0.01)

    def end(self, timeout: float = 400) -> int:
        return self.process.wait(timeout)

    @property
    def requeued(self) -> int:
        file = self.folder / "requeued"
        return len(file.read_text().splitlines()) if file.exists() else 0

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()


@pytest.fixture
def submit():
    """Makes jobs, of which nothing is left at the end."""
    jobs: list[Job] = []

    def make(*arguments: object, **settings) -> Job:
        jobs.append(Job(*arguments, **settings))
        return jobs[-1]

    yield make
    for job in jobs:
        if job.process.poll() is None:
            for process in [*psutil.Process(job.process.pid).children(recursive=True), job.process]:
                process.kill()
            job.process.wait()


def test_scripts_are_bash():
    checker = shutil.which("shellcheck", path=os.pathsep.join([str(CONSOLE_SCRIPT.parent), os.environ["PATH"]]))
    for script in SCRIPTS.iterdir():
        subprocess.run(["bash", "-n", script], check=True)
        assert "#SBATCH --requeue\n" in script.read_text()
        if checker:
            subprocess.run([checker, script], check=True)


@pytest.mark.long
def test_tasks_of_an_array_share_the_runs_and_go_on_after_a_requeue(submit):
    folder = empty_folder() / "comparison"
    data = ("--data=folder", f"--data-dir={few_digits()}", "--batch-size=64", "--device=cpu", "--epochs=40")
    command = ("compare.sbatch", "--models=test_resnet,test_resnet:se", *data, "--jobs=1", "--seeds=2")
    tasks = [submit(*command, "--output", folder) for _ in range(2)]

    def begun() -> list[Path]:
        return [path for path in folder.glob("cells/*") if (path / "state" / "checkpoint.safetensors").exists()]

    tasks[0].until(lambda: len(begun()) >= 2)  # each task trains one of its own
    running = psutil.Process(tasks[0].process.pid).children(recursive=True)
    own = next(Path(word).name for process in running for word in process.cmdline() if "/cells/" in word)
    tasks[0].process.send_signal(signal.SIGTERM)
    assert tasks[0].end() == 130, tasks[0].log
    assert tasks[0].requeued == 1
    assert "stopped and saved after step" in (folder / "cells" / f"{own}.log").read_text()
    tasks[0].start()
    assert [task.end() for task in tasks] == [0, 0], tasks[0].log + tasks[1].log
    assert [task.requeued for task in tasks] == [1, 0]
    assert "runs elsewhere" in tasks[0].log + tasks[1].log

    assert len(list(folder.glob("cells/*/result.json"))) == 4
    assert all(row["seeds"] == "2" and row["latency_ms"] for row in table(folder / "compare.csv"))
    assert sum(log.read_text().count("resuming after step") for log in folder.glob("cells/*.log")) == 1
    alone = empty_folder() / "alone"
    model = json.loads((folder / "cells" / own / "result.json").read_text())
    assert model["epochs"] == 40
    view = ["--convert=se"] if "-se-" in own else []
    command = [CONSOLE_SCRIPT, "train", "--recipe", folder / "recipe.yaml", "--model=test_resnet", f"--seed={own[-1]}"]
    threads = {"OMP_NUM_THREADS": str(usable_cores())}  # as many as the tasks' one run at a time
    subprocess.run([*command, *view, "--output", alone], env=os.environ | threads, check=True, capture_output=True)
    assert metrics(folder / "cells" / own) == metrics(alone)


@pytest.mark.long
def test_a_training_on_two_nodes_goes_on_after_a_requeue(submit):
    run, whole = empty_folder() / "run", empty_folder() / "whole"
    settings = ("--model=test_resnet", "--data=folder", f"--data-dir={few_digits()}", "--batch-size=32", "--epochs=25")
    job = submit("train_nodes.sbatch", run, *settings, "--device=cpu", nodes=2)
    job.until(lambda: (run / "metrics.jsonl").exists())
    job.process.send_signal(signal.SIGTERM)
    assert job.end() != 0
    assert job.requeued == 1, job.log
    assert "stopped and saved after step" in job.log
    assert not (run / "result.json").exists()
    job.start()
    assert job.end() == 0, job.log
    assert job.requeued == 1
    assert "resuming after step" in job.log
    other = submit("train_nodes.sbatch", whole, *settings, "--device=cpu", nodes=2)
    assert other.end() == 0, other.log
    assert metrics(run) == metrics(whole)
    first, second = weights(run), weights(whole)
    assert all((first[name] == second[name]).all() for name in second)
