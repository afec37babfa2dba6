"""Fine-tuning: a trained network, converted, goes on from where it was."""

import json
import re
import shutil

import pytest
import timm
import torch

from cmpe_se import CompetitiveSE, conversion_report
from cmpe_se.data import load_data
from cmpe_se.errors import UserError
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.gate_settings import with_pretrained_gates, without_foreign_gates
from cmpe_se.training.network import create_network
from cmpe_se.training.optimisation import create_optimizer
from cmpe_se.training.run_folder import RunFolder
from tests.training.conftest import write_digits
from tests.training.processes import complaint_of, succeed
from tests.training.runs import assert_same_run, result, weights
from tests.training.test_processes import launch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base_run(digit_folder, tmp_path_factory):
    """A plain network of timm's, trained a little."""
    folder = tmp_path_factory.mktemp("base") / "run"
    flags = ["--model=test_resnet", "--epochs=2", "--batch-size=32", "--lr=0.05"]
    succeed("train", *flags, "--data=folder", "--data-dir", digit_folder, "--output", folder)
    return folder


def finetune(base_run, digit_folder, output, *flags):
    shared = [
        "--recipe=finetune",
        "--model=test_resnet",
        "--flip=false",
        "--data=folder",
        "--data-dir",
        digit_folder,
        "--batch-size=32",
    ]
    return succeed("train", *shared, "--pretrained", base_run, "--output", output, *flags)


@pytest.fixture(scope="module")
def finetuned(base_run, digit_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetuned") / "run"
    finetune(base_run, digit_folder, folder, "--epochs=2", "--checkpoint-steps=3")
    return folder


SOURCES = {"run": "", "folder": "model", "file": "model/model.safetensors"}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_it_starts_as_the_trained_network(source, base_run, digit_folder):
    data = load_data("folder", digit_folder)
    config = TrainingConfig(model="test_resnet", convert="folded_3x3", pretrained=str(base_run / source))
    model, _ = create_network(config, data)
    base = timm.create_model(f"local-dir:{base_run / 'model'}", pretrained=True).eval()
    images, _ = next(data.test_batches(batch_size=28))
    with torch.no_grad():
        assert torch.equal(model.eval()(images), base(images))


def test_another_number_of_classes(base_run, tmp_path):
    data = load_data("folder", write_digits(tmp_path / "data", {"train": 4, "test": 2}, digits=(5, 6, 7)))
    config = TrainingConfig(model="test_resnet", convert="folded_3x3", pretrained=str(base_run))
    model, _ = create_network(config, data)
    assert model.fc.out_features == 3
    assert torch.equal(model.layer1[0].conv1.weight, weights(base_run)["layer1.0.conv1.weight"])


def test_run(finetuned, tmp_path, digit_folder):
    figures = result(finetuned)
    assert (figures["model"], figures["view"]) == ("test_resnet", "folded_3x3")
    model = timm.create_model(f"local-dir:{finetuned / 'model'}", pretrained=True)
    assert len(conversion_report(model).gates) == 4
    assert all(module.fc2.weight.abs().sum() > 0 for module in model.modules() if isinstance(module, CompetitiveSE))
    succeed("evaluate", finetuned, "--output", tmp_path / "evaluation")
    found = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert found["test_top1"] == pytest.approx(figures["test_top1"])
    assert re.search(r"\d+\.\d %", succeed("predict", finetuned, digit_folder / "test" / "2" / "000.png").out)


@pytest.mark.long
def test_resumes_without_what_it_started_from(base_run, digit_folder, finetuned, tmp_path):
    base = shutil.copytree(base_run, tmp_path / "base")
    finetune(base, digit_folder, tmp_path / "run", "--epochs=1", "--checkpoint-steps=3")
    shutil.rmtree(base)
    succeed("train", "--resume", tmp_path / "run", "--epochs=2")
    assert result(tmp_path / "run")["epochs"] == 2


def test_learning_rates_of_groups(digit_folder):
    config = TrainingConfig(model="resnet18", convert="se", layer_decay=0.5, gate_lr=10.0, lr=0.1, schedule="constant")
    model, _ = create_network(config, load_data("folder", digit_folder))
    optimizer, schedule = create_optimizer(config, model, steps_per_epoch=5)
    schedule.step_update(0)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    assert rates[id(model.fc.weight)] == pytest.approx(0.1)
    block = model.layer2[1]
    assert rates[id(block.competition.fc2.weight)] == pytest.approx(10 * rates[id(block.conv2.weight)])
    assert rates[id(model.layer1[0].conv1.weight)] < rates[id(block.conv1.weight)] < 0.1


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_gates_come_along(source, cbam):
    config = TrainingConfig(model="preact_resnet20", view="timm_cbam", pretrained=str(cbam / source), mask=0)
    config = with_pretrained_gates(config, ())
    assert (config.start, config.reduction, config.min_hidden, config.bias) == ("one", 4, 6, False)
    data = load_data("digits")
    model, _ = create_network(config, data)
    images, _ = next(data.test_batches(batch_size=28))
    with torch.no_grad():
        assert torch.equal(model.eval()(images), RunFolder(cbam).load_model()(images))


OTHER_GATES = {
    "view": ({"view": "timm_se"}, "has gates of view timm_cbam, not timm_se; give --view timm_cbam"),
    "the name's view": ({"model": "se_preact_resnet20", "view": None}, "of view timm_cbam, not se; give --view"),
    "start": ({"start": "half"}, "has gates of start one, not half; give --start one"),
    "reduction": ({"reduction": 8}, "has gates of reduction 4, not 8; give --reduction 4"),
    "the default, given": ({"reduction": 16}, "has gates of reduction 4, not 16; give --reduction 4"),
    "bias": ({"bias": True}, "has gates of bias False, not True; give --bias False"),
}


@pytest.mark.parametrize(("settings", "sentence"), OTHER_GATES.values(), ids=OTHER_GATES)
def test_other_gates_than_the_pretrained_ones(settings, sentence, cbam):
    config = TrainingConfig(**{"model": "preact_resnet20", "view": "timm_cbam", "pretrained": str(cbam)} | settings)
    with pytest.raises(UserError, match=sentence):
        with_pretrained_gates(config, settings)


def test_gates_that_begin_where_the_pretrained_ones_did_unsaid(se, converted, tmp_path):
    ours = TrainingConfig(model="se_preact_resnet20", start="half", pretrained=str(se))
    assert with_pretrained_gates(ours, ["start"]) == ours
    other = TrainingConfig(model="test_resnet", convert="pair_view_1x1", start="one", pretrained=str(converted))
    assert with_pretrained_gates(other, ["start"]) == other
    with pytest.raises(UserError, match="has gates of start half, not one"):
        with_pretrained_gates(ours.changed(start="one"), ["start"])
    with pytest.raises(UserError, match="of view pair_view_1x1, not folded_3x3; give --convert pair_view_1x1"):
        with_pretrained_gates(other.changed(convert="folded_3x3"), ["convert"])
    (tmp_path / "config.json").write_text('{"architecture": "cmpe_se_resnet18", "model_args": {"num_classes": 10}}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    named = TrainingConfig(model="cmpe_se_resnet18", start="one", pretrained=str(tmp_path))
    assert with_pretrained_gates(named, ["start"]) == named  # converted networks begin at one
    with pytest.raises(UserError, match="has gates of start one, not half"):
        with_pretrained_gates(named.changed(start="half"), ["start"])


def test_what_a_recipe_says_of_gates_is_for_its_own_network(tmp_path):
    def gates(recipe, **settings):
        config = TrainingConfig.from_recipe(recipe, **settings)
        return without_foreign_gates(config, recipe, settings).gate_settings

    own = {"reduction": 2, "min_hidden": 8, "bias": True}
    assert gates("digits") == gates("digits", view="se") == own
    assert gates("digits", model="se_preact_resnet164") == gates("digits", model="preact_resnet20") == {}
    assert gates("digits", model="se_preact_resnet164", reduction=8) == {"reduction": 8}
    assert gates("digits", model="preact_resnet20", reduction=8) == {"reduction": 8}  # which then fails
    (tmp_path / "own.yaml").write_text("model: preact_resnet20\nview: se\nreduction: 4\n")
    assert gates(tmp_path / "own.yaml", model="se_preact_resnet164") == {"reduction": 4}
    assert gates(tmp_path / "own.yaml", model="resnet18", view=None) == {}


MISTAKES = {
    "nothing there": (["--pretrained", "nowhere"], "no weights at nowhere"),
    "no weights": (["--pretrained", "weights.txt"], r"no weights at /.*/weights\.txt; give .*\(\.safetensors, \.pth, "),
    "no state dict": (["--pretrained", "weights.bin"], r"weights\.bin cannot be read as a state dict of PyTorch"),
    "torn": (["--pretrained", "torn.safetensors"], "torn.safetensors cannot be read"),
    "another network's": (["--pretrained", "BASE", "--model", "resnet34"], "resnet34 cannot start from"),
    "unknown view": (["--convert", "folded"], "unknown convert 'folded'.*folded_3x3"),
    "view and convert": (["--convert", "se", "--view", "se"], "one of the two"),
    "no residual addition": (["--model", "vgg11", "--convert", "se"], "VGG has no residual addition"),
    "converted twice": (["--model", "cmpe_se_resnet18", "--convert", "se"], "has competition already"),
}


@pytest.mark.parametrize(("flags", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(flags, message, base_run, digit_folder, tmp_path):
    for name in ("weights.txt", "weights.bin"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "torn.safetensors").write_bytes(b"x" * 100)
    flags = [str(base_run) if flag == "BASE" else flag for flag in flags]
    model = [] if "--model" in flags else ["--model=resnet18"]
    complaint = complaint_of("train", *model, "--data=folder", "--data-dir", digit_folder, *flags, cwd=tmp_path)
    assert re.search(message, complaint), complaint
    assert not (tmp_path / "runs").exists()


@pytest.mark.long
def test_same_settings_same_weights(base_run, digit_folder, finetuned, tmp_path):
    finetune(base_run, digit_folder, tmp_path / "run", "--epochs=2")
    assert_same_run(finetuned, tmp_path / "run")


@pytest.mark.long
def test_two_processes(base_run, digit_folder, tmp_path):
    flags = ["--model=test_resnet", "--convert=folded_3x3", "--pretrained", base_run, "--epochs=1", "--batch-size=32"]
    done = launch("train", *flags, "--data=folder", "--data-dir", digit_folder, "--output", tmp_path / "run")
    assert done.status == 0, done.err
    assert result(tmp_path / "run")["processes"] == 2
    assert result(tmp_path / "run")["test_images"] == 28
