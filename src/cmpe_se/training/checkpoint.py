"""Checkpoints that survive a torn write and are read without unpickling anything.

A checkpoint is a tree of dicts, lists, numbers, strings and tensors. Its tensors become a safetensors file, and the
rest, with a mark where each tensor was, becomes JSON in that file's header.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cmpe_se.errors import UserError

_TENSOR, _PAIRS = "__tensor__", "__pairs__"


class Checkpoints:
    """The checkpoints of one run: the newest and the one before it.

    Args:
        folder: where they are; made at the first save.
    """

    def __init__(self, folder: Path):
        self.newest, self.previous = folder / "checkpoint.safetensors", folder / "previous.safetensors"
        self._torn = False  # whether the newest one was found unreadable

    def exist(self) -> bool:
        """Whether there is one, good or torn."""
        return self.newest.exists() or self.previous.exists()

    def save(self, tree: dict[str, Any]) -> None:
        """Write a checkpoint under a temporary name, then rename: at no moment is there no good one.

        Raises:
            UserError: it cannot be written (a full disk); the checkpoints that exist are untouched.
        """
        temporary = self.newest.with_suffix(".partial")
        tensors: dict[str, torch.Tensor] = {}
        skeleton = json.dumps(_strip(tree, tensors))
        try:
            self.newest.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, temporary, metadata={"tree": skeleton})
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            if self.newest.exists() and not self._torn:  # a torn one must not replace the good one before it
                os.replace(self.newest, self.previous)
            os.replace(temporary, self.newest)
            self._torn = False
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"cannot write checkpoint {self.newest}: {error}; the last good one is kept, make room and resume"
            ) from None
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)  # also where Ctrl-C came in between

    def load(self, *, tensors: bool = True) -> tuple[dict[str, Any], Path] | None:
        """The newest checkpoint that can be read, and its path; None where no checkpoint was written yet.

        Args:
            tensors: read them too; else each is None, and only the file's header is read.

        Raises:
            UserError: there are checkpoints, and none of them can be read.
        """
        errors = []
        for path in (self.newest, self.previous):  # in this order: a run that is saving moves the first to the second
            if not path.exists():
                continue
            try:
                with safe_open(path, framework="pt") as file:
                    keys = file.keys()  # it is no dict, and has no iterator of its own
                    found = {key: file.get_tensor(key) if tensors else None for key in keys}
                    return _restore(json.loads(file.metadata()["tree"]), found), path
            except (SafetensorError, OSError, RuntimeError, KeyError, TypeError, json.JSONDecodeError) as error:
                errors.append(f"{path}: {error}")
                self._torn = self._torn or path == self.newest
        if errors:
            raise UserError(f"no checkpoint can be read ({'; '.join(errors)}); start again with another --output")
        return None


def _strip(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The tree with marks for its tensors, which go to ``tensors``; dicts become pairs: JSON's keys are text."""
    if isinstance(tree, torch.Tensor):
        key = str(len(tensors))
        tensors[key] = tree.detach().cpu().contiguous().clone()  # safetensors takes no two tensors of one storage
        return {_TENSOR: key}
    if isinstance(tree, dict):
        return {_PAIRS: [[key, _strip(value, tensors)] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        return [_strip(value, tensors) for value in tree]
    return tree


def _restore(tree: Any, tensors: Mapping[str, torch.Tensor | None]) -> Any:
    if isinstance(tree, dict):
        if _TENSOR in tree:
            return tensors[tree[_TENSOR]]
        return {key: _restore(value, tensors) for key, value in tree[_PAIRS]}
    if isinstance(tree, list):
        return [_restore(value, tensors) for value in tree]
    return tree
