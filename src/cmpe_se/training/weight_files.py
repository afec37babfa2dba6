"""Files of weights as people have them: safetensors and PyTorch's own, read without unpickling anything but tensors."""

import argparse
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmpe_se.errors import UserError
from cmpe_se.utils.tensor_files import UnreadableFileError, load_tensors
from cmpe_se.utils.text import in_one_line

SUFFIXES = (".safetensors", ".pth", ".pt", ".th", ".bin", ".ckpt", ".tar")
"""What names of files of weights end in; all but the first are PyTorch's."""

# Where checkpoints of other programs keep their weights. As in timm, averaged weights come before the others.
_NESTED = ("state_dict_ema", "model_ema", "ema", "params_ema", "state_dict", "model_state_dict", "model", "network")
_NESTED_LATER = ("net", "module", "params", "weights")
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # anywhere in a name
_OUTER = ("model", "network", "net", "backbone")  # before a name: attributes that hold the network
_DEEPEST = 4
_NO_FILE = "it is torn, or another kind of file"


class Weights(NamedTuple):
    """Tensors by name, and which part of the file they were, such as ``model_ema``; empty for the whole file."""

    tensors: dict[str, Tensor]
    part: str


def read_weights(path: Path) -> Weights:
    """The weights in a file, on the CPU.

    Args:
        path: of a file whose name ends in one of :data:`SUFFIXES`.

    Raises:
        UserError: a file that cannot be read, holds more than tensors, or none.
    """
    if path.suffix == ".safetensors":
        try:
            tensors, _ = load_tensors(path)
        except UnreadableFileError as error:
            raise UserError(f"{path} cannot be read as safetensors: {error}; give another file of weights") from None
        return Weights(tensors, "")
    return _state_dict(_load_pickled(path), path)


def _load_pickled(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm keeps a run's flags in one
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        if names := _foreign_names(path):
            raise UserError(
                f"{path} holds more than tensors ({', '.join(names[:3])}), which is not unpickled since it may run any "
                "code; save the state dict alone, torch.save(network.state_dict(), FILE)"
            ) from None
        reason = _NO_FILE
    except RuntimeError as error:
        reason = in_one_line(error, most=120)
    except Exception:  # zip files, tar files and pickles raise many kinds, with words for programmers
        reason = _NO_FILE
    raise UserError(f"{path} cannot be read as a state dict of PyTorch: {reason}; give another file of weights")


def _foreign_names(path: Path) -> list[str]:
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # no zip file, or a torn one
        return []


def _state_dict(tree: Any, path: Path) -> Weights:
    """The state dict in a checkpoint, however deep."""
    part: list[str] = []
    for _ in range(_DEEPEST):
        if not isinstance(tree, Mapping):
            break
        inner = {str(key): value for key, value in tree.items() if isinstance(value, Mapping) and value}
        name = next((name for name in (*_NESTED, *_NESTED_LATER) if name in inner), None)
        if name is None:
            break
        tree = inner[name]
        part.append(name)
    if isinstance(tree, Mapping):
        tensors = {str(name): value.detach() for name, value in tree.items() if isinstance(value, Tensor)}
        if tensors:
            return Weights(tensors, ".".join(part))
    keys = f", but {', '.join(map(str, list(tree)[:5]))}" if isinstance(tree, Mapping) and tree else ""
    raise UserError(f"{path} holds no state dict{keys}; save one, torch.save(network.state_dict(), FILE)")


def renamed(tensors: Mapping[str, Tensor], expected: Iterable[str], where: str) -> dict[str, Tensor]:
    """Tensors under the names of a network, without what wrappers put before or into them.

    Args:
        tensors: by their names in a file.
        expected: names of the network's weights.
        where: the file, for messages.

    Raises:
        UserError: two tensors would have one name.
    """
    known = set(expected)
    found: dict[str, Tensor] = {}
    origins: dict[str, str] = {}
    for name, tensor in tensors.items():
        new = _own_name(name, known)
        if new in found:
            raise UserError(f"{where} has {new} twice, as {origins[new]} and {name}; save the weights of one network")
        found[new], origins[new] = tensor, name
    return found


def _own_name(name: str, known: set[str]) -> str:
    if name in known:
        return name
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    unwrapped = ".".join(parts)
    while ".".join(parts) not in known and parts and parts[0] in _OUTER:
        parts.pop(0)
    inner = ".".join(parts)
    return inner if inner in known else unwrapped


def fitted(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> tuple[dict[str, Tensor], str]:
    """Tensors in the types of a network's, and in words what was converted; nothing where nothing was.

    Args:
        tensors: by the network's names.
        expected: the network's.
        where: the file, for messages.

    Raises:
        UserError: whole numbers in the place of weights, or tensors that are not dense.
    """
    found, converted = {}, set()
    for name, tensor in tensors.items():
        wanted = torch.float32 if tensor.is_floating_point() else tensor.dtype  # where timm converts the layout
        if name in expected:
            wanted = expected[name].dtype
            if tensor.layout is not torch.strided or tensor.is_quantized:
                raise UserError(f"{name} in {where} is sparse or quantised; give dense weights in floating point")
            if _kind(wanted) != _kind(tensor.dtype):
                have, want = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, wanted))
                raise UserError(f"{name} in {where} is {have}, should be {want}; give weights in floating point")
        if tensor.is_floating_point() and tensor.dtype != wanted:
            converted.add(str(tensor.dtype).removeprefix("torch."))
        found[name] = tensor.to(wanted)
    return found, f"{' and '.join(sorted(converted))} converted to float32" if converted else ""


def _kind(dtype: torch.dtype) -> tuple[bool, bool]:
    return dtype.is_floating_point, dtype.is_complex
