"""Records that are read back: JSON that is strict, in the shape that a type describes."""

import json
import math
from functools import cache
from pathlib import Path
from reprlib import repr as short
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints, is_typeddict

from cmpe_se.errors import UserError
from cmpe_se.utils.text import in_one_line

_LARGEST = 2**63 - 1
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    NoneType: "null",
    list: "a list",
}


def read_json(path: Path, kind: Any, *, advice: str) -> Any:
    """The value in a JSON file.

    Args:
        path: of the file.
        kind: type of the value, as of :func:`check_shape`.
        advice: end of the sentence for a file that cannot be used: what to do about it.

    Raises:
        UserError: a file that cannot be read, is no JSON, or has another shape.
    """
    try:
        return check_shape(parse_json(path.read_text(encoding="utf-8")), kind)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {in_one_line(error)}; {advice}") from None


def parse_json(text: str, *, finite: bool = True) -> Any:
    """JSON as the standard has it, where Python's parser is generous.

    Args:
        text: to parse.
        finite: refuse ``NaN`` and ``Infinity``.

    Raises:
        ValueError: no JSON, a key twice in an object, a whole number of more than 64 bits, or too many levels.
    """
    constant = _refuse_constant if finite else float
    try:
        return json.loads(text, object_pairs_hook=_without_twins, parse_int=_bounded, parse_constant=constant)
    except RecursionError:
        raise ValueError("it has too many levels") from None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"it holds {name}, which is no number")


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {next(name for name in names if names.count(name) > 1)} twice")
    return found


def _bounded(digits: str) -> int:
    if len(digits) > 20 or abs(int(digits)) > _LARGEST:
        raise ValueError(f"it holds the number {short(digits)}, which is too large")
    return int(digits)


def check_shape(value: Any, kind: Any, name: str = "") -> Any:
    """Return a value that has the shape of a type, and complain of any other.

    Args:
        value: to look at; keys that a ``TypedDict`` does not name may be there, as later versions write more.
        kind: ``int``, ``float`` (finite, a whole number counts), ``str``, ``bool``, ``None``, ``Any``, ``list[...]``,
            ``tuple[...]``, ``dict[str, ...]``, a union, a ``TypedDict``, or another class.
        name: where the value stands, for messages.

    Raises:
        ValueError: a sentence that names the place, what is there and what would be right.
    """
    if kind is Any:
        return value
    origin, arguments = get_origin(kind), get_args(kind)
    if is_typeddict(kind):
        return _check_record(value, kind, name)
    if origin in (Union, UnionType):
        return _check_union(value, arguments, name)
    if origin is tuple:  # which JSON has as a list
        return _check_tuple(value, arguments, name)
    if not _is_of(value, origin or kind):
        raise ValueError(f"{name or 'its content'} is {short(value)}, should be {_words(kind)}")
    if origin is list:
        for index, item in enumerate(value):
            check_shape(item, arguments[0], f"{name}[{index}]")
    if origin is dict:
        for key, item in value.items():
            check_shape(key, arguments[0], f"a key of {name or 'its content'}")
            check_shape(item, arguments[1], f"{name}.{key}" if name else str(key))
    return value


def _check_tuple(value: Any, kinds: tuple[Any, ...], name: str) -> Any:
    check_shape(value, list[Any], name)
    if kinds[-1] is Ellipsis:
        return check_shape(value, list[kinds[0]], name)  # type: ignore[valid-type]
    if len(value) != len(kinds):
        raise ValueError(f"{name or 'its content'} has {len(value)} values, should have {len(kinds)}")
    for index, (item, kind) in enumerate(zip(value, kinds, strict=True)):
        check_shape(item, kind, f"{name}[{index}]")
    return value


def _check_record(value: Any, kind: Any, name: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{name or 'its content'} is {short(value)}, should be {_words(kind)}")
    if missing := sorted(kind.__required_keys__ - value.keys()):
        raise ValueError(f"{name or 'it'} lacks {', '.join(missing)}")
    for key, item_kind in _hints(kind).items():
        if key in value:
            check_shape(value[key], item_kind, f"{name}.{key}" if name else key)
    return value


def _check_union(value: Any, kinds: tuple[Any, ...], name: str) -> Any:
    fitting = [kind for kind in kinds if _is_of(value, dict if is_typeddict(kind) else get_origin(kind) or kind)]
    if not fitting:
        words = " or ".join(_words(kind) for kind in kinds)
        raise ValueError(f"{name or 'its content'} is {short(value)}, should be {words}")
    return check_shape(value, fitting[0], name)


def _is_of(value: Any, kind: Any) -> bool:
    if kind is None:
        return value is None
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is float:
        return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    return isinstance(value, kind)


def _words(kind: Any) -> str:
    if is_typeddict(kind) or (get_origin(kind) or kind) is dict:
        return "an object with names"
    kind = NoneType if kind is None else get_origin(kind) or kind
    return _WORDS.get(kind, f"a {kind.__name__}")


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)
