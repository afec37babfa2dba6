"""Files and folders that cannot be written to, as an error for users."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cmpe_se.errors import UserError


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


def refuse_other_encodings(path: str | Path) -> None:
    """Refuse a folder for weights whose name is not UTF-8: safetensors writes there, and cannot read it again.

    Raises:
        UserError: such a name.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"the folder {path} has a name that is not UTF-8; name another one") from None
