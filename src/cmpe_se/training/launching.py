"""A run of several processes, which ``torchrun`` or ``accelerate launch`` has started."""

import os
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed

from cmpe_se.data.workers import lost_worker

_PATIENCE = timedelta(seconds=5)
_start: int | None = None


def processes_left_out() -> str | None:
    """What to say where ``accelerate launch`` was asked for several processes and started this one alone; else None.

    It does so on a machine without accelerators, unless MPI is set up. In the environment it leaves the port at which
    several processes would meet, but not their number.
    """
    asked_for_several = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ
    if not asked_for_several or "RANK" in os.environ or _under_mpi() or torch.accelerator.is_available():
        return None
    return (
        "accelerate launch starts one process on a machine without accelerators, and so this is a run of one; "
        "for two: torchrun --nproc-per-node 2 -m cmpe_se train"
    )


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def is_one_of_several() -> bool:
    """Whether the run has other processes, which a launcher has started here or on other machines."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


_LOST_PROCESS = "another process of this run has ended without a word, perhaps for want of memory"


def may_speak() -> bool:
    """Whether this process is the one to say why the run has ended: of several, the first that asks.

    They ask the store at which they met. Where it is gone, its process has ended, and has spoken.
    """
    if not is_one_of_several():
        return True
    try:
        store = _store()
        if store is None:
            return is_main_process()
        # Of torchrun's own count each machine has another: a machine whose processes were well counts no restart.
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0) if _start is None else f"start-{_start}"
        return store.add(f"cmpe_se/ended/{start}", 1) == 1
    except (RuntimeError, ValueError):  # of the store: PyTorch's DistError is a RuntimeError
        return False


def note_start(number: int) -> None:
    """Keep which start of the job this is, for :func:`may_speak`."""
    global _start
    _start = number


def is_started_again() -> bool:
    """Whether torchrun starts all processes again if this run fails now."""
    count = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    return count < int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))


def remember(name: str, value: str) -> None:
    """Keep a word for the next starts of the same job, where torchrun has a store that outlives its processes."""
    with suppress(RuntimeError, ValueError):
        if (store := agent_store()) is not None:
            store.set(f"cmpe_se/{name}", value)


def remembered(name: str) -> str | None:
    """What an earlier start of the same job has kept under a name; None for a first start, or without a store."""
    with suppress(RuntimeError, ValueError):
        store = agent_store()
        if store is not None and store.check([f"cmpe_se/{name}"]):
            return store.get(f"cmpe_se/{name}").decode()
    return None


def lost(error: Exception) -> str | None:
    """What to say where a process that decodes images, or another one of the run, has ended; None of other errors."""
    return lost_worker(error) or (_LOST_PROCESS if lost_process(error) else None)


def lost_process(error: Exception) -> bool:
    """Whether this is what a process sees of another one's end, through the connection between them."""
    if not torch.distributed.is_available() or not is_one_of_several():
        return False
    words = ("gloo", "onnection closed by peer", "onnection reset by peer", "roken pipe")
    return isinstance(error, torch.distributed.DistError) or any(word in str(error) for word in words)


def agent_store() -> torch.distributed.Store | None:
    """The store of torchrun, which is there before the processes meet and after they have ended; None without."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or not {"MASTER_ADDR", "MASTER_PORT"} <= {*os.environ}:
        return None  # the variables of a process that started this one are not all of them
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return torch.distributed.TCPStore(address, port, is_master=False, timeout=_PATIENCE, wait_for_workers=False)


def _store() -> torch.distributed.Store | None:
    if (store := agent_store()) is not None:
        return store
    if torch.distributed.is_initialized():
        return torch.distributed.distributed_c10d._get_default_store()
    return None


def _under_mpi() -> bool:
    return any(name in os.environ for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"))
