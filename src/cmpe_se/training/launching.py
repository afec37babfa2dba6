"""Several processes on a machine without accelerators.

``accelerate launch --num_processes 2`` starts two processes where there are GPUs. On a CPU it starts one, unless MPI is
set up, and says nothing. The one that it starts finds that out here, and starts all of them, joined by gloo.
"""

import os
from collections.abc import Sequence

import psutil
import torch


def missing_processes() -> int | None:
    """How many processes the launcher was asked for, where this one was started alone; None where all is well."""
    asked_for_several = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ
    if not asked_for_several or "RANK" in os.environ or _under_mpi() or torch.accelerator.is_available():
        return None
    try:
        words = iter(psutil.Process().parent().cmdline())
    except (psutil.Error, AttributeError):
        return None
    for word in words:
        name, _, value = word.replace("-", "_").partition("=")
        if name == "__num_processes":
            number = value or next(words, "")
            return int(number) if number.isdigit() and int(number) > 1 else None
    return None


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run this command in that many processes on this machine; returns the exit status."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    # Each launch finds a free port by itself, so that two of them do not meet.
    command = ["--standalone", "--nproc_per_node", str(processes), "-m", "cmpe_se", *arguments]
    try:
        torchrun(command)
    except ChildFailedError as error:  # the process that failed has said why
        return max(1, *(failure.exitcode for failure in error.failures.values()))  # negative: ended by a signal
    except (SignalException, KeyboardInterrupt):  # passed on to the processes, the main one of which has said so
        return 130
    return 0


def is_main_process() -> bool:
    """Whether this process is the one that speaks for all of them."""
    return os.environ.get("RANK", "0") == "0"


def failed_elsewhere(error: RuntimeError) -> bool:
    """Whether this is only the echo, in another process, of the main one's failure."""
    return not is_main_process() and "onnection closed by peer" in str(error)


def _under_mpi() -> bool:
    return any(name in os.environ for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"))
