"""Text from outside (names of classes, files, folders, runs), made safe for where it is written to.

One function for each destination; whatever writes there calls it on all text, so that no caller has to think of it.
Plots have theirs in :mod:`cmpe_se.utils.plots`, HTML has jinja's besides :func:`visible`.
"""

import json
import re
import unicodedata
from typing import Any

_JOINERS = "\u200c\u200d"  # zero width, but words of some scripts, and emoji, need them
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode's categories of control, format (such as right-to-left overrides), surrogate and unassigned characters, and
of separators of lines."""
_FORMULA = ("=", "+", "-", "@")
_MARKDOWN = re.compile(r"[\\`*\[\]<>|~$&]|(?<!\w)_|_(?!\w)|^#")  # an underscore within a word is one to GitHub too


def visible(text: str, *, keep: str = "") -> str:
    r"""The text on one line and without commands to a terminal: such characters become Python's escapes.

    A line break becomes ``\n``, an escape ``\x1b``, and a byte of a file's name that is no UTF-8 ``\xe9``.

    Args:
        text: of any kind.
        keep: hidden characters to leave, such as a line break of our own.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(one if one in keep else _seen(one) for one in text)


def _seen(one: str) -> str:
    if "\udc80" <= one <= "\udcff":  # Python's stand-in for a byte that is no UTF-8
        return f"\\x{ord(one) - 0xDC00:02x}"
    if unicodedata.category(one) in _HIDDEN and one not in _JOINERS:
        return one.encode("unicode_escape", "surrogatepass").decode()
    return one


def for_terminal(text: str, encoding: str | None) -> str:
    r"""The text as a terminal shows it: visible, and what its encoding lacks as ``\u732b``; lines stay lines."""
    encoding = encoding or "utf-8"
    return visible(text, keep="\n").encode(encoding, "backslashreplace").decode(encoding)


def for_markup(text: str) -> str:
    """The text as rich's markup shows it, which its bars read where its consoles do not."""
    from rich.markup import escape  # which the library alone comes without

    return escape(visible(text))


def csv_cell(value: Any) -> Any:
    """A cell of a CSV table: text is visible and no spreadsheet's formula; other values stay as they are.

    Text that begins as formulas do (=, +, -, @) gets an apostrophe before it, unless it is a number.
    """
    if not isinstance(value, str):
        return value
    text = visible(value)
    return f"'{text}" if text.startswith(_FORMULA) and not _is_number(text) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def markdown(text: str) -> str:
    """The text as Markdown shows it, without any markup of its own."""
    return _MARKDOWN.sub(r"\\\g<0>", visible(text))


def markdown_code(text: str) -> str:
    """The text as code in a line of Markdown, whatever backticks it has."""
    text = visible(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    padding = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{padding}{text}{padding}{fence}"


def to_json(value: Any, *, indent: int | None = None, allow_nan: bool = True) -> str:
    r"""JSON that every reader takes: bytes of names that are no UTF-8 stand in it as ``\xe9``.

    For what other programs read. What is read back here keeps such names as they are, with ``json.dumps``.
    """
    return json.dumps(_without_surrogates(value), indent=indent, allow_nan=allow_nan)


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return re.sub("[\ud800-\udfff]", lambda found: _seen(found[0]), value)
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_surrogates(each) for each in value]
    return value
