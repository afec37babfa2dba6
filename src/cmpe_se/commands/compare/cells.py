"""One run of a comparison in a process of its own, as `cmpe-se train` would do it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from cmpe_se.utils.signals import PARENT

_LOOK = 0.2  # seconds between two looks at a process
# glibc otherwise gives large blocks back to the system at once, which costs a network on a CPU up to a third.
_KEPT_HEAP = {"MALLOC_TRIM_THRESHOLD_": "2147483647", "MALLOC_MMAP_THRESHOLD_": "2147483647"}
_ORPHAN = 120.0  # seconds that a process whose starter was killed may take to save a checkpoint
# A launcher's settings are for this process, not for the single ones that it starts.
_FOREIGN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_FOREIGN_BEGINNINGS = ("TORCHELASTIC_", "ACCELERATE_", "GROUP_", "ROLE_")

STOPPED, ELSEWHERE = "stopped", "runs elsewhere"


class Job(NamedTuple):
    """All that a process, perhaps on another machine, needs to know of a run. Paths as text, from the root.

    ``settings`` are (name, value) of each field in which the run differs from the recipe; values are text, numbers,
    truth values or None.
    """

    run: str
    recipe: str
    settings: tuple[tuple[str, str | float | bool | None], ...]

    @property
    def command(self) -> list[str]:
        """`cmpe-se train`, from the start or resumed."""
        train = [sys.executable, "-m", "cmpe_se", "train"]
        if (Path(self.run) / "config.yaml").is_file():
            return [*train, "--resume", self.run]
        flags = [f"--{name}={_as_flag(value)}" for name, value in self.settings]
        return [*train, "--recipe", self.recipe, "--output", self.run, *flags]


def _as_flag(value: str | float | bool | None) -> str:
    """As YAML writes it: null, true, 0.5."""
    return value if isinstance(value, str) else json.dumps(value)


def run_job(
    job: Job, environment: dict[str, str], wants_stop: Callable[[], bool], *, patience: float = 0
) -> str | None:
    """Train one cell to its end.

    Args:
        job: which.
        environment: more variables for the process, such as the device it may see.
        wants_stop: polled; once it is true, the process gets SIGTERM, saves and ends.
        patience: seconds to wait for another command that trains the same cell, or for the lock of a machine that is
            gone.

    Returns:
        None if it has finished, otherwise why it has not, in one line.
    """
    folder = Path(job.run)
    if not Path(job.recipe).is_file():
        return f"{job.recipe} is not there; all machines need to see the comparison's folder"
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{folder}.lock", timeout=patience):
            _let_orphan_end(folder, wants_stop)
            if (folder / "result.json").is_file():
                return None
            return STOPPED if wants_stop() else _watch(job, environment, wants_stop)
    except Timeout:
        return ELSEWHERE


def _let_orphan_end(folder: Path, wants_stop: Callable[[], bool]) -> None:
    """Wait while a training whose starter was killed saves its checkpoint: it holds the run's own lock until then."""
    end = time.monotonic() + _ORPHAN
    while (folder / ".lock").exists() and time.monotonic() < end and not wants_stop():
        try:
            with FileLock(folder / ".lock", timeout=0):
                return
        except Timeout:
            time.sleep(_LOOK)
        except (OSError, NotImplementedError):  # no locks here, of which the training itself warns
            return


def _watch(job: Job, environment: dict[str, str], wants_stop: Callable[[], bool]) -> str | None:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in _FOREIGN and not name.startswith(_FOREIGN_BEGINNINGS)
    }
    log = Path(f"{job.run}.log")
    with open(log, "a") as output:
        # In a session of its own: Ctrl-C reaches only this process, which sends one SIGTERM.
        process = subprocess.Popen(
            job.command,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env=_KEPT_HEAP | inherited | environment | {PARENT: str(os.getpid())},
        )
        stopped = False
        try:
            while process.poll() is None:
                if not stopped and wants_stop():
                    process.send_signal(signal.SIGTERM)
                    stopped = True
                try:
                    process.wait(_LOOK)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if process.poll() is None:  # this process ends by an exception
                process.terminate()
                process.wait()
    if process.returncode == 0:
        return None
    return STOPPED if stopped else _reason(log, process.returncode)


def _reason(log: Path, status: int) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("cmpe-se: ")] or lines[-1:]
    if status < 0:
        return f"ended by signal {-status} (out of memory?); see {log}"
    return said[-1].removeprefix("cmpe-se: ").removeprefix("error: ") if said else f"ended with status {status}"
