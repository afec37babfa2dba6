"""Rows from processes of their own, so that no network can end the census: not by a crash, nor by time or memory."""

import math
import multiprocessing
import resource
import signal
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from benchmarks.census_parts.checks import COLUMNS, Limits, row_of
from benchmarks.census_parts.networks import Network

CHUNK = 40
"""Networks that a process takes; what one of them leaves in memory ends with it."""
PATIENCE = 10
"""Seconds by the clock for one of processor time, on a machine that others use too."""


def rows_of(networks: Sequence[Network], limits: Limits, seconds: float, gigabytes: float) -> Iterator[dict[str, Any]]:
    """The row of each network, in order.

    Args:
        networks: to take.
        limits: up to which each is run with numbers.
        seconds: of processor time that one network may take, or ``PATIENCE`` times as many by the clock.
        gigabytes: of memory that a process may have beside what it starts with.
    """
    context = multiprocessing.get_context("fork")  # the libraries are imported once
    waiting = list(networks)
    while waiting:
        receiver, sender = context.Pipe(duplex=False)
        chunk = waiting[:CHUNK]
        process = context.Process(target=_take, args=(chunk, limits, seconds, gigabytes, sender), daemon=True)
        process.start()
        sender.close()
        for network in chunk:
            fault = None
            try:
                if receiver.poll(PATIENCE * seconds):
                    row = receiver.recv()
                else:
                    fault = f"no row after {PATIENCE * seconds:g} s"
            except EOFError:
                process.join()
                fault = f"its process ended with {_how(process.exitcode)}"
            if fault:
                process.kill()
                row = dict.fromkeys(COLUMNS, "")
                row |= {"library": network.library, "network": network.name, "family": network.family, "fault": fault}
            del waiting[0]
            yield row
            if fault:
                break
        process.join()
        receiver.close()


def _take(chunk: list[Network], limits: Limits, seconds: float, gigabytes: float, sender: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    torch.set_num_threads(1)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + int(gigabytes * 2**30), hard))
    for network in chunk:
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = math.ceil(used.ru_utime + used.ru_stime + seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        sender.send(row_of(network, limits))


def _address_space() -> int:
    """Bytes that this process has of it; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


def _how(status: int | None) -> str:
    if status is not None and status < 0:
        name = signal.Signals(-status).name
        return f"signal {name}" + (": too much processor time" if name == "SIGXCPU" else "")
    return f"status {status}"
