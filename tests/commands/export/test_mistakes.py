"""What cannot be exported, and what is no exported file: one line each, and nothing left behind."""

import importlib
import re
import resource
import shutil
import sys

import onnx
import pytest
import torch

from cmpe_se.commands.export import export, formats
from cmpe_se.errors import UserError
from cmpe_se.runtimes.exported import load_exported
from tests.commands.export.conftest import SUFFIXES
from tests.tiers import long_but
from tests.training.processes import complaint_of, run, succeed

command = importlib.import_module("cmpe_se.commands.export.export")  # the package's attribute is the function


@pytest.mark.slow
def test_command_writes_into_the_run(trained, images, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    done = succeed("export", "--int8", folder, "--calibration-images", "64")
    assert re.search(r"model\.onnx: onnx, merged, [\d,]+ bytes", done.out)
    assert re.search(r"batches of 1, 2, 3, 7: largest error \d\.\de-0\d", done.out)
    assert re.search(r"top-1 [\d.]+ % in float32, [\d.]+ % in int8", done.out)
    assert done.err == ""
    assert sorted(file.name for file in (folder / "export").iterdir()) == ["model.int8.onnx", "model.onnx"]
    assert "7 " in succeed("predict", folder / "export" / "model.onnx", images[3]).out


MISTAKES = {
    "format": (["--to=tflite"], "no format 'tflite'; there are onnx, torch-export, openvino"),
    "int8 elsewhere": (["--to=torch-export", "--int8"], "int8 is for onnx only, not for torch-export"),
    "suffix": (["--output=model.bin"], r"model\.bin should be named as files of onnx are, \*\.onnx"),
    "no images": (["--int8", "--calibration-images=0"], "calibration_images is 0"),
    "unwritable": (["--output=/proc/nowhere/model.onnx"], "cannot write /proc/nowhere/model.onnx"),
}


@pytest.mark.parametrize(("flags", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(flags, message, trained):
    assert re.search(message, complaint_of("export", trained, *flags))


def test_no_run(tmp_path):
    assert "is no run folder" in complaint_of("export", tmp_path)


def test_unfinished_run(trained, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(trained / "config.yaml", tmp_path / "run")
    assert "--resume" in complaint_of("export", tmp_path / "run")


def limit_files():
    """No file above 250 kB, a quarter of what is to be written: a full disk as far as a process can tell."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (250_000, 250_000))


@pytest.mark.long
@pytest.mark.parametrize("to", long_but(SUFFIXES, ["onnx"]))
def test_full_disk(to, plain, tmp_path):
    done = run("export", plain, "--to", to, "--output", tmp_path / f"m{SUFFIXES[to]}", before=limit_files)
    assert re.search(r"cannot write .*/m\.\w+: .*; make room", done.complaint)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("to", long_but(SUFFIXES, ["onnx"]))
def test_verification_finds_another_network(to, plain, tmp_path, monkeypatch):
    def write_another(network, path, to, **settings):
        network.head.fc.weight.data[3] *= 1.01
        formats.write(network, path, to, **settings)

    monkeypatch.setattr(command, "write", write_another)
    with pytest.raises(UserError, match="not the run's: it has an error of"):
        export(str(plain), to=to, output=str(tmp_path / f"m{SUFFIXES[to]}"))
    assert list(tmp_path.iterdir()) == []


def test_verification_finds_a_fixed_batch(plain, tmp_path, monkeypatch):
    def trace_fixed(network, input_size):
        return torch.export.export(network, (torch.zeros(2, *input_size),))

    monkeypatch.setattr(formats, "trace", trace_fixed)
    with pytest.raises(UserError, match="cannot run batches of 1"):
        export(str(plain), to="torch-export", output=str(tmp_path / "m.pt2"))
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_export_survives(plain, tmp_path, monkeypatch):
    (tmp_path / "m.pt2").write_bytes(b"earlier")
    monkeypatch.setattr(command, "verify", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(str(plain), to="torch-export", output=str(tmp_path / "m.pt2"))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"m.pt2": b"earlier"}


def _interrupt(*_):
    raise KeyboardInterrupt


def test_without_the_data(plain, tmp_path):
    folder = shutil.copytree(plain, tmp_path / "run")
    config = folder / "config.yaml"
    config.write_text(re.sub(r"^data: digits$", "data: cifar10", config.read_text(), flags=re.MULTILINE))
    assert export(str(folder), to="torch-export")["images"] == "random"
    assert "int8 needs the run's images" in complaint_of("export", folder, "--int8")


@pytest.mark.parametrize("to", SUFFIXES)
@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "openvino"])
def test_missing_package(to, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    needed = {"onnx": "onnx, onnxscript and onnxruntime", "openvino": "onnx, onnxscript and openvino"}.get(to, "")
    message = "no run folder"
    if package in needed.replace(",", "").split():
        message = rf"export to {to} needs {needed}; pip install 'cmpe-se\[export\]'"
    with pytest.raises(UserError, match=message):
        export("nowhere", to=to)


def test_missing_runtime(tmp_path, monkeypatch):
    (tmp_path / "m.onnx").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"running m\.onnx needs onnxruntime; pip install"):
        load_exported(tmp_path / "m.onnx")


@pytest.mark.parametrize("suffix", SUFFIXES.values())
@pytest.mark.parametrize("content", [b"", b"half of a file"])
def test_corrupt_file(suffix, content, tmp_path):
    (tmp_path / f"m{suffix}").write_bytes(content)
    with pytest.raises(UserError, match=rf"m\{suffix} cannot be read as .*; export the run again"):
        load_exported(tmp_path / f"m{suffix}")


def test_truncated_file(exported, tmp_path):
    whole = exported.path.read_bytes()
    (tmp_path / exported.path.name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read as"):
        load_exported(tmp_path / exported.path.name)


def test_file_of_another_program(onnx_export, tmp_path):
    model = onnx.load(onnx_export.path)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "m.onnx")
    program = torch.export.export(torch.nn.ReLU(), (torch.zeros(2, 3),))
    for node in program.graph.nodes:  # as export does; of other strings than names a file may have none
        node.meta.pop("stack_trace", None)
    torch.export.save(program, tmp_path / "m.pt2")
    for name in ("m.onnx", "m.pt2"):
        with pytest.raises(UserError, match=f"{name} does not say its label_names, input_size.* use a file that"):
            load_exported(tmp_path / name)


@pytest.mark.parametrize("to", SUFFIXES)
def test_predict_complains_in_one_line(to, images, tmp_path):
    path = tmp_path / f"m{SUFFIXES[to]}"
    assert re.search(r"there is no file .*m\.\w+; `cmpe-se export RUN` writes", complaint_of("predict", path, *images))
    path.write_bytes(b"half")
    assert "export the run again" in complaint_of("predict", path, *images)
