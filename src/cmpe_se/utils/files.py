"""Files that are written whole, and files that cannot be written, as an error for users."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cmpe_se.errors import UserError
from cmpe_se.utils.escaping import to_json


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
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside a file; at the end of the block, what was written there is the file.

    A reader, a kill or a power failure never meets half of it: the new file is on the disk before it takes the place
    of the old one. If the block ends by an exception, the old file is as it was and the temporary one is gone.

    Args:
        path: of the file, in a folder that exists.
    """
    temporary = path.with_name(path.name + ".partial")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # some file systems have no sync for folders
        sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a file's text as a whole, as :func:`replacing` does.

    Raises:
        UserError: it cannot be written.
    """
    with os_errors_as(f"cannot write {path}"), replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Replace a file by a value as JSON.

    Raises:
        UserError: it cannot be written.
        ValueError: a number that is not finite, which JSON does not have.
    """
    write_text(path, to_json(value, indent=2, allow_nan=False) + "\n")
