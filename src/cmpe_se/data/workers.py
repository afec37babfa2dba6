"""The processes that decode images: how they start, the batches that they give, and what is said where one is lost."""

import functools
import logging
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess

import torch
import torch.multiprocessing as multiprocessing
from torch.utils.data import DataLoader, IterableDataset

from cmpe_se.errors import UserError
from cmpe_se.utils.signals import held

_log = logging.getLogger(__name__)
_PATIENCE = 1.0  # seconds in which a process that has closed its connections has ended


@functools.cache
def _warn_once(message: str) -> None:
    _log.warning(message)


def started(loader: DataLoader) -> Iterator:
    """The batches of ``loader``, whose workers no signal reaches before they ignore it.

    Where the system gives processes nothing to share, as where /dev/shm cannot be written, this one does the work.
    """
    if loader.num_workers:
        try:
            multiprocessing.Event()  # a loader that fails half-way prints a trace as it is deleted
        except OSError as error:
            if isinstance(loader.dataset, IterableDataset):  # whose images depend on the number of workers
                raise UserError(f"no processes can be started to decode images: {error}; give --workers 0") from None
            _warn_once(f"no processes can be started to decode images ({error}): this one decodes them, more slowly")
            loader.num_workers = 0
    with held():
        return iter(loader)


def lost_worker(error: BaseException | None) -> str | None:
    """What to say where a worker of a DataLoader was ended or had no room in shared memory; None of another error.

    PyTorch raises it in the main thread wherever that is, not only where a batch is asked for.
    """
    said = []
    while error is not None:
        said.append(str(error) if isinstance(error, RuntimeError) else "")
        error = error.__cause__ or error.__context__
    if any("shared memory" in text for text in said):  # also what PyTorch says of a bus error
        return (
            "the processes that decode images have no room in shared memory (/dev/shm); make it larger (docker run "
            "--shm-size 2g), or give --workers 0"
        )
    ended = [text for text in said if text.startswith("DataLoader worker")]
    if not ended:
        return None
    signals = [text.split("signal: ")[1].split(".")[0] for text in ended if "signal: " in text]
    how = f"was ended by a signal ({signals[0]})" if signals else "has ended by itself"
    return f"a process that decodes images {how}, perhaps for want of memory; give fewer --workers"


def batches_on(device: torch.device, loader: DataLoader) -> Iterator:
    """The batches of ``loader`` moved to ``device``, with whatever follows images and labels in them."""
    for images, labels, *others in fetched(loader):
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True), *others


def fetched(loader: DataLoader) -> Iterator:
    """The batches of ``loader``.

    Raises:
        RuntimeError: a worker was ended; :func:`lost_worker` knows it.
    """
    batches = started(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except Exception as error:
            lost = _lost_behind(error, getattr(batches, "_workers", ()))
            # The traceback's frames hold the iterator in a reference cycle; collected as part of one, it waits five
            # seconds for each worker. Without them it ends its workers right here.
            traceback.clear_frames(error.__traceback__)
            del batches
            if lost:
                raise lost from error
            raise
        yield batch


def _lost_behind(error: Exception, workers: Sequence[BaseProcess]) -> RuntimeError | None:
    """PyTorch's error of a worker that was ended, where the connection to it breaks before its end is known."""
    if not isinstance(error, OSError | EOFError) or "in DataLoader worker process" in str(error):
        return None  # what a worker itself has raised
    end = time.monotonic() + _PATIENCE
    while workers and time.monotonic() < end:
        for worker in workers:
            if code := worker.exitcode:
                how = "exited unexpectedly" if code > 0 else f"is killed by signal: {signal.strsignal(-code)}. "
                return RuntimeError(f"DataLoader worker (pid {worker.pid}) {how}")
        time.sleep(0.01)
    return None
