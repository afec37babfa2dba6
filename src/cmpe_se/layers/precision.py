"""Autocast where it must not round, and CPUs on which bfloat16 is no faster."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # of x86 and, the last one, of Arm
_CPUINFO = Path("/proc/cpuinfo")


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for a type of device; some, such as meta, do not have it."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> AbstractContextManager:
    """Context in which autocast rounds nothing; empty where it is off already."""
    return torch.autocast(device_type, enabled=False) if autocasts(device_type) else nullcontext()


def has_bfloat16(cpuinfo: Path = _CPUINFO) -> bool | None:
    """Whether this CPU computes in bfloat16 by instructions of its own; None where that cannot be found out.

    Args:
        cpuinfo: file in which Linux says so. PyTorch's own answer is private, and differs between versions.
    """
    flags = cpu_flags(cpuinfo)
    return None if flags is None else not _BFLOAT16_FLAGS.isdisjoint(flags)


def cpu_flags(cpuinfo: Path = _CPUINFO) -> set[str] | None:
    """What this CPU can do, in the words of Linux, such as ``avx2``; None where that cannot be found out."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:  # another system
        return None
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), None)
    return None if flags is None else {*flags.partition(":")[2].split()}


def emulation_warning(precision: str, device_type: str) -> str | None:
    """A sentence for users who ask for bfloat16 on a CPU that emulates it; None for all others.

    Args:
        precision: float32, bfloat16 or float16.
        device_type: such as cpu or cuda.
    """
    if precision != "bfloat16" or device_type != "cpu" or has_bfloat16() is not False:
        return None
    return (
        "this CPU has no bfloat16 instructions and emulates them: where we measured it, training was 14 times slower "
        "than in float32 (50 instead of 700 images/s), and times here say nothing about CPUs that have "
        "them; take float32"
    )
