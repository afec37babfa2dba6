"""A run of several processes, which ``torchrun`` or ``accelerate launch`` has started."""

import os

import torch


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


def failed_elsewhere(error: RuntimeError) -> bool:
    """Whether this is only the echo, in another process, of the main one's failure."""
    return not is_main_process() and "onnection closed by peer" in str(error)


def _under_mpi() -> bool:
    return any(name in os.environ for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"))
