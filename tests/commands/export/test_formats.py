"""Exported files say what the run says, on real images and at every batch size."""

import json

import onnx
import pytest
import torch

import cmpe_se
from cmpe_se.commands.export import export
from cmpe_se.commands.predict import predict
from cmpe_se.data import load_data
from cmpe_se.errors import UserError
from cmpe_se.runtimes.exported import load_exported
from cmpe_se.training.run_folder import RunFolder

pytestmark = pytest.mark.slow


def probabilities(run, images, batch_size: int) -> torch.Tensor:
    """Of every class, by name: (images, 10)."""
    records = predict(str(run), images, top=10, batch_size=batch_size)
    rows = [{entry["class"]: entry["probability"] for entry in record["classes"]} for record in records]
    return torch.tensor([[row[str(digit)] for digit in range(10)] for row in rows])


@pytest.mark.parametrize("batch_size", [1, 5])
def test_predictions_are_the_run_s(batch_size, exported, trained, images):
    found = probabilities(exported.path, images, batch_size)
    torch.testing.assert_close(found, probabilities(trained, images, 64), atol=1e-5, rtol=1e-4)
    assert found.argmax(1).tolist() == [0, 3, 4, 7, 9]


def test_logits_are_the_run_s(exported, trained):
    batch, _ = next(load_data("digits").test_batches(batch_size=360))
    with torch.no_grad():
        expected = RunFolder.open(trained).load_model()(batch)
    torch.testing.assert_close(load_exported(exported.path)(batch), expected, atol=2e-4, rtol=1e-4)


def test_what_export_returns(exported):
    result = exported.result
    assert result["path"] == str(exported.path)
    assert (result["merged"], result["images"], result["batch_sizes"]) == (True, "test", [1, 2, 3, 7])
    assert 0 <= result["largest_error"] < 1e-5
    files = list(exported.path.parent.iterdir())
    assert {file.name for file in files} <= {exported.path.name, "model.bin"}  # and no drafts
    assert result["bytes"] == sum(file.stat().st_size for file in files)


def test_metadata(exported, trained):
    config = load_exported(exported.path).config
    # By way of JSON, as in the file.
    assert config == json.loads(json.dumps(RunFolder.open(trained).model_config())) | {
        "cmpe_se": cmpe_se.__version__,
        "merged": True,
    }
    assert config["label_names"] == list("0123456789")
    assert config["architecture"] == "cmpe_se_preact_resnet20"


def test_no_paths_of_this_machine(exported):
    for file in exported.path.parent.iterdir():
        assert b"site-packages" not in file.read_bytes(), file
        assert b"residual.py" not in file.read_bytes(), file


def test_onnx_in_the_file_itself(onnx_export):
    """Names and free dimensions as another program finds them."""
    onnx.checker.check_model(str(onnx_export.path), full_check=True)
    graph = onnx.load(onnx_export.path).graph
    shapes = {
        value.name: [dimension.dim_param or dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes == {"images": ["batch", 1, 8, 8], "logits": ["batch", 10]}


@pytest.mark.long
def test_unmerged(trained, unmerged, onnx_export, images):
    assert not unmerged.result["merged"]
    found = probabilities(unmerged.path, images, 5)
    torch.testing.assert_close(found, probabilities(trained, images, 64), atol=1e-5, rtol=1e-4)
    assert len(onnx.load(onnx_export.path).graph.node) < len(onnx.load(unmerged.path).graph.node)


def test_converted_network(converted, images, tmp_path):
    path = tmp_path / "m.onnx"
    assert export(str(converted), output=str(path))["images"] == "test"
    expected = probabilities(converted, images, 64)
    torch.testing.assert_close(probabilities(path, images, 5), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize(("kind", "merge"), [("static", False), ("static", True), ("cbam", False)])
def test_other_gates(kind, merge, images, tmp_path, request):
    run, path = request.getfixturevalue(kind), tmp_path / "m.onnx"
    result = export(str(run), output=str(path), merge=merge, int8=kind == "cbam", calibration_images=64)
    expected = probabilities(run, images, 64)
    torch.testing.assert_close(probabilities(path, images, 5), expected, atol=1e-5, rtol=1e-4)
    if "int8" in result:
        nodes = onnx.load(result["int8"]["path"]).graph.node
        convolutions = [node.input[1] for node in nodes if node.op_type == "Conv"]
        assert sum("attention" in weight for weight in convolutions) == 5 * 9  # as they are: gates stay float32
        assert result["int8"]["test_top1"] == pytest.approx(result["test_top1"], abs=5)


def test_converted_network_that_openvino_cannot_express(converted, tmp_path):
    """Its 2x2 pooling meets a 1x1 picture: images of 8x8 are small for a network with five strides."""
    with pytest.raises(UserError, match=r"cannot be exported to openvino: .*; try onnx or torch-export"):
        export(str(converted), to="openvino", output=str(tmp_path / "m.xml"))
    assert list(tmp_path.iterdir()) == []
