"""Files that are written whole or not at all, and those that cannot be written, as an error for users."""

import glob
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cmpe_se.errors import UserError
from cmpe_se.utils.escaping import to_json

_UNFINISHED, _LOCK = ".unfinished-", ".lock"
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


def whole_path(path: str | Path) -> Path:
    """A path with its ``~`` replaced by the home folder.

    Raises:
        UserError: there is none, as for a user whom the system does not know.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: there is no home folder to put in the place of ~; give the whole path") from None


def refuse_other_encodings(path: str | Path) -> None:
    """Refuse a folder for weights whose name is not UTF-8: safetensors writes there, and cannot read it again.

    Raises:
        UserError: such a name.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"the folder {path} has a name that is not UTF-8; name another one") from None


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of ``path`` once the block has ended well; else ``path`` is as it was.

    A reader, a kill or a power failure never meets half of it: the new file is on the disk before it takes the place of
    the old one.

    Raises:
        UserError: it cannot be written; the message names ``path``.
    """
    with os_errors_as(f"cannot write {path}"), written_whole(path) as unfinished:
        yield unfinished


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """:func:`replaced` with the system's own errors.

    The file has the ending of ``path``, and is gone after any exception. After a kill, the next write of ``path``
    removes it, and so does :func:`sweep`.

    Raises:
        OSError: there is no room, no permission, or no such folder.
    """
    os.stat(f"{path.parent}/.")  # where there is no such folder, the lock would make it
    sweep(path.parent, f"{glob.escape(path.stem)}{_UNFINISHED}*{glob.escape(path.suffix)}")
    unfinished = path.with_name(f"{path.stem}{_UNFINISHED}{os.getpid()}{path.suffix}")
    lock = _lock_of(unfinished)
    with suppress(OSError, NotImplementedError):  # a file system without locks
        lock.acquire()
    try:
        yield unfinished
        _sync(unfinished)
        os.replace(unfinished, path)
    finally:
        _remove(unfinished, lock)
    with suppress(OSError):  # some file systems have no sync for folders
        _sync(path.parent)


def sweep(folder: Path, *patterns: str) -> None:
    """Remove what killed processes have left unfinished in a folder; what a process is writing stays.

    Args:
        folder: that need not exist.
        patterns: of names; those of :func:`written_whole` if left out. Files without a lock, and folders, go by age.
    """
    for pattern in patterns or (f"*{_UNFINISHED}*",):
        for left in [path for path in folder.glob(pattern) if path.suffix != _LOCK]:
            lock = _lock_of(left)
            try:
                if not Path(lock.lock_file).exists():
                    raise NotImplementedError
                lock.acquire()
            except Timeout:
                continue
            except (OSError, NotImplementedError):
                _remove_old(left)
            else:
                _remove(left, lock)


def write_text(path: Path, text: str) -> None:
    """Replace a file's text as a whole, as :func:`replaced` does.

    Raises:
        UserError: it cannot be written.
    """
    with replaced(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Replace a file by a value as JSON.

    Raises:
        UserError: it cannot be written.
        ValueError: a number that is not finite, which JSON does not have.
    """
    write_text(path, to_json(value, indent=2, allow_nan=False) + "\n")


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock_of(unfinished: Path) -> FileLock:
    return FileLock(f"{unfinished}{_LOCK}", timeout=0)


def _remove(unfinished: Path, lock: FileLock) -> None:
    for file in (unfinished, Path(lock.lock_file)):
        with suppress(OSError):
            file.unlink(missing_ok=True)
    lock.release()


def _remove_old(left: Path) -> None:
    with suppress(OSError):  # another process was faster
        if time.time() - left.stat().st_mtime < _STALE:
            return
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink()
