"""Files of torch.export (.pt2) that hold nothing but a graph of PyTorch's own operators and its tensors.

``torch.export.load`` runs what such a file asks for: it unpickles objects, loads compiled libraries, evaluates guards
and expressions as Python, writes names into code that it compiles, and looks functions up by name, ``torch.os.system``
among them. What ``cmpe-se export`` writes needs none of it. So a file is compared with a list of what it may hold
before PyTorch opens it.
"""

import io
import json
import pickle
import re
import zipfile
from collections.abc import Iterator
from typing import Any

import torch


class CodeInFileError(ValueError):
    """A file that could run code; the message says what it holds, such as "the function torch.os.system"."""


_PARTS = re.compile(
    r"models/model\.json|data/(weights|constants)/(model_(weights|constants)_config\.json|(weight|tensor)_\d+)"
    r"|data/sample_inputs/model\.pt|extra/\w+|archive_format|archive_version|version|byteorder"
    r"|\.data/(version|serialization_id|alignment)|\.format_version|\.storage_alignment",
    re.ASCII,
)
_PAYLOADS = re.compile(r"(weight|tensor)_\d+", re.ASCII)
_SYMBOL = r"Symbol\('\w+'(, \w+=(True|False))*\)"
_FUNCTIONS = "Integer|Rational|Add|Mul|Pow|Max|Min|Mod|PythonMod|FloorDiv|CleanDiv|CeilDiv"  # of sympy and PyTorch
_EXPRESSION = rf"({_SYMBOL}|\d+|[-+*/() ,]|(?:{_FUNCTIONS})(?=\())*"
# Strings of the graph by their key: all others are names, which become part of code.
_STRINGS = {
    key: re.compile(pattern, re.ASCII)
    for key, pattern in {
        "target": r"torch\.ops\.(aten|prims)\.(?!from_file\b)\w+\.\w+|_operator\.(getitem|add|sub|mul|floordiv|mod)",
        "expr_str": _EXPRESSION,
        "as_string": r"[\w .,>-]*",
        "torch_version": r"[\w.+-]*",
        "metadata": r"[\w.,;:@<> -]*",
        "": r"[\w.-]*",
    }.items()
}
_TREES = ("builtins.tuple", "builtins.list", "builtins.dict", None)


def refuse_code(content: bytes) -> None:
    """Complain of a file that PyTorch could not open without running something inside it.

    Args:
        content: of a file that torch.export wrote.

    Raises:
        CodeInFileError: it could run code.
        Exception: it is no such file.
    """
    from torch.export.pt2_archive._package import PT2ArchiveReader

    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if any("/" not in name for name in archive.namelist()):  # PyTorch 2.7's form, which is read in another way
            raise CodeInFileError("parts that this version does not look into")
    with PT2ArchiveReader(io.BytesIO(content)) as archive:
        names = archive.get_file_names()
        if unknown := [name for name in names if not _PARTS.fullmatch(name)]:
            raise CodeInFileError(f"a part {unknown[0]}")
        for name in names:
            if name.endswith(".json"):
                _check_graph(json.loads(archive.read_string(name)))
            elif name.endswith(".pt"):
                try:
                    torch.load(io.BytesIO(archive.read_bytes(name)), weights_only=True)
                except pickle.UnpicklingError:
                    raise CodeInFileError(f"a pickle of more than tensors ({name})") from None


def _check_graph(model: Any) -> None:
    for path, value in _leaves(model):
        key = path[-1]
        if "guards_code" in path:
            raise CodeInFileError("guards, which are Python")
        if key == "use_pickle" and value:
            raise CodeInFileError("a pickle of weights")
        if key == "path_name" and not _PAYLOADS.fullmatch(str(value)):
            raise CodeInFileError(f"a part {value}")
        if forbidden := {"as_custom_obj", "as_operator", "as_graph", "treespec_namedtuple_fields"} & {*path}:
            raise CodeInFileError(f"an object of Python ({forbidden.pop()})")
        if not isinstance(value, str):
            continue
        if key in ("in_spec", "out_spec"):
            _check_tree(json.loads(value)[1])
        elif not _STRINGS.get("metadata" if "metadata" in path else key, _STRINGS[""]).fullmatch(value):
            raise CodeInFileError(f"{value[:60]!r} as {key}")


def _leaves(value: Any, path: tuple[str, ...] = ("",)) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Values that hold no others, each with the keys that lead to it, which are names like others."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not _STRINGS[""].fullmatch(key):
                raise CodeInFileError(f"{key[:60]!r} as a name")
            yield from _leaves(inner, (*path, key))
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, path)
    else:
        yield path, value


def _check_tree(tree: dict[str, Any]) -> None:
    """Arguments and results: tensors in tuples, lists and dicts; others import what they name."""
    if tree["type"] not in _TREES or "{" in (tree["context"] or ""):
        raise CodeInFileError(f"arguments of type {tree['type']}")
    for child in tree["children_spec"]:
        _check_tree(child)
