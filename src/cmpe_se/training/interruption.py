"""Ctrl-C, SIGTERM and a closed terminal, as something that a loop asks for between two steps."""

from contextlib import ExitStack
from pathlib import Path
from types import FrameType

import torch
from accelerate import Accelerator

from cmpe_se.utils.signals import Repeats, handled


class Interrupted(Exception):
    """A command ended early on request, with everything saved; its text says how to resume."""


class TrainingInterrupted(Interrupted):
    """A run ended early on request, after writing a checkpoint.

    Args:
        run: its folder.
        step: finished steps.
    """

    def __init__(self, run: Path, step: int):
        self.run, self.step = run, step
        super().__init__(f"stopped and saved after step {step}; resume with: cmpe-se train --resume {run}")


class Interruption:
    """While active, a stop signal is only noted; a second Ctrl-C, later than a second, raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.requested = False
        self._repeats, self._handlers = Repeats(), ExitStack()

    def __enter__(self) -> "Interruption":
        self._handlers.enter_context(handled(self._note))
        return self

    def __exit__(self, *_: object) -> None:
        self._handlers.close()

    def agreed(self, accelerator: Accelerator, *, now: bool) -> bool:
        """Whether to stop. Several processes stop at the same step: they ask each other, but only if ``now``."""
        if accelerator.num_processes == 1:
            return self.requested
        if not now:
            return False
        wishes = torch.tensor(float(self.requested), device=accelerator.device)
        return accelerator.reduce(wishes).item() > 0

    def _note(self, number: int, _: FrameType | None) -> None:
        self.requested = True
        if self._repeats.insists(number):
            raise KeyboardInterrupt
