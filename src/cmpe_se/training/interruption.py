"""Ctrl-C and SIGTERM, as something that a loop asks for between two steps."""

import signal
import threading
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
    """While active, the first Ctrl-C (or SIGTERM) is only noted; the second one ends the process at once."""

    def __init__(self) -> None:
        self.requested = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python sets no handlers
            self._handlers = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def agreed(self, accelerator: Accelerator, *, now: bool) -> bool:
        """Whether to stop. Several processes stop at the same step: they ask each other, but only if ``now``."""
        if accelerator.num_processes == 1:
            return self.requested
        if not now:
            return False
        wishes = torch.tensor(float(self.requested), device=accelerator.device)
        return accelerator.reduce(wishes).item() > 0

    def _note(self, *_: object) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
