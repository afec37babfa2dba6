"""Runs that are asked to stop, with the processes that decode their images, and those that lose one of them."""

import multiprocessing
import os
import signal
import sys
import time

import pytest
import torch

from cmpe_se.data import Augmentation, load_data
from cmpe_se.data import workers as workers_module
from cmpe_se.data.workers import batches_on, lost_worker
from cmpe_se.training.interruption import Interruption
from cmpe_se.training.progress import TrainingProgress
from cmpe_se.utils import signals
from cmpe_se.utils.signals import handled, raised
from tests.tiers import slow_but
from tests.training.processes import start
from tests.training.runs import place

LARGE = ["--data=folder", "--image-size=112", "--model=test_resnet", "--batch-size=8", "--epochs=50", "--workers=2"]


@pytest.mark.parametrize(
    "number", slow_but([signal.SIGTERM, signal.SIGINT, signal.SIGHUP], [signal.SIGTERM]), ids=lambda number: number.name
)
def test_a_signal_to_all_processes_saves_and_stops(number, digit_folder, tmp_path):
    """As timeout, schedulers, container stops, terminals and closed terminals send it: also to the data workers."""
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("the tests run under nohup, and what they start ignores SIGHUP too")
    run = tmp_path / "run"
    running = start("train", *LARGE, "--data-dir", digit_folder, "--output", run, "--checkpoint-steps=2")
    running.until(lambda: place(run) >= (0, 2))
    done = running.send(number, group=True)
    assert done.status == 130
    assert "cmpe-se: stopped and saved after step" in done.complaint
    assert place(run) > (0, 0)
    assert not list((run / "state").glob("*.partial"))


@pytest.mark.slow
def test_a_killed_worker_is_a_sentence(digit_folder, tmp_path):
    run = tmp_path / "run"
    running = start("train", *LARGE, "--data-dir", digit_folder, "--output", run, "--checkpoint-steps=2")
    running.until(lambda: place(run) >= (0, 2))
    import psutil

    workers = psutil.Process(running.process.pid).children()
    os.kill(workers[0].pid, signal.SIGKILL)
    complaint = running.wait().complaint
    assert "was ended by a signal (Killed), perhaps for want of memory; give fewer --workers" in complaint
    assert complaint.endswith(f"resume with: cmpe-se train --resume {run}")


@pytest.fixture
def photos(digit_folder):
    return load_data("folder", digit_folder, image_size=112, workers=2)


def batches(data, count=3):
    settings = {"batch_size": 8, "seed": 0, "start": 0, "rank": 0, "world": 1, "device": torch.device("cpu")}
    stream = data.train_batches(0, augmentation=Augmentation(), **settings)
    return [images for images, _ in zip((images for images, _ in stream), range(count), strict=False)]


def begun(data):
    """A stream of batches that has begun, and its workers: another test's may not have ended yet."""
    settings = {"batch_size": 8, "seed": 0, "start": 0, "rank": 0, "world": 1, "device": torch.device("cpu")}
    others = set(multiprocessing.active_children())
    stream = data.train_batches(0, augmentation=Augmentation(), **settings)
    next(stream)
    return stream, [worker for worker in multiprocessing.active_children() if worker not in others]


def test_workers_ignore_what_is_for_their_parent(photos):
    stream, workers = begun(photos)
    assert workers
    for worker in workers:
        for number in signals.STOP_SIGNALS:
            os.kill(worker.pid, number)
    assert len(list(stream)) == 19
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


def test_a_killed_worker_is_recognised_wherever_it_surfaces(photos):
    stream, workers = begun(photos)
    with pytest.raises(RuntimeError) as caught:  # noqa: PT012  # the signal's handler raises in any line
        os.kill(workers[0].pid, signal.SIGKILL)
        list(stream)
    assert "was ended by a signal (Killed)" in lost_worker(caught.value)


def broken_loader(error: Exception, workers: list):
    """A loader whose batches cannot be fetched."""

    class Batches:
        _workers = workers

        def __next__(self):
            raise error

    class Loader:
        num_workers = 0

        def __iter__(self):
            return Batches()

    return Loader()


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated. "), "ended by a signal (Terminated)"),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "has ended by itself"),
        (
            caused(
                RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
                RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            ),
            "ended by a signal (Killed)",
        ),
        (
            RuntimeError(
                "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers "
                "are out of shared memory. Please try to raise your shared memory limit."
            ),
            "no room in shared memory",
        ),
        (
            RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nunable to allocate shared memory(shm)"),
            "no room in shared memory",
        ),
        (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nsizes do not match"), None),
        (ValueError("DataLoader worker (pid 7) is killed by signal: Killed. "), None),
    ],
)
def test_what_is_said_of_lost_workers(error, said):
    assert lost_worker(error) is said is None or said in lost_worker(error)


@pytest.mark.parametrize(
    "error", [ConnectionResetError(104, "Connection reset by peer"), EOFError(), FileNotFoundError(2, "")]
)
def test_a_connection_that_breaks_first_is_a_lost_worker(error):
    """Which of the two this process sees first is chance."""
    worker = multiprocessing.Process(target=time.sleep, args=(60,))
    worker.start()
    worker.kill()
    with pytest.raises(RuntimeError) as caught:
        next(batches_on(torch.device("cpu"), broken_loader(error, [worker])))
    assert "was ended by a signal (Killed)" in lost_worker(caught.value)


def test_what_a_worker_raises_is_no_lost_worker():
    error = FileNotFoundError("Caught FileNotFoundError in DataLoader worker process 0.\nno such file")
    worker = multiprocessing.Process(target=sys.exit, args=(3,))
    worker.start()
    worker.join()
    with pytest.raises(FileNotFoundError):
        next(batches_on(torch.device("cpu"), broken_loader(error, [worker])))


def test_without_shared_memory_one_process_decodes(photos, monkeypatch, caplog):
    with_workers = batches(photos)

    def cannot():
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(workers_module.multiprocessing, "Event", cannot)
    workers_module._warn_once.cache_clear()
    alone = batches(photos) + batches(photos)
    assert all(torch.equal(a, b) for a, b in zip(with_workers * 2, alone, strict=True))
    assert [record.message for record in caplog.records] == [
        "no processes can be started to decode images ([Errno 30] Read-only file system): this one decodes them, "
        "more slowly"
    ]


def send(number) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0)  # where Python calls the handler


@pytest.mark.parametrize("number", signals.STOP_SIGNALS)
def test_a_signal_is_noted_and_its_repetition_does_no_harm(number):
    with Interruption() as interruption:
        assert not interruption.requested
        for _ in range(3):  # a scheduler's to the group, a launcher's to its processes, and one more
            send(number)
        send(signal.SIGTERM)
        assert interruption.requested


def test_a_second_ctrl_c_does_not_wait(monkeypatch):
    monkeypatch.setattr(signals, "_REPEATED", 0)
    with pytest.raises(KeyboardInterrupt), Interruption() as interruption:  # noqa: PT012
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert interruption.requested
        send(signal.SIGINT)


@pytest.mark.parametrize("number", signals.STOP_SIGNALS)
def test_outside_training_a_signal_raises_once(number):
    before = signal.signal(number, signal.SIG_DFL)  # nohup ignores one of them
    try:
        cleaned = False
        with pytest.raises(KeyboardInterrupt), raised():  # noqa: PT012
            try:
                send(number)
            finally:
                send(number)  # does not interrupt what cleans up
                cleaned = True
        assert cleaned
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            send(signal.SIGHUP)
            assert not interruption.requested
        with handled(lambda *_: pytest.fail("not ignored")):
            send(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_progress_outlives_its_terminal(monkeypatch):
    class Closed:
        encoding = "utf-8"

        def write(self, _=""):
            raise OSError(5, "Input/output error")

        flush = write

        def isatty(self):
            return True

    monkeypatch.setattr("sys.stderr", Closed())
    with TrainingProgress(2, 20) as progress:
        progress.say("something")
        progress.update(1, 5, 0.5, 50.0, 100.0)
        progress.bar.refresh()
