"""Tables for the screen."""

from typing import Any

from rich import box
from rich.table import Table


def number_table(*columns: str, **settings: Any) -> Table:
    """A table of names, in a first column without a head, and of numbers, to the right; it has no rows yet.

    Args:
        columns: heads of the numbers.
        settings: of rich's ``Table``, such as ``title``.
    """
    table = Table(box=box.SIMPLE_HEAD, **settings)
    table.add_column("", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table
