"""Several starts of one job at one store, as torchrun makes them after a process has been killed."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from cmpe_se.errors import UserError
from cmpe_se.training.meeting import agree_on_start
from cmpe_se.training.run_folder import RunFolder
from cmpe_se.training.starting import Job


@pytest.fixture
def store(monkeypatch) -> TCPStore:
    """The one that torchrun keeps."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    return server


def client(store: TCPStore) -> TCPStore:
    return TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)


def test_all_processes_of_a_start_have_its_number(store):
    """The main one is the last to come: what it finds of the start before is no answer to the others."""
    for start in (1, 2, 3):
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(agree_on_start, client(store), rank, 4) for rank in (2, 1, 3, 0)]
        assert [one.result() for one in asked] == [start] * 4


@pytest.mark.parametrize(("rank", "missing"), [(0, r"process\(es\) 1, 2"), (1, "the main process")])
def test_who_does_not_come_is_named(rank, missing, store):
    with pytest.raises(UserError, match=f"^{missing} of this run did not start in time"):
        agree_on_start(client(store), rank, 3, timedelta(seconds=0.2))


def test_a_start_finds_the_run_of_the_one_before_and_no_other(store, tmp_path, monkeypatch):
    """A second call with the same arguments makes a second run, and finds that one after a restart."""
    monkeypatch.setattr("cmpe_se.training.starting._calls", iter([1, 2, 1, 2, 1]))
    first, second = Job({"output": None}), Job({"output": None})
    assert first.begun() is None
    for job, name in ((first, "a"), (second, "b")):
        (tmp_path / name).mkdir()
        job.begin(RunFolder(tmp_path / name))
    assert Job({"output": None}).begun().path == tmp_path / "a"
    assert Job({"output": None}).begun().path == tmp_path / "b"
    assert Job({"output": "c"}).begun() is None


def test_a_run_that_was_begun_on_another_machine(store, tmp_path):
    job = Job({})
    (tmp_path / "run").mkdir()
    job.begin(RunFolder(tmp_path / "run"))
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(UserError, match=r"has begun its run in .*/run, which is not there any more"):
        job.begun()


def test_without_torchrun_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    job = Job({})
    job.begin(RunFolder(tmp_path))
    assert job.begun() is None
