"""Where the runs of a comparison are trained: the devices of this machine; ``ray_cluster.py`` has the other place."""

import os
import queue
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

from cmpe_se.commands.compare.cells import Job, run_job
from cmpe_se.utils.text import counted


class Place(Protocol):
    """Takes runs, and does several at a time."""

    def describe(self) -> str:
        """For people: how many runs at a time, on what."""

    def submit(self, job: Job) -> Future:
        """Begin a run when its turn comes; the future gives what :func:`run_job` returns."""

    def stop(self) -> None:
        """Let runs save and end, and begin no more."""

    def close(self) -> None:
        """Give everything back."""


class Machine:
    """This machine: a run on each GPU, or, without one, runs that share the cores.

    Args:
        jobs: runs at a time; as many as there are GPUs or, on a CPU, cores if left out, but no more than ``cells``.
        cells: runs that there are.
        cpu: whether to leave accelerators alone.
    """

    def __init__(self, jobs: int | None, cells: int, *, cpu: bool):
        gpus = _visible_gpus() if not cpu else []
        cores = usable_cores()
        self.jobs = max(1, min(jobs or len(gpus) or cores, cells))
        self.threads = max(1, cores // self.jobs)
        self.gpus = gpus
        self._environments: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        for number in range(self.jobs):
            environment = {"OMP_NUM_THREADS": str(self.threads)}
            self._environments.put(environment | ({"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {}))
        self._stopping = threading.Event()
        self._pool = ThreadPoolExecutor(self.jobs)

    def describe(self) -> str:
        """How many runs at a time, on what."""
        device = f"with {counted(self.threads, 'thread')} each"
        if self.gpus:
            device = f"on {counted(len(self.gpus), 'GPU')}"
        return f"{self.jobs} at a time, {device}"

    def submit(self, job: Job) -> Future:
        """Begin a run when its turn comes."""
        return self._pool.submit(self._run, job)

    def _run(self, job: Job) -> str | None:
        environment = self._environments.get()
        try:
            return run_job(job, environment, self._stopping.is_set)
        finally:
            self._environments.put(environment)

    def stop(self) -> None:
        """Let runs save and end, and begin no more."""
        self._stopping.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Wait for the current runs."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def usable_cores() -> int:
    """Cores of this machine that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES would be for each GPU that this process may use."""
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named or [str(number) for number in range(torch.cuda.device_count())]
