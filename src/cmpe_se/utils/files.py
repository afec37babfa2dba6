"""Files that are written whole or not at all, and those that cannot be written, as an error for users."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from cmpe_se.errors import UserError

_UNFINISHED = ".unfinished"
_STALE = 24 * 3600.0  # seconds, where files cannot be locked: no file is being written for so long


@contextmanager
def os_errors_as(what: str, *, advice: str = "") -> Iterator[None]:
    """Turn the system's refusals inside the block into one sentence: what could not be done, why, and what to do.

    Args:
        what: such as "cannot write to runs/demo". It names the file, so that the reason need not.
        advice: end of the sentence.

    Raises:
        UserError: in the place of an OSError.
    """
    try:
        yield
    except OSError as error:
        end = f"; {advice}" if advice else ""
        raise UserError(f"{what}: {error.strerror or error}{end}") from None


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A file to write beside ``path``, whose place it takes once the block has ended well; else it is gone.

    After a kill, :func:`sweep` removes it.

    Raises:
        OSError: there is no room, or no permission.
    """
    unfinished = path.with_name(f"{path.name}-{os.getpid()}{_UNFINISHED}")
    lock = _lock_of(unfinished)
    with suppress(OSError, NotImplementedError):  # a file system without locks
        lock.acquire()
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        _remove(unfinished, lock)


def sweep(folder: Path, *patterns: str) -> None:
    """Remove what killed processes have left unfinished in a folder; what a process is writing stays.

    Args:
        folder: that need not exist.
        patterns: of more names of unfinished files, from before they were locked.
    """
    for unfinished in [file for pattern in (f"*{_UNFINISHED}", *patterns) for file in folder.glob(pattern)]:
        lock = _lock_of(unfinished)
        try:
            if not Path(lock.lock_file).exists():
                raise NotImplementedError  # so it was written without one
            lock.acquire()
        except Timeout:
            continue
        except (OSError, NotImplementedError):
            with suppress(OSError):
                if time.time() - unfinished.stat().st_mtime > _STALE:
                    unfinished.unlink(missing_ok=True)
            continue
        _remove(unfinished, lock)


def _lock_of(unfinished: Path) -> FileLock:
    return FileLock(f"{unfinished}.lock", timeout=0)


def _remove(unfinished: Path, lock: FileLock) -> None:
    for file in (unfinished, Path(lock.lock_file)):
        with suppress(OSError):
            file.unlink(missing_ok=True)
    lock.release()
