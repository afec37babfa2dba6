"""Files of tensors: what comes back is what was saved, or the file is refused."""

import json
import math
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from cmpe_se.utils.tensor_files import (
    CHECKSUM,
    UnreadableFileError,
    load_header,
    load_tensors,
    misfit,
    not_finite,
    save_tensors,
)


def tensors() -> dict[str, torch.Tensor]:
    """Of all types and layouts that networks, optimisers and data have, two of them in one memory."""
    images = torch.arange(120.0).reshape(2, 3, 4, 5).to(memory_format=torch.channels_last)
    return {
        "images": images,
        "the same": images,
        "a part": images[1],
        "empty": torch.empty(0, 3),
        "also empty": torch.empty(0),
        "number": torch.tensor(3),
        "truth": torch.tensor([True, False]),
        "half": torch.ones(3, dtype=torch.float16),
        "brain": torch.ones(3, dtype=torch.bfloat16),
        "eight bits": torch.ones(3).to(torch.float8_e4m3fn),
        "bytes": torch.arange(256, dtype=torch.uint8),
    }


def test_round_trip(tmp_path):
    path, saved = tmp_path / "a.safetensors", tensors()
    save_tensors(saved, path, {"text": "ü\n"})
    found, texts = load_tensors(path)
    assert texts == {"text": "ü\n"}
    assert found.keys() == saved.keys()
    for name, tensor in saved.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].float(), tensor.float()), name
    assert load_header(path)[1]["text"] == "ü\n"
    assert load_file(path).keys() == saved.keys()  # other programs read it


def test_every_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors(tensors(), path, {"text": "words"})
    whole = path.read_bytes()
    key = whole.index(CHECKSUM.encode())  # without its name a checksum is a text like others, and tensors are as saved
    places = [place for place in range(len(whole)) if not key <= place < key + len(CHECKSUM)]
    for place in random.Random(0).sample(places, 300):
        content = bytearray(whole)
        content[place] ^= 1 << place % 8
        path.write_bytes(content)
        with pytest.raises(UnreadableFileError):
            load_tensors(path)


def test_other_headers_are_noticed(tmp_path):
    """A name, a type or a text that changes under the same bytes."""
    path = tmp_path / "a.safetensors"
    save_tensors({"a": torch.ones(4)}, path, {"text": "words"})
    whole = path.read_bytes()
    for before, after in ((b'"a"', b'"b"'), (b"F32", b"I32"), (b"words", b"sword"), (b"[4]", b"[4]")):
        path.write_bytes(whole.replace(before, after))
        if before == after:
            load_tensors(path)
        else:
            with pytest.raises(UnreadableFileError, match="the checksum differs"):
                load_tensors(path)


def test_files_without_a_checksum(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(2)}, path)
    found, texts = load_tensors(path)
    assert (found["a"].tolist(), texts) == ([1.0, 1.0], {})


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\x08\0\0\0\0\0\0\0{}      "])
def test_no_such_file(content, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    if content.endswith(b"}      "):
        assert load_tensors(path) == ({}, {})
        return
    for read in (load_tensors, load_header):
        with pytest.raises(UnreadableFileError):
            read(path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_not_finite(value, dtype):
    named = tensors() | {"large": torch.tensor([torch.finfo(dtype).max, 0], dtype=dtype)}
    assert not_finite(named) is None
    named["large"][1] = value
    assert not_finite(named) == "large"
    assert not_finite({}) is None


def test_misfit():
    there = {"a": torch.ones(2), "b": torch.ones(3)}
    assert misfit(there, there) is None
    assert misfit({}, there) == "2 of 2 weights are not there, the first a"
    assert misfit(there | {"c": torch.ones(1)}, there) == "it has 1 weights that the network has not, the first c"
    assert misfit(there | {"b": torch.ones(1)}, there) == "b is of shape (1,), should be (3,)"
    assert misfit(there | {"b": torch.ones(3).half()}, there) == "b is float16, should be float32"


def test_metadata_is_what_safetensors_writes(tmp_path):
    """The checksum is a text in the header, where every reader of safetensors sees it."""
    path = tmp_path / "a.safetensors"
    save_tensors({"a": torch.ones(2)}, path)
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert len(header["__metadata__"][CHECKSUM]) == 64
