"""What is printed: text as it is, never as markup or as commands to the terminal."""

import logging
import sys
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.text import Text

from cmpe_se.utils.escaping import for_terminal


class Terminal(Console):
    """rich's console for text from outside: ``[x]``, ``:cat:`` and escape sequences are shown as they are written.

    That counts for lines and for cells and titles of tables. Styles that our own code wants come as rich's ``Text``.

    Args:
        stderr: print there.
        settings: more of rich's ``Console``.
    """

    def __init__(self, *, stderr: bool = False, **settings: Any):
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        """Text as rich prints it."""
        return super().render_str(for_terminal(text, self.encoding), **settings)


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return for_terminal(super().format(record), getattr(sys.stderr, "encoding", None))


def print_plainly() -> None:
    """What a command does first: no character stops it from printing, and warnings cannot command the terminal."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has none
            with suppress(OSError, ValueError):  # closed, or no longer what it was opened on
                stream.reconfigure(errors="backslashreplace")
    if not logging.root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_Plain())
        handler.setLevel(logging.WARNING)
        logging.root.addHandler(handler)
