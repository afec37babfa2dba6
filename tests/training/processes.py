"""The command in real processes, forked from one that has imported everything: a start takes no seconds."""

import functools
import hashlib
import io
import multiprocessing
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
from filelock import FileLock

from cmpe_se_command import COMMANDS

_FORKS = multiprocessing.get_context("forkserver")
_IMPORTED_LATE = ["sklearn.datasets", "sklearn.model_selection", "torchmetrics.functional.classification"]
_MODULES = ["cli", *(f"commands.{name}" for name in COMMANDS)]
_FORKS.set_forkserver_preload(["pytest", *(f"cmpe_se.{module}" for module in _MODULES), *_IMPORTED_LATE])
SHARED_FOLDER = "CMPE_SE_SHARED_TEST_RUNS"
"""Environment variable with the folder of the runs that all workers share."""
CONSOLE_SCRIPT = Path(sys.executable).with_name("cmpe-se")
SMALL = ("--model=test_resnet", "--convert=pair_view_1x1")
"""A small network with gates, which takes a quarter of the time of the default one."""
SHORT = ("--epochs=2", *SMALL)
"""A training of 44 steps."""


class Done(NamedTuple):
    """What a process has left."""

    status: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line of an error; fails where there is none, more than one, a stack trace or a status of 0."""
        assert self.status not in (0, None), self.err
        assert "Traceback" not in self.err, self.err
        lines = [line for line in self.err.splitlines() if line.startswith("cmpe-se: ")]
        assert len(lines) == 1, self.err
        assert self.err.splitlines()[-1] == lines[0], self.err
        return lines[0]


class Running:
    """``cmpe-se ARGUMENTS`` in a process and a session of its own."""

    def __init__(self, *arguments, cwd: Path, env: dict[str, str], before, terminal: str | None, program):
        self.folder = Path(tempfile.mkdtemp(prefix="command-"))
        self.arguments = [str(argument) for argument in arguments]
        place = (terminal, terminal) if terminal else (self.folder / "out", self.folder / "err")
        self.process = _FORKS.Process(target=_child, args=(self.arguments, *place, cwd, env, before, program))
        self.process.start()

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text() if (self.folder / "err").exists() else ""

    def until(self, condition: Callable[[], bool], timeout: float = 120) -> "Running":
        """Wait until something has happened; fail if the process ends before."""
        end = time.monotonic() + timeout
        while not condition():
            assert self.process.is_alive(), f"ended with {self.process.exitcode} before: {self.err}"
            assert time.monotonic() < end, f"did not happen in {timeout} s: {self.err}"
            time.sleep(0.002)
        return self

    def send(self, number: int, *, group: bool = False) -> Done:
        """Send a signal, to the process or, as a terminal does, to all it has started; wait for the end."""
        (os.killpg if group else os.kill)(self.process.pid, number)
        return self.wait()

    def wait(self, timeout: float = 240) -> Done:
        self.process.join(timeout)
        if self.process.is_alive():
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.join()
            pytest.fail(f"{self.arguments} was not done after {timeout} s: {self.err}")
        out = self.folder / "out"
        done = Done(self.process.exitcode, out.read_text() if out.exists() else "", self.err)
        shutil.rmtree(self.folder)
        return done


def start(
    *arguments, cwd: Path | None = None, env=None, before=None, terminal: str | None = None, program=None
) -> Running:
    """Start ``cmpe-se ARGUMENTS`` on one thread.

    Args:
        arguments: of the command line.
        cwd: working directory; an empty one if left out.
        env: more environment variables.
        before: function of a module to call in the process first.
        terminal: path of a terminal to take the place of the output files.
        program: function of a module to call with the arguments, in place of ``cmpe-se``.
    """
    cwd = cwd or empty_folder()
    return Running(*arguments, cwd=cwd, env=env or {}, before=before, terminal=terminal, program=program)


def run(*arguments, **settings) -> Done:
    """Run ``cmpe-se ARGUMENTS`` to its end."""
    return start(*arguments, **settings).wait()


def succeed(*arguments, **settings) -> Done:
    """Run ``cmpe-se ARGUMENTS`` to its good end."""
    done = run(*arguments, **settings)
    assert done.status == 0, done.err
    assert "Traceback" not in done.err, done.err
    return done


def complaint_of(*arguments, cwd: Path | None = None) -> str:
    """The one line that ``cmpe-se ARGUMENTS`` ends with, called in this process: a sentence needs no process."""
    from cmpe_se_command import main

    out, err, before = io.StringIO(), io.StringIO(), Path.cwd()
    os.chdir(cwd or empty_folder())
    try:
        with redirect_stdout(out), redirect_stderr(err):
            try:
                status = main([str(argument) for argument in arguments])
            except SystemExit as end:
                status = end.code
    finally:
        os.chdir(before)
    return Done(status, out.getvalue(), err.getvalue()).complaint


@functools.cache
def trained_run(*arguments: str) -> Path:
    """A run of ``cmpe-se train`` in a folder of its own; once a session for the same arguments."""
    folder = shared_folder() / f"run-{hashlib.sha256(repr(arguments).encode()).hexdigest()[:16]}"
    with FileLock(f"{folder}.lock"):  # the other worker may want it too
        if not (folder / "result.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            succeed("train", *arguments, "--output", folder)
    return folder


def shown_on_terminal(*arguments, columns: int = 140, before=None) -> str:
    """What ``cmpe-se ARGUMENTS`` shows on a terminal, redrawn lines one after the other, without colours."""
    main, follower = pty.openpty()
    env = {"TERM": "xterm", "COLUMNS": str(columns)}
    running = start(*arguments, env=env, terminal=os.ttyname(follower), before=before)
    shown = b""
    while running.process.is_alive() or _readable(main):
        if _readable(main):
            shown += os.read(main, 65536)
    assert running.wait().status == 0, shown
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())


def _readable(descriptor: int) -> bool:
    return bool(select.select([descriptor], [], [], 0.2)[0])


def _child(arguments, out, err, cwd, env, before, program) -> None:
    multiprocessing.set_start_method(None, force=True)  # the system's own, as in a process that was not forked
    os.setsid()
    os.nice(5)  # so that a test that waits for the right moment does not miss it on a busy machine
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOCTTY, 0o600), number)
    os.chdir(cwd)
    os.environ.update(env)
    import torch

    from cmpe_se_command import main

    torch.set_num_threads(1)
    if before:
        before()
    sys.argv = ["cmpe-se", *arguments]
    sys.exit((program or main)(arguments))


@functools.cache
def shared_folder() -> Path:
    """A folder that all workers of this session share; the process that started them removes it."""
    folder = Path(os.environ[SHARED_FOLDER])
    folder.mkdir(exist_ok=True)
    return folder


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="cmpe-se-tests-")


def empty_folder() -> Path:
    """A new folder that goes away at the end of the session."""
    return Path(tempfile.mkdtemp(dir=_scratch().name))


@functools.cache
def default_run() -> tuple[Path, Done]:
    """The run of ``cmpe-se train`` without any argument, as a user starts it, and what it printed; once a session."""
    folder = shared_folder() / "default"
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # beside other tests, threads that wait for each other take minutes
    with FileLock(f"{folder}.lock"):
        if not (folder / "out").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            done = subprocess.run([CONSOLE_SCRIPT, "train"], cwd=folder, env=env, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            (folder / "err").write_text(done.stderr)
            (folder / "out").write_text(done.stdout)
    run = folder / "runs" / "cmpe_se_preact_resnet20-digits-seed0"
    return run, Done(0, (folder / "out").read_text(), (folder / "err").read_text())
