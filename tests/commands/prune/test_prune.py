"""``cmpe-se prune`` on a real run: the run that it leaves, what else can be done with that, and its controls."""

import importlib
import json
import shutil

import pytest
import timm
import torch
from PIL import Image

from cmpe_se import inspect_gates, merge
from cmpe_se.commands.evaluate import evaluate
from cmpe_se.commands.export.export import export
from cmpe_se.commands.freeze import freeze
from cmpe_se.commands.predict import predict
from cmpe_se.commands.prune import prune
from cmpe_se.commands.prune.controls import Controls
from cmpe_se.commands.report.report import report
from cmpe_se.commands.train import train
from cmpe_se.errors import UserError
from cmpe_se.training.run_data import load_run_data
from cmpe_se.training.run_folder import RunFolder
from cmpe_se.utils.cost import count_multiply_adds
from tests.training.processes import complaint_of

pytestmark = pytest.mark.slow

pytest.importorskip("torch_pruning")
SETTINGS = {"target_macs": 0.6, "epochs": 1, "images": 300, "steps": 2}


@pytest.fixture(scope="module")
def pruned(folded, tmp_path_factory):
    """What the command returned, and the run that it made."""
    target = tmp_path_factory.mktemp("prune") / "pruned"
    return prune(str(folded), output=str(target), **SETTINGS), RunFolder(target)


def test_a_pruned_run_is_a_run(folded, pruned):
    found, run = pruned
    before = RunFolder(folded).read_result()
    result = run.read_result()
    assert found["multiply_adds"][0] == before["macs"]
    assert result["macs"] == found["multiply_adds"][-1] == count_multiply_adds(run.load_model(), (1, 8, 8))
    assert result["macs"] <= 0.6 * before["macs"]
    assert result["params"] == found["parameters"][-1] < before["params"]
    assert result["pruning"]["before"] == {
        "params": before["params"], "macs": before["macs"], "test_top1": found["top1"][0],
    }  # fmt: skip
    assert result["pruning"]["after"] == {"params": result["params"], "macs": result["macs"]}
    assert result["test_top1"] == found["test_top1"]
    assert found["top1"][0] == pytest.approx(before["test_top1"])
    assert len(found["top1"]) == len(found["multiply_adds"]) == 3
    config, parent = run.read_config(), RunFolder(folded).read_config()
    assert config.widths == found["widths"]
    assert (config.epochs, config.lr, config.model) == (1, pytest.approx(parent.lr / 10), parent.model)
    assert {(one["engine"], one["batch_size"]) for one in found["latency"]} >= {("eager", 1), ("eager", 8)}
    assert all(one["low"] <= one["ratio"] <= one["high"] for one in found["latency"])


def test_timm_builds_it_again(pruned):
    found, run = pruned
    config = json.loads((run.model / "config.json").read_text())
    assert config["architecture"] == "cmpe_se_pruned"
    assert config["model_args"]["widths"] == found["widths"]
    assert not list(run.path.rglob("*.pth"))
    model = timm.create_model(f"local-dir:{run.model}", pretrained=True).eval()
    data = load_run_data(run)
    images, labels = next(data.test_batches(batch_size=1000))
    top1 = 100 * (model(images).argmax(1) == labels).double().mean().item()
    assert top1 == pytest.approx(found["test_top1"])
    torch.testing.assert_close(merge(model)(images), model(images), rtol=1e-3, atol=1e-3)
    gone = [block["name"] for block in found["blocks"] if block["gone"]]
    assert len(inspect_gates(model, images[:2])) == 9 - len(gone)


@pytest.mark.long
def test_everything_else_takes_it(pruned, tmp_path):
    found, run = pruned
    assert evaluate(str(run.path))["test_top1"] == pytest.approx(found["test_top1"])
    shutil.copytree(run.path, tmp_path / "run")
    again = train(resume=tmp_path / "run", epochs=2)
    assert again["epochs"] == 2
    assert RunFolder(tmp_path / "run").read_result()["pruning"] == run.read_result()["pruning"]
    static = freeze(str(tmp_path / "run"), budget=100, epochs=1, images=300, output=str(tmp_path / "static"))
    assert RunFolder(tmp_path / "static").read_config().widths == found["widths"]
    assert static["static"]
    smaller = prune(
        str(tmp_path / "run"), **SETTINGS | {"target_macs": 0.8, "steps": 1}, output=str(tmp_path / "twice")
    )
    assert RunFolder(tmp_path / "twice").read_result()["macs"] == smaller["multiply_adds"][-1]
    started = train(pretrained=str(run.path), epochs=1, output=tmp_path / "started", view="folded_3x3")
    assert started["params"] == run.read_result()["params"]


@pytest.mark.long
def test_it_is_exported_and_predicts(pruned, tmp_path):
    _, run = pruned
    written = export(str(run.path), to="torch-export", output=str(tmp_path / "x.pt2"))
    Image.new("L", (8, 8), 128).save(tmp_path / "digit.png")
    answers = [predict(str(run.path), str(tmp_path / "digit.png")) for _ in range(2)]
    assert answers[0] == answers[1]
    assert written


@pytest.mark.long
def test_report_shows_what_was_pruned(pruned, tmp_path):
    found, run = pruned
    seen = report(str(run.path), output=str(tmp_path))["seen"]
    page = (tmp_path / "report.html").read_text()
    assert "What was pruned" in page
    for name in ("widths-over-depth", "accuracy-along-the-way", "worth-of-what-went"):
        assert name in seen
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    assert f"{found['top1'][0]:.2f}" in seen["accuracy-along-the-way"]
    widths = (tmp_path / "widths-over-depth.csv").read_text().splitlines()
    assert len(widths) == 1 + len(found["layers"])


def test_an_interrupted_one_goes_on(pruned, folded, tmp_path, monkeypatch):
    _, run = pruned
    shutil.copytree(run.path, tmp_path / "run")
    for name in ("config.yaml", "result.json", "metrics.jsonl", "gates.jsonl", "curves.png"):
        (tmp_path / "run" / name).unlink()
    for name in ("model", "state"):
        shutil.rmtree(tmp_path / "run" / name)
    module = importlib.import_module("cmpe_se.commands.prune.prune")
    monkeypatch.setattr(module, "_pruned", None)  # what has been pruned is not pruned again
    other = folded.parent / ".." / folded.parent.name / folded.name  # another spelling of the same path
    found = prune(str(other), output=str(tmp_path / "run"), **SETTINGS)
    assert found["test_top1"] == pytest.approx(pruned[0]["test_top1"])
    with pytest.raises(UserError, match=r"was pruned with target_macs 0.6, not 0.5; name another --output"):
        prune(str(folded), output=str(tmp_path / "run"), **SETTINGS | {"target_macs": 0.5})


@pytest.mark.long
def test_controls(pruned, folded, tmp_path):
    _, run = pruned
    shutil.copytree(run.path, tmp_path / "run")
    rows = prune(str(folded), output=str(tmp_path / "run"), controls=True, seeds=1, **SETTINGS)["controls"]
    labels = [row["model"] for row in rows]
    assert labels == [
        *(f"pruned by {criterion}" for criterion in ("gate", "l1", "random")),
        "whole, trained on",
        "same shape, from scratch",
        "thinner, from scratch",
    ]
    folder = tmp_path / "run" / "controls"
    own = RunFolder(folder / "same-shape-seed0")
    assert own.read_config().widths == run.read_config().widths
    assert own.read_config().pretrained is None
    assert own.read_config().lr == RunFolder(folded).read_config().lr
    assert RunFolder(folder / "random-seed0").read_config().widths != run.read_config().widths
    most = 0.6 * RunFolder(folded).read_result()["macs"]
    for row in rows:
        assert (row["macs"] <= most) is (row["model"] != "whole, trained on")
        assert row["seeds"] == 1
    assert RunFolder(folder / "whole-seed0").read_config().pretrained == str(folded)
    assert "thinner, from scratch" in (folder / "compare.md").read_text()
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(Controls, "_pruned_start", None)  # nothing is made twice
        again = prune(str(folded), output=str(tmp_path / "run"), controls=True, seeds=1, **SETTINGS)["controls"]
    assert again == rows


@pytest.mark.long
def test_plain_networks(tmp_path):
    train(model="preact_resnet20", epochs=1, output=tmp_path / "plain")
    found = prune(str(tmp_path / "plain"), target_macs=0.7, criterion="l1", epochs=1, images=100)
    assert found["run"] == str(tmp_path / "plain-pruned")
    assert RunFolder(tmp_path / "plain-pruned").read_result()["macs"] == found["multiply_adds"][-1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs 0, images 2000 and seeds 3 should be at least 1"),
        ({"target_macs": 0.001}, "target_macs 0.001 cannot be reached"),
        ({"criterion": "l2"}, "criterion is 'l2', should be one of"),
        ({"target_macs": 1.5}, "target_macs is 1.5, should be a part"),
    ],
)
def test_mistakes_leave_no_folder(folded, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        prune(str(folded), output=str(tmp_path / "new"), **settings)
    assert not (tmp_path / "new").exists()


def test_images_that_are_gone(folded, tmp_path):
    shutil.copytree(folded, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    text = config.read_text()
    changed = text.replace("data: digits", "data: folder").replace("data_dir: null", f"data_dir: {tmp_path / 'none'}")
    config.write_text("\n".join(line for line in changed.splitlines() if not line.startswith("# settings")) + "\n")
    with pytest.raises(UserError, match=r"pruning needs the run's images: .*; name their folder by --data-dir"):
        prune(str(tmp_path / "run"))


def test_no_finished_run():
    assert complaint_of("prune", "nowhere").startswith("cmpe-se: error: ")
