"""Text that people read and type: durations, settings of gates, lists of names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, with two digits or more: ``duration(7200)`` is "120 min"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 300 else f"{minutes / 60:.1f} h"


def gate_words(settings: dict[str, Any]) -> str:
    """Settings of gates as they follow a view's name: ``, start one, reduction 4, bias, 5 of the gates static``."""
    words = [
        f", {name}" if value is True else f", {name} {value}" for name, value in settings.items() if name != "static"
    ]
    static = f", {len(settings['static'])} of the gates static" if settings.get("static") else ""
    return "".join(words) + static


def pruned_word(widths: Mapping[str, object] | None) -> str:
    """What follows a network's name where its layers have other widths: ``, pruned``."""
    return ", pruned" if widths else ""


def counted(number: int, noun: str) -> str:
    """A number with its noun, in the plural where it is not one: ``counted(1, "epoch")`` is "1 epoch"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def in_points(difference: float) -> str:
    """A difference of percentages with its unit, in the plural where it is not one: "1 point", "0.2 points"."""
    return f"{difference:g} point" if difference == 1 else f"{difference:g} points"


def data_name(data: str, data_dir: str | None) -> str:
    """What people call a data set: the name of its folder, where the setting ``data`` names no more than its layout."""
    kind, _, rest = data.partition("/")
    if rest.startswith(("/", ".", "~")):  # hfds or wds with a path
        return Path(rest).expanduser().absolute().name or data
    if kind in ("folder", "imagenet", "wds") and data_dir:
        return Path(data_dir).expanduser().absolute().name or data
    return data


def shortened(name: str, most: int = 44) -> str:
    """A name that fits on a plot: its beginning and its end, where names tend to differ."""
    end = (most - 1) // 2
    return name if len(name) <= most else f"{name[: most - 1 - end]}…{name[-end:]}"


def split_names(names: str) -> list[str]:
    """Names with commas between, as a flag takes several."""
    return [name.strip() for name in names.split(",") if name.strip()]


def in_one_line(error: BaseException, *, most: int = 300) -> str:
    """What an exception says, short enough to be part of a sentence; the name of its class where it says nothing.

    Args:
        error: of any package.
        most: characters to keep.
    """
    return " ".join(str(error).split())[:most] or type(error).__name__
