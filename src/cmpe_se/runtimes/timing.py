"""Timing contenders against each other: turns, medians and 95 % intervals."""

import ctypes
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

_CONFIDENCE = 0.95


class Ratio(NamedTuple):
    """Median of paired ratios, and its 95 % confidence interval."""

    median: float
    low: float
    high: float

    @property
    def resolved(self) -> bool:
        """Whether the interval leaves out 1, that is, whether a difference has been shown."""
        return not self.low <= 1 <= self.high

    def rounded(self) -> "Ratio":
        """As it is shown, to a tenth of a percent: an interval that is printed from 1.000 shows no difference."""
        return Ratio(*(round(value, 3) for value in self))


def take_turns(
    steps: dict[str, Callable[[], None]], turns: Iterable[int], device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each step in each turn; who begins changes from turn to turn.

    A machine that slows down slows all of them down, and the ratio within a turn stays.
    """
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in turns:
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            synchronize(device)
            started = time.perf_counter()
            steps[name]()
            synchronize(device)
            seconds[name].append(time.perf_counter() - started)
    return seconds


def paired_ratio(own: list[float], others: list[float]) -> Ratio:
    """Median of the ratios within each turn, with the interval that order statistics give, whatever the distribution.

    Fewer than six turns have no such interval; theirs is from the smallest to the largest ratio.
    """
    from scipy.stats import quantile_test  # here: a second's import, for those who measure

    ratios = [a / b for a, b in zip(own, others, strict=True)]
    interval = quantile_test(ratios).confidence_interval(_CONFIDENCE)  # of the median; NaN where there is none
    low = min(ratios) if math.isnan(interval.low) else float(interval.low)
    high = max(ratios) if math.isnan(interval.high) else float(interval.high)
    return Ratio(statistics.median(ratios), low, high)


def percentile(seconds: list[float], percent: float) -> float:
    """The smallest of some times that at least this percentage of them do not exceed (0 to 100)."""
    return sorted(seconds)[max(math.ceil(len(seconds) * percent / 100), 1) - 1]


def peak_memory(step: Callable[[], None], device: torch.device) -> int | None:
    """Bytes that a step has allocated at its fullest moment, beyond what was there before; None where nothing counts.

    CUDA and the CPU count.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler's own remarks
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def synchronize(device: torch.device) -> None:
    """Wait for what the device still has to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def keep_heap() -> bool:
    """Let glibc keep freed memory, for all contenders alike; returns whether it could.

    By default it gives large blocks back to the system, and fresh pages for the next ones cost more than what is to be
    measured: up to a third of a network's time, depending on the order in which tensors are freed.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(option, 2**31 - 1) for option in (trim_threshold, mmap_threshold))
