"""Errors for users."""

from collections.abc import Sequence


class UserError(ValueError):
    """A mistake that its reader can correct: one line that says what is wrong, where, and what would be right.

    The commands print it without a stack trace and end with a status other than 0.
    """

    def __init__(self, message: str):
        # A data loader's worker hands an exception on by building it again from a whole traceback: keep its last line.
        if "Original Traceback" in message:
            message = message.strip().splitlines()[-1].split("UserError: ", 1)[-1]
        super().__init__(message)


class MissingPackageError(UserError, ImportError):
    """A package that an extra of this one installs is missing; the message names both."""


def unreadable_complaint(reasons: Sequence[str], others: int) -> str | None:
    """The sentence that a command ends with which has gone on past images that cannot be read; None if there are none.

    Args:
        reasons: a sentence for each of them, all printed before.
        others: number of the images that could be read.
    """
    if not reasons:
        return None
    total = len(reasons) + others
    return f"{len(reasons)} of {total} images cannot be read" + (
        f": {reasons[0]}" if len(reasons) == 1 else f", listed above; the first: {reasons[0]}"
    )
