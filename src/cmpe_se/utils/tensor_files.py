"""Safetensors files with a checksum in their header: what is read is what was written, or it is refused."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cmpe_se.utils.sharding import shared_out_like
from cmpe_se.utils.text import in_one_line

CHECKSUM = "cmpe_se_sha256"
"""Key of the checksum in the header. Files without it, of other programs and earlier versions, are read unchecked."""


class UnreadableFileError(ValueError):
    """A file of tensors that is damaged or none at all; the message is the reason, without the file's name."""


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors and texts with their checksum.

    Args:
        tensors: by name, on any device; some may share memory.
        path: of the file. It is not written as a whole: that is up to ``cmpe_se.utils.files.replaced``.
        metadata: texts for the header.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    places: set[int] = set()
    for name, tensor in kept.items():  # safetensors takes no two tensors of one storage
        place = tensor.untyped_storage().data_ptr()
        if place in places or tensor.untyped_storage().nbytes() != tensor.nbytes:
            kept[name] = tensor.clone()
        places.add(place)
    texts = dict(metadata or {})
    save_file(kept, path, metadata=texts | {CHECKSUM: _checksum(kept, texts)})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, on the CPU, and the texts of its header.

    Raises:
        UnreadableFileError: no safetensors file, or one whose content is not what its checksum says.
    """
    try:
        with safe_open(path, framework="pt") as file:
            texts = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise UnreadableFileError(in_one_line(error)) from None
    expected = texts.pop(CHECKSUM, None)
    if expected is not None and _checksum(tensors, texts) != expected:
        raise UnreadableFileError("its content is not what was saved: the checksum differs")
    return tensors, texts


def load_header(path: Path) -> tuple[list[str], dict[str, str]]:
    """Names of the tensors of a file and the texts of its header, which the checksum was not compared with.

    Raises:
        UnreadableFileError: no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys()), dict(file.metadata() or {})
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise UnreadableFileError(in_one_line(error)) from None


def _checksum(tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    for key in sorted(texts):
        digest.update(f"{key}\0{texts[key]}\0".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor that holds NaN or infinity; None where all values are finite.

    Args:
        tensors: by name, all on one device, which is waited for once.
    """
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()}
    if not floating:
        return None
    # NaN is both least and largest where it occurs: a twentieth of the time that a mask of each tensor takes.
    flags = torch.stack([torch.stack(torch.aminmax(_wide(tensor))).isfinite().all() for tensor in floating.values()])
    return next((name for name, finite in zip(floating, flags.tolist(), strict=True) if not finite), None)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.element_size() > 1 else tensor.detach().float()  # eight bits compare nowhere


def misfit(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """In what tensors differ from those of a network, in words: names, shapes or types; None where nothing differs."""
    if missing := [name for name in expected if name not in found]:
        return f"{len(missing)} of {len(expected)} weights are not there, the first {missing[0]}"
    if unknown := [name for name in found if name not in expected]:
        return f"it has {len(unknown)} weights that the network has not, the first {unknown[0]}"
    for name, tensor in expected.items():
        there = found[name]
        if there.shape != tensor.shape:
            return f"{name} is of shape {tuple(there.shape)}, should be {tuple(tensor.shape)}"
        if there.dtype != tensor.dtype:
            return f"{name} is {_type_name(there)}, should be {_type_name(tensor)}"
    return None


def load_exactly(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load all of a network's weights and statistics, as they are: PyTorch would cast other types without a word.

    Raises:
        ValueError: other names, shapes or types than the network's, or values that are not finite; the network is as
            it was.
    """
    if reason := misfit(tensors, network.state_dict()):
        raise ValueError(reason)
    if name := not_finite(tensors):
        raise ValueError(f"{name} holds values that are not finite")
    network.load_state_dict(shared_out_like(tensors, network.state_dict()))


def _type_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
