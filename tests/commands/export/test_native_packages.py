"""AOTInductor packages: told apart by content, opened only when trusted, and on the right kind of machine."""

import json
import platform
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from torch._inductor import config as inductor

from cmpe_se.commands.export import export, formats
from cmpe_se.data import load_data
from cmpe_se.errors import UserError
from cmpe_se.runtimes import native_packages
from cmpe_se.runtimes.exported import format_by_name, is_exported, load_exported
from cmpe_se.runtimes.native_packages import is_native, require_compiler
from cmpe_se.training.run_folder import RunFolder
from tests.commands.export.conftest import Export, _export
from tests.commands.export.test_archives import rewritten
from tests.training.processes import complaint_of, succeed

HERE = f"{platform.system()} {platform.machine()}"


@pytest.fixture(scope="session")
def package(trained) -> Export:
    """The trained run, compiled, which takes a minute."""
    return _export(trained, "aoti")


def archive(path: Path, **parts: str) -> Path:
    """A package with parts that nothing should open; two underscores for a slash, one before the suffix for a dot."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("model/data/aotinductor/model/x.so", b"no library")
        for name, content in parts.items():
            file.writestr(f"model/{name.replace('__', '/')}", content)
    return path


def made_for(path: Path, **changes) -> Path:
    """A package for this machine, but for what is changed."""
    settings = {**native_packages._this_machine(), "input_size": [1, 8, 8]} | changes
    return archive(path, extra__made_for=json.dumps(settings))


@pytest.mark.long
def test_logits_are_the_run_s(package, trained):
    batch, _ = next(load_data("digits").test_batches(batch_size=360))
    with torch.no_grad():
        expected = RunFolder.open(trained).load_model()(batch)
    network = load_exported(package.path, trust_pickle=True)
    for images in (batch, batch[:1], batch.expand(-1, 1, 8, 8).to(memory_format=torch.channels_last)):
        torch.testing.assert_close(network(images), expected[: len(images)], atol=2e-4, rtol=1e-4)


@pytest.mark.long
def test_other_layouts_and_shapes(package):
    """The library itself checks neither, and would read memory that is not the images'."""
    network = load_exported(package.path, trust_pickle=True)
    images = torch.rand(3, 1, 8, 8)
    turned = images.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(network(turned), network(images))
    for wrong in (images[:, :, :4], images.double(), images[0], images[:0]):
        with pytest.raises(ValueError, match=r"images should be float32 \(N, 1, 8, 8\), got torch.float"):
            network(wrong)


@pytest.mark.long
def test_threads_are_those_of_the_process(package):
    network = load_exported(package.path, trust_pickle=True)
    images, before, results = torch.rand(64, 1, 8, 8), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(network(images))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(*results)


@pytest.mark.long
def test_what_export_returns(package, trained):
    result = package.result
    assert (result["format"], result["merged"], result["batch_sizes"]) == ("aoti", True, [1, 2, 3, 7])
    assert 0 <= result["largest_error"] < 1e-5
    assert result["bytes"] == package.path.stat().st_size
    assert [file.name for file in package.path.parent.iterdir()] == ["model.aoti.pt2"]
    opened = load_exported(package.path, trust_pickle=True)
    assert opened.config["architecture"] == "cmpe_se_preact_resnet20"
    assert opened.preprocessing == RunFolder.open(trained).preprocessing()


@pytest.mark.long
def test_no_source_and_no_paths_of_this_machine(package):
    with zipfile.ZipFile(package.path) as file:
        assert not [name for name in file.namelist() if name.endswith(".cpp")]
        for name in file.namelist():
            for trace in (b"site-packages", b"residual.py", b"torchinductor_"):
                assert trace not in file.read(name), (name, trace)


@pytest.mark.long
def test_predict_opens_it_when_trusted_alone(package, images):
    refusal = complaint_of("predict", package.path, *images)
    assert "model.aoti.pt2 is a compiled package (aoti): opening it runs its native code" in refusal
    assert refusal.endswith("give --trust-pickle if you trust its author")
    records = map(json.loads, succeed("predict", package.path, *images, "--as-json", "--trust-pickle").out.splitlines())
    assert [record["classes"][0]["class"] for record in records] == ["0", "3", "4", "7", "9"]


@pytest.mark.long
def test_name_does_not_decide(package, trained, tmp_path):
    renamed = shutil.copy(package.path, tmp_path / "m.pt2")
    with pytest.raises(UserError, match=r"m\.pt2 is a compiled package"):
        load_exported(renamed)
    batch = torch.rand(2, 1, 8, 8)
    expected = load_exported(package.path, trust_pickle=True)(batch)
    assert torch.equal(load_exported(renamed, trust_pickle=True)(batch), expected)
    graph = shutil.copy(_export(trained, "torch-export").path, tmp_path / "m.aoti.pt2")
    torch.testing.assert_close(load_exported(graph)(batch), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.long
def test_damaged_package(package, tmp_path):
    whole = package.path.read_bytes()
    (tmp_path / "half.aoti.pt2").write_bytes(whole[: len(whole) // 2])
    unmarked = rewritten(
        package.path,
        tmp_path / "unmarked.aoti.pt2",
        lambda name, content: {"extra/other": b""} if name == "extra/made_for" else None,
    )
    for path in (tmp_path / "half.aoti.pt2", unmarked):
        with pytest.raises(UserError, match=r"cannot be read as .*; export the run again"):
            load_exported(path, trust_pickle=True)


def test_names():
    assert format_by_name("a/model.aoti.pt2") == "aoti"
    assert format_by_name("MODEL.PT2") == "torch-export"
    assert format_by_name("model.aoti") is None
    assert is_exported("model.aoti.pt2")


@pytest.mark.parametrize(
    ("to", "output", "named"),
    [("aoti", "m.pt2", r"\*\.aoti\.pt2"), ("torch-export", "m.aoti.pt2", r"\*\.pt2"), ("aoti", "m.so", r"\*\.aoti")],
)
def test_output_is_named_as_its_format(to, output, named, tmp_path):
    with pytest.raises(UserError, match=rf"{output} should be named as files of {to} are, {named}"):
        export(str(tmp_path), to=to, output=output)


def test_int8_is_refused(tmp_path):
    with pytest.raises(UserError, match="int8 is for onnx only, not for aoti"):
        export(str(tmp_path), to="aoti", int8=True)


def test_stranger_s_package_is_not_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda *_: pytest.fail("was opened"))
    for name in ("m.pt2", "m.aoti.pt2"):
        assert is_native(archive(tmp_path / name).read_bytes())
        with pytest.raises(UserError, match=r"is a compiled package.*give --trust-pickle if you trust its author$"):
            load_exported(tmp_path / name)


FOREIGN = {
    "another system": ({"system": "Plan9 vax"}, rf"compiled for Plan9 vax, and this machine is {HERE}"),
    "more instructions": ({"instructions": ["avx1024_f"]}, "compiled for a processor with avx1024_f, which this one"),
}


@pytest.mark.parametrize(("change", "message"), FOREIGN.values(), ids=FOREIGN)
def test_package_for_another_machine_is_not_opened(change, message, tmp_path, monkeypatch):
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda *_: pytest.fail("was opened"))
    path = made_for(tmp_path / "m.aoti.pt2", **change)
    with pytest.raises(UserError, match=rf"cannot be read as aoti \(it was {message}.*export the run again$"):
        load_exported(path, trust_pickle=True)


def test_package_of_another_program(tmp_path):
    with pytest.raises(UserError, match=r"\(it does not say which machine it was compiled for\); export the run again"):
        load_exported(archive(tmp_path / "m.aoti.pt2"), trust_pickle=True)


def test_no_library_inside(tmp_path):
    with pytest.raises(UserError, match=r"m\.aoti\.pt2 cannot be read as aoti .*; export the run again"):
        load_exported(made_for(tmp_path / "m.aoti.pt2"), trust_pickle=True)


@pytest.mark.parametrize("compiler", ["nowhere/c++", "/etc/hostname", "false"])
def test_missing_compiler(compiler):
    message = r"^export to aoti needs a C\+\+ compiler, and none was found; install g\+\+, or set CXX"
    with inductor.patch("cpp.cxx", (compiler,)), pytest.raises(UserError, match=message):
        export("nowhere", to="aoti")


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a compiler")
def test_compiler_is_found():
    require_compiler()


@pytest.mark.long
def test_failing_compiler(plain, tmp_path):
    """It is there, and says no at the first file."""
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *--version*) exec g++ "$@";; esac\necho no room >&2\nexit 1\n')
    compiler.chmod(0o755)
    message = "PreActResNet cannot be exported to aoti: .*; try onnx or torch-export or openvino$"
    with inductor.patch("cpp.cxx", (str(compiler),)), pytest.raises(UserError, match=message):
        export(str(plain), to="aoti", output=str(tmp_path / "out" / "m.aoti.pt2"))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.long
def test_verification_finds_another_network(plain, tmp_path, monkeypatch):
    def compile_another(program):
        program.state_dict["head.fc.weight"][3] *= 1.01
        return native_packages.compile_package(program)

    monkeypatch.setattr(formats, "compile_package", compile_another)
    with pytest.raises(UserError, match="not the run's: it has an error of"):
        export(str(plain), to="aoti", output=str(tmp_path / "m.aoti.pt2"))
    assert list(tmp_path.iterdir()) == []
