"""``cmpe-se train`` without arguments, and the run folder that it leaves."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import cmpe_se
from cmpe_se.commands.predict import predict
from cmpe_se.data import load_data
from cmpe_se.training.config import TrainingConfig
from tests.training.conftest import write_digits
from tests.training.processes import default_run
from tests.training.runs import assert_same_tensors, checkpoint, metrics, result, weights

pytestmark = pytest.mark.slow  # a whole training


@pytest.fixture(scope="module")
def digits_run():
    """The run folder of ``cmpe-se train``."""
    return default_run()[0]


def test_accuracy(digits_run):
    assert result(digits_run)["test_top1"] >= 98.5
    assert result(digits_run)["test_top5"] == 100.0


def test_result(digits_run):
    found = result(digits_run)
    expected = {"model": "cmpe_se_preact_resnet20", "view": "folded_3x3", "data": "digits", "seed": 0, "epochs": 30}
    assert {name: found[name] for name in expected} == expected
    assert found["params"] == sum(p.numel() for p in _load(digits_run).parameters())
    assert found["macs"] == 2_565_036
    assert found["test_images"] == 360
    assert found["train_images"] == 1437
    assert 0 < found["test_loss"] < 0.2
    # A step drops the rest of an epoch: 22 batches of 64.
    assert found["images_per_second"] == pytest.approx(30 * 22 * 64 / found["train_seconds"], rel=1e-6)
    assert found["versions"]["torch"] == torch.__version__.split("+")[0]
    assert found["versions"]["cmpe_se"] == cmpe_se.__version__
    assert found["versions"]["torchvision"] == torchvision.__version__.split("+")[0]
    assert found["command"] == "cmpe-se train"
    commit = found["commit"]
    assert commit is None or len(commit.removesuffix("-dirty")) == 40


def test_all_gates_are_awake(digits_run):
    """What report and explore show to each newcomer moves with the image, in every block."""
    network, data = _load(digits_run), load_data("digits")
    images = torch.cat([images for images, _ in data.test_batches(batch_size=360)])
    for block in cmpe_se.inspect(network, images):
        assert block.gate.std(0).mean() > 0.002, block.name  # asleep, it was below 0.0005


def test_metrics_have_a_record_for_each_epoch(digits_run):
    records = metrics(digits_run)
    assert [record["epoch"] for record in records] == list(range(1, 31))
    assert [record["step"] for record in records] == [22 * epoch for epoch in range(1, 31)]
    for name in ("test_top1", "test_top5", "test_loss"):
        assert records[-1][name] == result(digits_run)[name]
    assert records[-1]["train_loss"] < 0.1 < records[0]["train_loss"]
    assert records[-1]["train_top1"] > 98
    for record, after in itertools.pairwise(records):
        assert record["lr"] > after["lr"]  # cosine, no warmup


def test_settings_are_the_recipe(digits_run):
    assert TrainingConfig.from_recipe(digits_run / "config.yaml") == TrainingConfig.from_recipe("digits")


def test_printed():
    _, done = default_run()
    folder = default_run()[0]
    shown = json.loads(done.out)
    assert shown["run"] == "runs/cmpe_se_preact_resnet20-digits-seed0"
    assert shown["test_top1"] == float(f"{result(folder)['test_top1']:.6g}")


def test_quiet_where_there_is_no_terminal():
    _, done = default_run()
    lines = done.err.splitlines()
    assert len(lines) == 1 + 30 + 3
    assert not {"\r", "\x1b", "\x08"} & set(done.err + done.out)
    assert all(line.startswith("epoch ") for line in lines[1:31])
    assert all(line.startswith("next: cmpe-se ") for line in lines[31:])


def test_curves(digits_run):
    with Image.open(digits_run / "curves.png") as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[0] > 300
    assert pixels.shape[1] > 800
    for colour in ((0x00, 0x72, 0xB2), (0x66, 0x66, 0x66)):  # the test's and the training's curve
        assert (pixels == colour).all(-1).sum() > 100


_FRESH = """
import sys
import numpy as np, timm, torch
import cmpe_se
from cmpe_se.data import load_data

model = timm.create_model("local-dir:" + sys.argv[1], pretrained=True).eval()
cfg, data = model.pretrained_cfg, load_data("digits")
images = np.stack([np.asarray(data.test_image(i)) for i in range(data.test_size)])[:, None] / 255
images = (torch.from_numpy(images).float() - cfg["mean"][0]) / cfg["std"][0]
labels = torch.cat([labels for _, labels in data.test_batches(batch_size=64)])
assert tuple(cfg["label_names"]) == data.classes
with torch.no_grad():
    print(100 * (model(images).argmax(1) == labels).double().mean().item())
"""


@pytest.mark.long
def test_model_loads_in_a_fresh_process(digits_run):
    command = [sys.executable, "-c", _FRESH, str(digits_run / "model")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(result(digits_run)["test_top1"], abs=1e-9)


def test_it_knows_digits_of_files(digits_run, tmp_path):
    """Ten of each, scaled up: nothing like the 8x8 arrays of training."""
    folder = write_digits(tmp_path, {"some": 10}, digits=range(10), side=32)
    records = predict(str(digits_run), str(folder))
    assert len(records) == 100
    assert sum(record["classes"][0]["class"] == record["image"].split("/")[-2] for record in records) >= 95


def test_model_is_the_last_state(digits_run):
    last = checkpoint(digits_run)
    assert (last["epoch"], last["batch"]) == (30, 0)
    assert_same_tensors(last["network"], weights(digits_run))
    assert all(tensor.is_contiguous() for tensor in weights(digits_run).values())


def test_only_what_belongs_there(digits_run):
    assert {path.name for path in digits_run.iterdir()} - {"evaluation"} == {
        *("config.yaml", "metrics.jsonl", "result.json", "curves.png", "model", "state", ".lock"),
        *("gates.jsonl", "progress.html"),
    }
    assert {path.name for path in (digits_run / "model").iterdir()} == {"config.json", "model.safetensors"}
    assert {path.name for path in (digits_run / "state").iterdir()} == {
        *("checkpoint.safetensors", "previous.safetensors")
    }


def _load(folder):
    import timm

    return timm.create_model(f"local-dir:{folder / 'model'}", pretrained=True)
