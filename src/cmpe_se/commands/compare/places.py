"""Where the runs of a comparison are trained: the devices of this machine, or a Ray cluster."""

import logging
import os
import queue
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

from cmpe_se.commands.compare.cells import Job, run_job
from cmpe_se.errors import UserError
from cmpe_se.utils.files import os_errors_as
from cmpe_se.utils.packages import require
from cmpe_se.utils.text import counted, in_one_line


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
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
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


class RayCluster:
    """A Ray cluster whose machines see the comparison's folder and have this package.

    Args:
        address: of the cluster ("auto" finds the one of this machine, "local" starts one for this command).
        jobs: most runs at a time; as many as the cluster has room for if left out.
        cpu: whether to ask for no GPU.
    """

    def __init__(self, address: str, jobs: int | None, *, cpu: bool):
        require(("ray",), "--ray", extra="ray")
        import ray

        self._ray = ray
        _check_reachable(address)
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = in_one_line(error, most=200)
            raise UserError(f"no Ray cluster at '{address}': {reason}; start one with `ray start --head`") from None
        resources = ray.cluster_resources()
        gpu = resources.get("GPU", 0) >= 1 and not cpu
        self._cpus = 1.0 if jobs is None or gpu else max(1.0, resources.get("CPU", 1) // jobs)
        needs = {"num_cpus": 1, "num_gpus": 1} if gpu else {"num_cpus": self._cpus}
        self._needs, self._resources = needs, resources
        self._task = ray.remote(_run_on_ray).options(max_retries=0, **needs)
        self._references: list = []

    def describe(self) -> str:
        """What the cluster has, and what a run takes of it."""
        has = ", ".join(f"{self._resources.get(kind, 0):g} {kind}(s)" for kind in ("CPU", "GPU"))
        return f"a Ray cluster with {has}; a run takes {', '.join(f'{v:g} {k[4:]}' for k, v in self._needs.items())}"

    def submit(self, job: Job) -> Future:
        """Begin a run when its turn comes."""
        reference = self._task.remote(tuple(job), int(self._cpus))
        self._references.append(reference)
        return reference.future()

    def stop(self) -> None:
        """Let runs save and end, and begin no more."""
        for reference in self._references:
            self._ray.cancel(reference)

    def close(self) -> None:
        """Leave the cluster."""
        self._ray.shutdown()


def _run_on_ray(job: Sequence, threads: int) -> str | None:
    """A run on a machine of the cluster; Ray cancels it by a KeyboardInterrupt, and the process is told to save."""
    return run_job(Job(*job), {"OMP_NUM_THREADS": str(threads)}, lambda: False)


def _check_reachable(address: str) -> None:
    """Ray itself tries for minutes to reach a machine that does not answer."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (colon and port.isdigit()):
        return  # auto, local
    with os_errors_as(f"no Ray cluster at '{address}'", advice="start one with `ray start --head`"):
        socket.create_connection((host, int(port)), timeout=5).close()


def _visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES would be for each GPU that this process may use."""
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named or [str(number) for number in range(torch.cuda.device_count())]
