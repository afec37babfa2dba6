"""Which of several processes says why a run has ended."""

import signal
from datetime import timedelta

import pytest
import torch.distributed

from cmpe_se import training
from cmpe_se.cli import main
from cmpe_se.errors import UserError
from cmpe_se.training import launching
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.launching import agent_store, lost_process, may_speak
from cmpe_se.training.parallel import create_accelerator


@pytest.fixture
def two_processes(monkeypatch):
    """The environment of one of two, which met at the store that torchrun keeps."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in {
        "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True,
        "TORCHELASTIC_RESTART_COUNT": 0, "RANK": 1,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    return store


def test_the_first_that_asks_speaks(two_processes, monkeypatch):
    assert may_speak()
    monkeypatch.setenv("RANK", "0")
    assert not may_speak()
    assert not may_speak()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # torchrun --max-restarts: a new life, a new reason
    assert may_speak()


@pytest.mark.parametrize(("rank", "speaks"), [(0, True), (1, False)])
def test_before_they_have_met_the_main_one_speaks(rank, speaks, two_processes, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    monkeypatch.setenv("RANK", str(rank))
    assert may_speak() is speaks


def test_a_store_that_is_gone_has_spoken(two_processes, monkeypatch):
    monkeypatch.setattr(launching, "_PATIENCE", timedelta(seconds=1))
    monkeypatch.setenv("MASTER_PORT", "9")
    assert not may_speak()


@pytest.mark.parametrize("flag", ["--resume=nowhere", "--recipe=nowhere.yaml"])
@pytest.mark.parametrize("rank", [0, 1])
def test_no_process_refuses_before_they_have_met(rank, flag, two_processes, monkeypatch):
    """A main process that ends alone leaves those of other machines to wait for it, for PyTorch's half an hour."""
    met = []
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(training, "train", lambda **given: met.append(given))
    monkeypatch.setattr("cmpe_se.commands.train.is_main_process", lambda: False)  # prints nothing of it
    assert main(["train", flag]) == 0
    (given,) = met
    assert "nowhere" in f"{given}"


def fails_and_is_stopped(**_):
    try:
        raise UserError("the other process has ended")
    finally:
        signal.raise_signal(signal.SIGTERM)


def test_a_launchers_signal_does_not_hide_the_reason(two_processes, monkeypatch, capsys):
    """torchrun stops the others as soon as it sees that one has ended, and they may be about to say so."""
    monkeypatch.setattr(training, "train", fails_and_is_stopped)
    assert main(["train"]) == 1
    assert "error: the other process has ended" in capsys.readouterr().err


def test_a_run_of_one_process_is_stopped_by_its_user(monkeypatch, capsys):
    monkeypatch.setattr(training, "train", fails_and_is_stopped)
    assert main(["train"]) == 130
    assert "cmpe-se: stopped" in capsys.readouterr().err


def test_one_process_speaks(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert may_speak()
    assert may_speak()


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"), True),
        (RuntimeError("Connection reset by peer [127.0.0.1]:1234"), True),
        (torch.distributed.DistBackendError("NCCL error: remote process exited or there was a network error"), True),
        (torch.distributed.DistNetworkError("failed to recv, got 0 bytes"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_the_end_of_another_process_is_recognised(error, lost, two_processes, monkeypatch):
    assert lost_process(error) is lost
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not lost_process(error)


def test_a_launchers_variables_without_a_place_to_meet(monkeypatch):
    """As a process of a comparison that torchrun has started would have them."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert agent_store() is None


def test_accumulation_that_accelerate_would_do_by_itself(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(UserError, match=r"asks for 4 gradient-accumulation steps.* give --accumulate 4, and 1 there"):
        create_accelerator(TrainingConfig(), cpu=True, processes=1)
