"""A trace of a few training steps, by PyTorch's profiler."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from cmpe_se.errors import UserError
from cmpe_se.utils.files import replaced
from cmpe_se.utils.text import counted

_STEPS, _WARM_UP, _ROWS = 10, 5, 10


class StepProfiler:
    """Traces ten training steps after five others, or as many as a shorter run has.

    What comes between the steps is in the trace too: reading batches, and a test where an epoch ends among them.

    Args:
        path: of the trace, ``.json.gz``.
        steps: that are to come.
        device: that the network is on.
        say: prints a line.
    """

    def __init__(self, path: Path, steps: int, device: torch.device, say: Callable[[str], None]):
        self._path, self._device, self._say = path, device, say
        warm_up = min(_WARM_UP, max(steps - _STEPS, 1), steps - 1)
        self._left, self._traced = warm_up + min(_STEPS, steps - warm_up), 0
        self._warm_up = warm_up
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        elif device.type == "xpu":
            activities.append(ProfilerActivity.XPU)
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it prints lines of its own among ours
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a run of one step has no step to warm up with
            steps_of = schedule(wait=max(warm_up - 1, 0), warmup=min(warm_up, 1), active=self._left - warm_up, repeat=1)
        self._profile: Any = profile(activities=activities, schedule=steps_of, acc_events=True)
        self._profile.start()

    def step(self) -> None:
        """Count a step that is done; the last one writes the trace."""
        if self._profile is None:
            return
        if self._warm_up:
            self._warm_up -= 1
        else:
            self._traced += 1
        self._left -= 1
        if self._left:
            self._profile.step()
        else:
            self.stop()

    def stop(self) -> None:
        """Write what there is: the run ends before all steps are done."""
        if self._profile is None:
            return
        done, self._profile = self._profile, None
        done.stop()
        if not self._traced:
            self._say("profile: the run has ended before a step could be traced")
            return
        try:
            with replaced(self._path) as unfinished:
                done.export_chrome_trace(str(unfinished))
        except (UserError, RuntimeError) as error:  # as of a full disk: training goes on
            self._say(f"profile: no trace is written: {error}")
            return
        for line in _table(done, self._traced, on_device=self._device.type != "cpu"):
            self._say(line)
        self._say(f"profile: {self._path} has all of it; open it at https://ui.perfetto.dev or in chrome://tracing")


def _table(done: Any, steps: int, *, on_device: bool) -> list[str]:
    """The costliest operations, a line each."""
    where = "self_device_time_total" if on_device else "self_cpu_time_total"
    events = [event for event in done.key_averages() if not event.key.startswith("ProfilerStep")]
    total = sum(getattr(event, where) for event in events) or 1
    costliest = sorted(events, key=lambda event: getattr(event, where), reverse=True)[:_ROWS]
    place = "device" if on_device else "CPU"
    lines = [
        f"profile of {counted(steps, 'step')}: the costliest operations, by their own time on the {place}",
        f"{'ms a step':>12} {'share':>8} {'calls a step':>14}  operation",
    ]
    for event in costliest:
        time = getattr(event, where)
        lines.append(
            f"{time / 1000 / steps:>12.3f} {100 * time / total:>6.1f} % {event.count / steps:>14.1f}  {event.key[:90]}"
        )
    return lines
