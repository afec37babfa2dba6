"""What a long command says while it works, on a terminal that may be closed under it."""

import sys
from contextlib import suppress
from typing import Any, TextIO, cast


class _Steady:
    """A text file whose errors are swallowed: what was to be shown there has no reader any more."""

    def __init__(self, file: TextIO):
        self._file = file

    def write(self, text: str) -> int:
        try:
            return self._file.write(text)
        except (OSError, ValueError):  # a closed terminal, a reader that has ended, a full disk; a closed file
            return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def steady_stderr() -> TextIO:
    """stderr for progress: hours of training do not end because nobody can read the next line."""
    return cast(TextIO, _Steady(sys.stderr))
