"""Figures as files, with text from outside as it is: no mathtext, no control characters, no missing glyphs."""

import logging
from functools import cache
from pathlib import Path
from typing import IO, Any

from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, FuncFormatter

from cmpe_se.utils.escaping import visible
from cmpe_se.utils.files import replaced
from cmpe_se.utils.text import shortened

_log = logging.getLogger(__name__)
_FALLBACKS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei"),
    *("WenQuanYi Zen Hei", "Droid Sans Fallback", "PingFang SC", "Hiragino Sans", "Apple SD Gothic Neo"),
    *("Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "Arial Unicode MS"),
    *("Noto Sans", "Noto Sans Arabic", "Noto Sans Hebrew", "Noto Sans Devanagari", "Noto Sans Bengali"),
    *("Noto Sans Tamil", "Noto Sans Thai", "Nirmala UI", "Leelawadee UI", "Segoe UI", "Noto Sans Symbols 2"),
)
"""Fonts for scripts that matplotlib's own lacks, as Linux, macOS and Windows have them."""
_said: list[str] = []  # the first character that no font had


def save_figure(figure: Figure, file: Path | IO[bytes], *, dpi: int, tight: bool = False) -> None:
    r"""Write a figure as PNG.

    All of its text is drawn as it is: ``$`` is no mathtext, and hidden characters are shown as :func:`visible` does. A
    character that no installed font has becomes its escape, such as ``\u732b``, which a log message says once. Names on
    axes are cut to what fits.

    Args:
        figure: made without pyplot.
        file: path, or a binary file.
        dpi: pixels an inch.
        tight: cut the margins off, and keep what lies outside the figure.

    Raises:
        UserError: the file cannot be written; what was there is as it was.
    """
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            formatter = axis.get_major_formatter()
            if isinstance(formatter, FuncFormatter) and isinstance(axis.get_major_locator(), FixedLocator):
                # The formatter would put the names back, if their texts alone were changed.
                names = [visible(shortened(name)) for name in formatter.format_ticks(list(axis.get_majorticklocs()))]
                axis.set_ticklabels([_drawable(name) for name in names])
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_parse_math(False)
        text.set_text(_drawable(text.get_text()))
        if not _characters(1).issuperset(text.get_text()):
            text.set_fontfamily(_families())
    settings: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.12} if tight else {}
    if isinstance(file, Path):
        with replaced(file) as unfinished:
            figure.savefig(unfinished, dpi=dpi, format="png", **settings)
    else:
        figure.savefig(file, dpi=dpi, format="png", **settings)


def _drawable(text: str) -> str:
    """Lines of text, with escapes in the place of what cannot be drawn."""
    text = visible(text, keep="\n")
    missing = set(text) - _characters(None)
    if missing and not _said:
        _said.append(min(missing))
        _log.warning(
            f"no installed font has {_said[0]}: plots show it as {_escape(_said[0])}, and others like it; install a "
            "font that has them, such as Noto Sans CJK"
        )
    return "".join(_escape(one) if one in missing else one for one in text)


def _escape(one: str) -> str:
    return one.encode("unicode_escape").decode()


@cache
def _families() -> list[str]:
    """matplotlib's own font, and those of the fallbacks that are installed."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return [font_manager.FontProperties().get_name(), *(name for name in _FALLBACKS if name in installed)]


@cache
def _characters(fonts: int | None) -> frozenset[str]:
    """What the first fonts have, all of them for None; a line break needs none."""
    paths = [font_manager.findfont(font_manager.FontProperties(family=[name])) for name in _families()[:fonts]]
    return frozenset("\n").union(*(map(chr, font_manager.get_font(path).get_charmap()) for path in paths))
