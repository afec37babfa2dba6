"""What is printed: text as it is, never as markup or as commands to the terminal, which may be closed under it."""

import logging
import sys
from contextlib import suppress
from typing import Any, TextIO, cast

from rich.console import Console
from rich.text import Text

from cmpe_se.utils.escaping import for_terminal


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


class Terminal(Console):
    """rich's console for text from outside: ``[x]``, ``:cat:`` and escape sequences are shown as they are written.

    That counts for lines and for cells and titles of tables. Styles that our own code wants come as rich's ``Text``.

    Args:
        stderr: print there, and go on where nobody can read it any more.
        settings: more of rich's ``Console``.
    """

    def __init__(self, *, stderr: bool = False, **settings: Any):
        if stderr:
            settings["file"] = steady_stderr()
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        """Text as rich prints it."""
        return super().render_str(for_terminal(text, self.encoding), **settings)


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return for_terminal(super().format(record), getattr(sys.stderr, "encoding", None))


def print_plainly() -> None:
    """What a command does first: no character stops it from printing, and warnings cannot command the terminal."""
    for stream in (sys.stdout, sys.stderr):
        # A test's or a notebook's has none, and it flushes, where a terminal may have been closed.
        if hasattr(stream, "reconfigure"):
            with suppress(OSError, ValueError):
                stream.reconfigure(errors="backslashreplace")
    if not logging.root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_Plain())
        handler.setLevel(logging.WARNING)
        logging.root.addHandler(handler)
