"""The report as one HTML file that needs nothing else: no network, no scripts, every plot inside."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from cmpe_se.exhibits.exhibit import Exhibit
from cmpe_se.utils.files import write_text
from cmpe_se.utils.html import html_environment


@dataclass(frozen=True)
class Table:
    """A small table on the page; ``note`` stands below it."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Args:
        name: of its anchor.
        heading: of the part.
        text: before its plots.
        exhibits: its plots.
        table: behind them, or None.
        finding: what there is to see without a plot, for the list at the top.
    """

    name: str
    heading: str
    text: str = ""
    exhibits: Sequence[Exhibit] = field(default_factory=tuple)
    table: Table | None = None
    finding: str = ""


def write_page(path: Path, title: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section]) -> None:
    """Write the page; the exhibits' files have to be beside it already.

    Args:
        path: of the HTML file.
        title: of the page.
        facts: names and values, first on the page.
        sections: parts, in order.
    """
    environment = html_environment()
    environment.filters["embedded"] = lambda name: _embedded(path.parent / name)
    template = environment.from_string((files("cmpe_se.commands.report") / "page.html.j2").read_text(encoding="utf-8"))
    write_text(path, template.render(title=title, facts=facts, sections=sections))


def _embedded(picture: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
