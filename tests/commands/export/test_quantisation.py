"""The int8 form: small, as good, and with gates in float32."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from torch.nn import Conv2d

from cmpe_se.commands.export import export
from cmpe_se.commands.export.images import training_batches
from cmpe_se.commands.predict import predict
from cmpe_se.data import Augmentation, load_data
from cmpe_se.runtimes.exported import load_exported
from cmpe_se.training.run_folder import RunFolder
from tests.training.runs import result

pytestmark = pytest.mark.slow


def test_smaller_and_as_good(quantised, trained):
    int8 = quantised.result["int8"]
    assert int8["path"] == str(quantised.path)
    assert int8["bytes"] == quantised.path.stat().st_size < 0.4 * quantised.result["bytes"]
    assert quantised.result["test_top1"] == pytest.approx(result(trained)["test_top1"], abs=0.3)
    assert int8["test_top1"] >= quantised.result["test_top1"] - 2


def test_accuracy_by_hand(quantised):
    network = load_exported(quantised.path)
    batches = load_data("digits").test_batches(batch_size=256)  # as export does: rounding makes ties of its own
    right = sum((network(batch).argmax(1) == labels).sum().item() for batch, labels in batches)
    assert quantised.result["int8"]["test_top1"] == pytest.approx(100 * right / 360)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_predict(batch_size, quantised, images):
    records = predict(str(quantised.path), images, batch_size=batch_size)
    assert [record["classes"][0]["class"] for record in records] == list("03479")


def test_gates_stay_float(quantised, trained):
    graph = onnx.load(quantised.path).graph
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    gates = [array.dtype for name, array in weights.items() if ".attention." in name]
    assert gates
    assert set(gates) == {np.dtype(np.float32)}
    eight_bits = {name for name, array in weights.items() if array.dtype == np.int8 and array.ndim > 1}
    convs = {name for name, module in RunFolder.open(trained).load_model().named_modules() if type(module) is Conv2d}
    assert eight_bits == {f"{name}.weight_quantized" for name in convs | {"head.fc"} if ".attention." not in name}


def test_calibration_images_are_not_augmented():
    data = load_data("digits")
    batches = list(training_batches(data, 100))
    assert [len(batch) for batch in batches] == [32, 32, 32, 4]
    whole, _ = next(data.train_batches(0, batch_size=data.train_size, seed=1, augmentation=Augmentation()))
    known = {image.numpy().tobytes() for image in whole}
    assert all(image.numpy().tobytes() in known for batch in batches for image in batch)


def test_converted_network(converted, tmp_path):
    made = export(str(converted), output=str(tmp_path / "m.onnx"), int8=True)
    assert made["int8"]["test_top1"] >= made["test_top1"] - 2
