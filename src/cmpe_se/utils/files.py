"""Files that cannot be written, as an error for users."""

from collections.abc import Iterator
from contextlib import contextmanager

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
