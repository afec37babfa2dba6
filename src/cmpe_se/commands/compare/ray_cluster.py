"""A Ray cluster as the place where the runs of a comparison are trained."""

import logging
import os
import socket
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from cmpe_se import __version__
from cmpe_se.commands.compare.cells import STOPPED, Job, run_job
from cmpe_se.commands.compare.places import usable_cores
from cmpe_se.errors import UserError
from cmpe_se.training.provenance import REPORTED_PACKAGES
from cmpe_se.utils.files import os_errors_as
from cmpe_se.utils.packages import require
from cmpe_se.utils.progress import with_progress
from cmpe_se.utils.signals import kept_handlers
from cmpe_se.utils.text import counted, in_one_line

_RETRIES = 10  # of a run whose worker or machine was lost; each goes on from the last checkpoint
_ANSWER = 600.0  # seconds that a machine may take to start a process and import this package, which a busy one needs
_LOST_LOCK = 100.0  # seconds after which a file server has given up the locks of a machine that is gone (NFS: 90)
_OBJECTS = 100 * 2**20  # bytes for what tasks give back, which is a line of text each; Ray takes 30 % of the memory
# What a run needs to be the same on every machine, and what a cluster that was started earlier does not know.
_HANDED_ON = ("CMPE_SE_IMPORT", "PYTHONPATH")


class Needs(NamedTuple):
    """What a run takes of a machine. It has as many threads as ``cpus``; half a GPU is one for two runs."""

    cpus: int
    gpus: float

    def fit(self, resources: dict[str, float]) -> bool:
        """Whether a machine with these resources can train a run."""
        return resources.get("CPU", 0) >= self.cpus and resources.get("GPU", 0) >= self.gpus

    def __str__(self) -> str:
        return counted(self.cpus, "CPU") + (f" and {self.gpus:g} GPU" if self.gpus else "")


class OnRay(NamedTuple):
    """What a user says of the cluster: its address, or True for one that is found or started here; a run's share."""

    address: str | bool
    cpus: int | None
    gpus: float | None

    @classmethod
    def of(cls, ray: str | bool | None, ray_cpus: int | None, ray_gpus: float | None) -> "OnRay | None":
        """From the flags; None without ``--ray``.

        Raises:
            UserError: shares without a cluster, or such as no machine can give.
        """
        shares = {"ray_cpus": ray_cpus, "ray_gpus": ray_gpus}
        if not ray:
            if given := [name for name, share in shares.items() if share is not None]:
                raise UserError(f"{given[0]} is for runs on a Ray cluster; add --ray, or leave it out")
            return None
        if ray_cpus is not None and ray_cpus < 1:
            raise UserError(f"ray_cpus is {ray_cpus}, should be at least 1")
        if ray_gpus is not None and not (0 <= ray_gpus <= 1 or (float(ray_gpus).is_integer() and ray_gpus > 1)):
            raise UserError(f"ray_gpus is {ray_gpus}, should be a part of one GPU, such as 0.5, or a whole number")
        return cls(ray, ray_cpus, ray_gpus)


class RayCluster:
    """A Ray cluster whose machines see the comparison's folder and have this package.

    A run whose worker or machine is lost is given to another one, and goes on from its last checkpoint.

    Args:
        on: the cluster ("auto" is the one of this machine, "local" starts one for this command, True takes the first if
            there is one, else the second), and a run's share: one core, and one GPU or, with ``cpu`` or without any in
            the cluster, none, if left out.
        jobs: most runs at a time; as many as the cluster has room for if left out.
        runs: that there are.
        cpu: whether to ask for no GPU.
        folder: of the comparison, in which all machines have to find what this one writes there.
        read: paths of what each machine has to have.
        console: for the progress.

    Raises:
        UserError: no cluster, none of its machines has room for a run, or one of them lacks something.
    """

    def __init__(
        self,
        on: OnRay,
        jobs: int | None,
        runs: int,
        *,
        cpu: bool,
        folder: Path,
        read: Sequence[str],
        console: Console,
    ):
        # Before the import, which reads them: nothing is reported to Ray's authors, and no warning about hidden GPUs.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        require(("ray",), "--ray", extra="ray")
        import ray

        self._ray = ray
        self._stopping, self._starting = threading.Event(), threading.Lock()
        self._references: set = set()
        with kept_handlers():  # Ray sets its own, by which SIGTERM would end this process without a word
            _connect(ray, on.address)
        try:
            self._resources = ray.cluster_resources()
            gpus = float(self._resources.get("GPU", 0) >= 1 and not cpu) if on.gpus is None else on.gpus
            self.needs = Needs(on.cpus or 1, gpus)
            machines = _machines_with_room(ray, self.needs)
            self._machines = len(machines)
            _check_machines(ray, machines, folder.absolute(), read, console)
        except BaseException:
            ray.shutdown()
            raise
        self._task = ray.remote(_run_on_ray).options(
            max_retries=_RETRIES, num_cpus=self.needs.cpus, num_gpus=self.needs.gpus
        )
        self._pool = ThreadPoolExecutor(min(jobs or runs, runs) or 1)

    def describe(self) -> str:
        """What the cluster has, and what a run takes of it."""
        has = " and ".join(counted(int(self._resources.get(kind, 0)), kind) for kind in ("CPU", "GPU"))
        return f"a Ray cluster with {has}, {counted(self._machines, 'machine')} for runs that take {self.needs} each"

    def submit(self, job: Job) -> Future:
        """Begin a run when its turn comes."""
        return self._pool.submit(self._run, job)

    def _run(self, job: Job) -> str | None:
        environment = {name: os.environ[name] for name in _HANDED_ON if name in os.environ}
        environment["OMP_NUM_THREADS"] = str(self.needs.cpus)
        if not self.needs.gpus:  # else all runs of a machine would take its first GPU
            environment["CUDA_VISIBLE_DEVICES"] = ""
        with self._starting:
            if self._stopping.is_set():
                return STOPPED
            reference = self._task.remote(tuple(job), environment)
            self._references.add(reference)
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.TaskCancelledError:
            return STOPPED
        except self._ray.exceptions.RayTaskError as error:  # the code of the run's starter
            return _reason(error)
        except self._ray.exceptions.RayError as error:
            if self._stopping.is_set():
                return STOPPED
            return f"lost {_RETRIES + 1} times, at last by {type(error).__name__}: {_reason(error)}"
        finally:
            with self._starting:
                self._references.discard(reference)

    def stop(self) -> None:
        """Let runs save and end, and begin no more."""
        self._stopping.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        with self._starting:
            for reference in self._references:
                self._ray.cancel(reference)

    def close(self) -> None:
        """Wait for the current runs, and leave the cluster."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._ray.shutdown()


def _run_on_ray(job: Sequence, environment: dict[str, str]) -> str | None:
    """A run on a machine of the cluster; Ray cancels it by a KeyboardInterrupt, and the process is told to save."""
    return run_job(Job(*job), environment, lambda: False, patience=_LOST_LOCK)


def _connect(ray: Any, address: str | bool) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    own = {"num_cpus": usable_cores(), "object_store_memory": _OBJECTS, "include_dashboard": False}
    if isinstance(address, str):
        _check_reachable(address)
    try:
        if isinstance(address, str):
            ray.init(address=address, **quiet, **(own if address == "local" else {}))
            return
        try:
            ray.init(address="auto", **quiet)
        except ConnectionError:
            ray.init(address="local", **quiet, **own)
    except Exception as error:  # Ray raises this very class where its processes do not start in time
        ray.shutdown()
        where = f"no Ray cluster at '{address}'" if isinstance(address, str) else "Ray does not start here"
        reason = in_one_line(error, most=200)
        raise UserError(f"{where}: {reason}; start one with `ray start --head`") from None


def _check_reachable(address: str) -> None:
    """Ray itself tries for minutes to reach a machine that does not answer."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (colon and port.isdigit()):
        return  # auto, local
    with os_errors_as(f"no Ray cluster at '{address}'", advice="start one with `ray start --head`"):
        socket.create_connection((host, int(port)), timeout=5).close()


def _machines_with_room(ray: Any, needs: Needs) -> dict[str, str]:
    """The identifier and the name of each machine that a run fits on."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    found = {
        node["NodeID"]: f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
        for node in alive
        if needs.fit(node["Resources"])
    }
    if not found:
        most = [int(max((node["Resources"].get(kind, 0) for node in alive), default=0)) for kind in ("CPU", "GPU")]
        raise UserError(
            f"no machine of the Ray cluster has {needs} for a run: the largest numbers are {counted(most[0], 'CPU')} "
            f"and {counted(most[1], 'GPU')}; give smaller --ray-cpus and --ray-gpus, or add a machine"
        )
    return found


def _check_machines(ray: Any, machines: dict[str, str], folder: Path, read: Sequence[str], console: Console) -> None:
    """Ask each machine whether it finds what a run needs.

    Raises:
        UserError: the first that does not, and what.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = ray.remote(look_around)
    with os_errors_as(f"cannot write to {folder}"):
        token = tempfile.NamedTemporaryFile(dir=folder, prefix=".seen-by-all-")  # noqa: SIM115  # closed below
    with token:
        asked = {
            ask.options(
                num_cpus=0, max_retries=1, scheduling_strategy=NodeAffinitySchedulingStrategy(identifier, soft=False)
            ).remote(token.name, list(read), _versions()): name
            for identifier, name in machines.items()
        }
        for reference, name in with_progress(list(asked.items()), "asking the cluster's machines", console=console):
            try:
                complaint = ray.get(reference, timeout=_ANSWER)
            except ray.exceptions.GetTimeoutError:
                complaint = f"has not answered in {_ANSWER:.0f} s; see `ray status`"
            except ray.exceptions.RayError as error:
                complaint = f"cannot run cmpe-se: {_reason(error)}; install the same environment there"
            if complaint is None:
                continue
            raise UserError(f"the cluster's machine {name} {complaint}")


def look_around(token: str, read: Sequence[str], versions: Mapping[str, str]) -> str | None:
    """What the machine that this runs on lacks, as the end of a sentence; None if nothing.

    Args:
        token: path of a file in the comparison's folder.
        read: paths of files and folders that the runs read.
        versions: of packages on the machine that asks, by name.
    """
    folder = Path(token).parent
    if not Path(token).is_file():
        return f"does not see what this one writes to {folder}; give an --output on a file system that all share"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"may not write to {folder}; let its user do so, or name another --output"
    if missing := [path for path in read if not Path(path).exists()]:
        return f"has no {missing[0]}; put it there too, or name a path that all machines see"
    for package, own in _versions().items():
        if own != versions[package]:
            return f"has {package} {own}, and this one {versions[package]}; install the same versions on all"
    return None


def _versions() -> dict[str, str]:
    return {"cmpe_se": __version__} | {package: version(package) for package in REPORTED_PACKAGES}


def _reason(error: Exception) -> str:
    """The last line of what Ray says, which has the worker's trace before it."""
    return ([line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1][-300:]
