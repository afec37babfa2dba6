"""The first and the last moments of a command: Ctrl-C while packages are imported, and no place to write to."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

import cmpe_se_command
from cmpe_se.cli import _flush
from cmpe_se.errors import UserError
from cmpe_se_command import COMMANDS
from tests.training.processes import CONSOLE_SCRIPT, complaint_of, empty_folder

STARTS = {"console script": [str(CONSOLE_SCRIPT)], "python -m": ["-m", "cmpe_se"]}
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


@pytest.mark.parametrize(
    ("how", "command", "number"), [("console script", "train", "SIGINT"), ("python -m", "evaluate", "SIGTERM")]
)
def test_a_signal_during_imports_is_one_line(how, command, number):
    """``-X importtime`` says what has been imported, so that the signal comes in the middle."""
    begun = subprocess.Popen(
        [sys.executable, "-X", "importtime", *STARTS[how], command, "run"],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=empty_folder(), start_new_session=True,
    )  # fmt: skip
    for line in begun.stderr:
        if line.rpartition("|")[2].strip().startswith("torch"):
            break
    begun.send_signal(getattr(signal, number))
    said = [line for line in begun.stderr.read().splitlines() if not line.startswith("import time:")]
    assert said == ["cmpe-se: stopped"]
    assert begun.wait(60) == 130


EARLY, LATE = ("torch._C", "torch.nn"), ("timm.layers.activations",)  # all of PyTorch comes between
OTHERS = [("console script", command, EARLY) for command in COMMANDS if command != "train"]
TRAIN = [("console script", "train", EARLY + LATE), ("python -m", "train", EARLY)]


@pytest.mark.slow
@pytest.mark.parametrize(("how", "command", "moments"), TRAIN + OTHERS)
def test_each_signal_at_each_moment_of_the_imports_is_one_line(how, command, moments, tmp_path):
    """The process forks at each moment, as tests/stopping says: one start for all of them."""
    report = tmp_path / "report"
    stopping = {"STOP_DURING": " ".join(moments), "STOP_SIGNALS": " ".join(SIGNALS), "STOP_REPORT": str(report)}
    path = os.pathsep.join(filter(None, [str(Path(__file__).with_name("stopping")), os.environ.get("PYTHONPATH")]))
    subprocess.run(
        [sys.executable, *STARTS[how], command, "run"],
        env=os.environ | stopping | {"PYTHONPATH": path}, cwd=empty_folder(), start_new_session=True, timeout=400,
        check=True, capture_output=True,
    )  # fmt: skip
    stopped = [
        f"{moment} {number} 130 {b'cmpe-se: stopped' + bytes([10])!r}" for moment in moments for number in SIGNALS
    ]
    assert report.read_text().splitlines() == stopped


def test_a_caller_keeps_its_handlers():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert cmpe_se_command.main(["--version"]) == 0
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


def test_ctrl_c_in_a_command_is_one_line(monkeypatch):
    def models(**_):
        """Stop."""
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("cmpe_se.commands.models.models", models)
    assert complaint_of("models") == "cmpe-se: stopped"


def test_no_folder_for_temporary_files(monkeypatch):
    def none():
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    assert complaint_of("models") == (
        "cmpe-se: error: No usable temporary directory found in ['/tmp']; set TMPDIR to a folder that can be written"
    )


@pytest.mark.slow
def test_a_full_standard_output():
    command = [CONSOLE_SCRIPT, "compare", "--plan", "--effect=0.3", "--sd=0.4"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    (said,) = done.stderr.splitlines()
    assert said.startswith("cmpe-se: error: ")
    assert said.endswith("No space left on device")
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("error", "raised", "said"),
    [
        (OSError(28, "No space left on device"), UserError, "cannot write to the standard output: No space left on"),
        (BrokenPipeError(32, "Broken pipe"), BrokenPipeError, "Broken pipe"),  # a reader that has read enough
    ],
)
def test_what_waits_in_the_buffer_fails_with_a_sentence(error, raised, said, monkeypatch):
    def flush():
        raise error

    monkeypatch.setattr("sys.stdout", SimpleNamespace(flush=flush, fileno=lambda: -1))
    with pytest.raises(raised, match=said):
        _flush()
