"""What a .pt2 file could run when PyTorch opens it is refused before, unless the user trusts it."""

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch.export import Dim

from cmpe_se.errors import UserError
from cmpe_se.runtimes.archives import CodeInFileError, refuse_code
from cmpe_se.runtimes.exported import load_exported
from tests.commands.export.conftest import _export
from tests.training.processes import complaint_of, succeed

CODE = "__import__('os').mkdir('MARK')"
SYMBOL = b"Symbol('s77', positive=True, integer=True)"


@pytest.fixture(scope="module")
def own(trained) -> Path:
    """A file that export wrote."""
    return _export(trained, "torch-export").path


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def evil(path) -> bytes:
    file = io.BytesIO()
    torch.save(Evil(path), file)
    return file.getvalue()


def rewritten(source: Path, target: Path, change: Callable[[str, bytes], dict[str, bytes] | None]) -> Path:
    """A copy with other parts; ``change`` takes a part's name and content."""
    with zipfile.ZipFile(source) as before, zipfile.ZipFile(target, "w") as after:
        for entry in before.infolist():
            root, _, name = entry.filename.partition("/")
            content = before.read(entry)
            for new, text in (change(name, content) or {name: content}).items():
                after.writestr(f"{root}/{new}", text)
    return target


def graph(edit: Callable[[dict, Path], None]) -> Callable:
    def change(name, content, mark):
        if name != "models/model.json":
            return None
        model = json.loads(content)
        edit(model, mark)
        return {name: json.dumps(model).encode()}

    return change


def expression(name, content, mark):
    if name != "models/model.json":
        return None
    assert SYMBOL in content
    return {name: content.replace(SYMBOL, CODE.replace("MARK", str(mark)).encode())}


def pickled_inputs(name, content, mark):
    return {name: evil(mark)} if name.endswith("sample_inputs/model.pt") else None


def pickled_weight(name, content, mark):
    if name.endswith("weights/weight_0"):
        return {name: evil(mark)}
    if name.endswith("weights_config.json"):
        config = json.loads(content)
        next(iter(config["config"].values()))["use_pickle"] = True
        return {name: json.dumps(config).encode()}
    return None


def pickled_constant(name, content, mark):
    if not name.endswith("constants_config.json"):
        return None
    meta = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    constant = {"data/constants/opaque_obj_0": pickle.dumps(Evil(mark))}
    return {name: json.dumps({"config": {"x": meta}}).encode()} | constant


def library(name, content, mark):
    return {name: content, "data/aotinductor/model/x.so": b"x"} if name == "archive_format" else None


def call_by_name(model, mark):
    node = model["graph_module"]["graph"]["nodes"][0]
    node["target"] = "torch.os.mkdir"
    node["inputs"] = [{"name": "", "arg": {"as_string": str(mark)}, "kind": 1}]


def import_by_name(model, mark):
    context = {"default_factory_module": "antigravity", "default_factory_name": "x", "dict_context": []}
    tree = {"type": "collections.defaultdict", "context": json.dumps(context), "children_spec": []}
    model["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = json.dumps([1, tree])


def guard(model, mark):
    model["guards_code"] = [f"{CODE.replace('MARK', str(mark))} is None"]


def name_of_input(name, content, mark):
    if name != "models/model.json":
        return None
    code = json.dumps(f"x={CODE.replace('MARK', str(mark))}").encode()
    return {name: content.replace(b'"x"', code)}


# What runs, and whether it runs in this version of PyTorch if the file is trusted.
HOSTILE = {
    "example inputs": (pickled_inputs, "holds a pickle of more than tensors", True),
    "weight": (pickled_weight, "holds a pickle of weights", True),
    "constant": (pickled_constant, "holds a part data/constants/opaque_obj_0", True),
    "library": (library, "holds a part data/aotinductor/model/x.so", False),
    "guard": (graph(guard), "guards, which are Python", True),
    "function": (graph(call_by_name), "holds 'torch.os.mkdir' as target", False),
    "arguments": (graph(import_by_name), "holds arguments of type collections.defaultdict", False),
    "expression": (expression, r"holds \"__import__\('os'\).* as expr_str", True),
    "name": (name_of_input, "as name", False),
}


@pytest.mark.parametrize(("change", "message", "runs"), HOSTILE.values(), ids=HOSTILE)
def test_nothing_runs(change, message, runs, own, tmp_path):
    mark, path = tmp_path / "made", tmp_path / "hostile.pt2"
    rewritten(own, path, lambda name, content: change(name, content, mark))
    with pytest.raises(UserError, match=rf"^{path} .*{message}.*give --trust-pickle if you trust its author$"):
        load_exported(path)
    assert not mark.exists()
    if runs:  # else the file would not show that anything was refused
        with suppress(UserError):  # what ran is no network
            load_exported(path, trust_pickle=True)(torch.zeros(1, 1, 8, 8))
        assert mark.exists()


def test_own_files_need_no_trust(own, images, tmp_path):
    refuse_code(own.read_bytes())
    same = rewritten(own, tmp_path / "same.pt2", lambda name, content: None)
    batch = torch.rand(2, 1, 8, 8)
    assert torch.equal(load_exported(same)(batch), load_exported(own, trust_pickle=True)(batch))


def test_the_command(own, images, tmp_path):
    path = tmp_path / "hostile.pt2"
    rewritten(own, path, lambda name, content: graph(guard)(name, content, tmp_path / "made"))
    assert "give --trust-pickle" in complaint_of("predict", path, images[0])
    assert not (tmp_path / "made").exists()
    assert images[0] in succeed("predict", path, images[0], "--as-json", "--trust-pickle").out
    assert (tmp_path / "made").exists()


def test_files_of_other_forms(own, tmp_path):
    """What PyTorch 2.7 wrote has its parts outside a folder, and is read in another way."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("version", "8.8")
        archive.writestr("serialized_example_inputs.pt", evil(tmp_path / "made"))
    with pytest.raises(CodeInFileError, match="parts that this version does not look into"):
        refuse_code(file.getvalue())


class Reshaped(torch.nn.Module):
    """Its graph has expressions in the batch, as windowed attention has."""

    def forward(self, x):
        n, c, h, w = x.shape
        return x.reshape(n * 4, c, h // 2, w // 2).transpose(1, 2).reshape(n, -1)


def test_expressions_of_shapes():
    program = torch.export.export(
        Reshaped(), (torch.zeros(2, 3, 8, 8),), dynamic_shapes=({0: Dim("batch", min=1)},), strict=False
    )
    for node in program.graph.nodes:  # as export does
        node.meta.pop("stack_trace", None)
    file = io.BytesIO()
    torch.export.save(program, file)
    assert b"Mul(" in file.getvalue()
    refuse_code(file.getvalue())
