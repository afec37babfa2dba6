"""Signals that ask a process to stop: Ctrl-C, SIGTERM, and SIGHUP of a terminal that was closed."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
PARENT = "CMPE_SE_PARENT"
"""Environment variable with the id of the process that starts a command, and without which it is not to go on."""
_LOOK = 1.0  # seconds between two looks at whether it is there
_REPEATED = 1.0  # seconds: a launcher hands on a signal that the whole process group had already

Handler = Callable[[int, FrameType | None], Any]


@contextmanager
def handled(handler: Handler) -> Iterator[None]:
    """While this lasts, ``handler`` gets the stop signals; not SIGHUP where the process was started with ``nohup``.

    Python sets handlers in the main thread alone; elsewhere nothing changes.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        if hasattr(signal, "SIGHUP") and before[signal.SIGHUP] is signal.SIG_IGN:
            del before[signal.SIGHUP]
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, was in before.items():
            signal.signal(number, was)


@contextmanager
def kept_handlers() -> Iterator[None]:
    """Take away the handlers of stop signals that the block, code of others, has set."""
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS if main}
    try:
        yield
    finally:
        for number, was in before.items():
            signal.signal(number, was)


class Repeats:
    """Tells a second wish to stop from the same one that came twice.

    Schedulers signal all processes of a job, and launchers hand the signal on to theirs: only a second Ctrl-C, a while
    after the first signal, is a person who will not wait. For a second SIGTERM there is SIGKILL.
    """

    def __init__(self) -> None:
        self._first: float | None = None

    def insists(self, number: int) -> bool:
        """Note a signal; whether it asks to stop at once."""
        now = time.monotonic()
        if self._first is None:
            self._first = now
            return False
        return number == signal.SIGINT and now - self._first > _REPEATED


@contextmanager
def raised() -> Iterator[None]:
    """While this lasts, the first stop signal raises KeyboardInterrupt, so that half-written files are removed.

    The same signal again does not interrupt the removal.
    """
    repeats, first = Repeats(), True

    def interrupt(number: int, _: FrameType | None) -> None:
        nonlocal first
        insists, was_first = repeats.insists(number), first
        first = False
        if was_first or insists:
            raise KeyboardInterrupt

    with handled(interrupt):
        yield


@contextmanager
def held() -> Iterator[None]:
    """While this lasts, stop signals wait: processes that are started here begin with them blocked."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_in_worker(_: int = 0) -> None:
    """``worker_init_fn`` of a DataLoader: its parent alone decides when to stop, and needs its workers until then.

    What was blocked by :func:`held` is discarded. Workers notice by themselves, in seconds, that the parent has ended.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def end_with_parent() -> None:
    """Where ``CMPE_SE_PARENT`` asks for it, send this process SIGTERM once its parent has ended.

    A parent that is killed cannot tell its children to save and stop. They would go on unseen, beside whatever takes
    their work up.
    """
    parent = os.environ.pop(PARENT, "")  # what this process starts has another parent
    if not parent.isdigit():
        return

    def watch() -> None:
        time.sleep(_LOOK)
        while os.getppid() == int(parent):
            time.sleep(_LOOK)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()
