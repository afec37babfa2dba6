"""Predictions as a table that is printed row by row: all widths are known before the first one."""

from collections.abc import Sequence

from rich import box
from rich.cells import cell_len
from rich.table import Table

from cmpe_se.commands.predict.batches import Record
from cmpe_se.data.imagenet import descriptions
from cmpe_se.utils.escaping import for_terminal
from cmpe_se.utils.terminal import Terminal

_SHOWN = 3  # classes a line
_WIDEST = 40  # characters of a class: longer names are folded


class PredictionTable:
    """A table on the screen.

    Args:
        paths: of all images that will be shown.
        classes: the network's.
        top: number of classes of a record.
    """

    def __init__(self, paths: Sequence[str], classes: Sequence[str], top: int):
        self._console, self._begun = Terminal(), False
        words = descriptions(classes)
        self._words = {} if words is None else {name: f" {word.split(',')[0]}" for name, word in zip(classes, words)}  # noqa: B905
        names = [f"{name}{self._words.get(name, '')} 100.0 %" for name in classes]
        self._class_width = min(_WIDEST, max(map(self._width, names)))
        self._ranks = min(_SHOWN, top, len(classes))
        room = self._console.width - self._ranks * (self._class_width + 2) - 2
        self._path_width = max(10, min(room, max(map(self._width, paths))))

    def add(self, records: Sequence[Record]) -> None:
        """Print the rows of records with classes, below the head if they are the first."""
        good = [record for record in records if "classes" in record]
        if not good:
            return
        table = Table(box=box.SIMPLE_HEAD, show_header=not self._begun, show_edge=False)
        table.add_column("image", overflow="fold", width=self._path_width)
        for rank in range(self._ranks):
            table.add_column("most likely" if rank == 0 else "or", overflow="fold", width=self._class_width)
        for record in good:
            table.add_row(record["image"], *map(self._cell, record["classes"][: self._ranks]))
        self._console.print(table)
        self._begun = True

    def _cell(self, entry: dict) -> str:
        return f"{entry['class']}{self._words.get(entry['class'], '')} {100 * entry['probability']:.1f} %"

    def _width(self, text: str) -> int:
        return cell_len(for_terminal(text, self._console.encoding))
