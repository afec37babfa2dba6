"""Errors for users."""


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
