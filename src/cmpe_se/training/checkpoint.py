"""Checkpoints that survive a torn write and are read without unpickling anything.

A checkpoint is a tree of dicts, lists, tuples, numbers, strings, tensors and their data types. Its tensors become a
safetensors file, and the rest, with a mark where each tensor was, becomes JSON in that file's header.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from cmpe_se.errors import UserError
from cmpe_se.utils.files import written_whole
from cmpe_se.utils.records import check_shape, parse_json
from cmpe_se.utils.tensor_files import UnreadableFileError, load_header, load_tensors, save_tensors

_TENSOR, _PAIRS, _TUPLE, _DTYPE, _TREE = "__tensor__", "__pairs__", "__tuple__", "__dtype__", "tree"
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}


class Checkpoints:
    """The checkpoints of one run: the newest and the one before it.

    Args:
        folder: where they are; made at the first save.
        kind: shape of the tree, as of ``cmpe_se.utils.records.check_shape``.
    """

    def __init__(self, folder: Path, kind: Any = dict):
        self.newest, self.previous = folder / "checkpoint.safetensors", folder / "previous.safetensors"
        self._kind = kind
        self.unreadable: list[str] = []
        """Why checkpoints were passed over at the last :meth:`load`, each with its path."""

    def exist(self) -> bool:
        """Whether there is one, good or torn."""
        return self.newest.exists() or self.previous.exists()

    def save(self, tree: dict[str, Any]) -> None:
        """Write a checkpoint under a temporary name, then rename: at no moment is there no good one.

        Raises:
            UserError: it cannot be written (a full disk); the checkpoints that exist are untouched.
        """
        tensors: dict[str, torch.Tensor] = {}
        skeleton = json.dumps(with_marks(tree, tensors))
        torn = any(reason.startswith(str(self.newest)) for reason in self.unreadable)
        try:
            self.newest.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(self.newest) as temporary:
                save_tensors(tensors, temporary, {_TREE: skeleton})
                if self.newest.exists() and not torn:  # a torn one must not replace the good one before it
                    os.replace(self.newest, self.previous)
            self.unreadable = []
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"cannot write checkpoint {self.newest}: {error}; the last good one is kept, make room and resume"
            ) from None

    def load(self, *, tensors: bool = True) -> tuple[dict[str, Any], Path] | None:
        """The newest checkpoint that can be read, and its path; None where no checkpoint was written yet.

        Args:
            tensors: read them too, and compare the checksum; else each is an empty one, and only the file's header is
                read.

        Raises:
            UserError: there are checkpoints, and none of them can be read.
        """
        self.unreadable = []
        for path in (self.newest, self.previous):  # in this order: a run that is saving moves the first to the second
            if not path.exists():
                continue
            try:
                return self._read(path, tensors), path
            except ValueError as error:
                self.unreadable.append(f"{path}: {error}")
        if self.unreadable:
            reasons = "; ".join(self.unreadable)
            raise UserError(f"no checkpoint can be read ({reasons}); start again with another --output")
        return None

    def _read(self, path: Path, tensors: bool) -> dict[str, Any]:
        if tensors:
            found, texts = load_tensors(path)
        else:
            names, texts = load_header(path)
            found = {name: torch.empty(0) for name in names}
        if _TREE not in texts:
            raise UnreadableFileError("it is not a checkpoint of a run")
        try:
            tree = without_marks(parse_json(texts[_TREE], finite=False), found)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise UnreadableFileError(f"its tree is damaged ({type(error).__name__}: {error})") from None
        return check_shape(tree, self._kind)


def with_marks(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The tree with marks for its tensors, which go to ``tensors``; dicts become pairs: JSON's keys are text."""
    if isinstance(tree, torch.Tensor):
        key = str(len(tensors))
        tensors[key] = tree
        return {_TENSOR: key}
    if isinstance(tree, dict):
        return {_PAIRS: [[key, with_marks(value, tensors)] for key, value in tree.items()]}
    if isinstance(tree, tuple):
        return {_TUPLE: [with_marks(value, tensors) for value in tree]}
    if isinstance(tree, list):
        return [with_marks(value, tensors) for value in tree]
    if isinstance(tree, torch.dtype):  # of an optimiser's state
        return {_DTYPE: str(tree)}
    return tree


def without_marks(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The tree that :func:`with_marks` was given."""
    if isinstance(tree, dict):
        if _TENSOR in tree:
            return tensors[tree[_TENSOR]]
        if _TUPLE in tree:
            return tuple(without_marks(value, tensors) for value in tree[_TUPLE])
        if _DTYPE in tree:
            return _DTYPES[tree[_DTYPE]]
        return {key: without_marks(value, tensors) for key, value in tree[_PAIRS]}
    if isinstance(tree, list):
        return [without_marks(value, tensors) for value in tree]
    return tree
