"""A progress bar."""

from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import track

from cmpe_se.utils.terminal import Terminal

_Item = TypeVar("_Item")


def with_progress(
    items: Iterable[_Item],
    description: str | None,
    total: int | None = None,
    *,
    console: Console | None = None,
) -> Iterable[_Item]:
    """The items, with a bar while they are gone through; only on a terminal, since in a log a bar is noise.

    Args:
        items: to go through.
        description: text before the bar; None shows no bar.
        total: number of items; their length if left out.
        console: where to show it; stderr if left out.
    """
    console = console or Terminal(stderr=True)
    hidden = description is None or not console.is_terminal
    return track(items, description or "", total, console=console, transient=True, disable=hidden)
