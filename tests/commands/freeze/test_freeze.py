"""``cmpe-se freeze`` on a real run: the choice, the run that it leaves, going on where it was interrupted."""

import json
import shutil

import pytest
import timm
import torch

import cmpe_se
from cmpe_se.commands.evaluate import evaluate
from cmpe_se.commands.freeze import freeze
from cmpe_se.commands.freeze.freeze import _images
from cmpe_se.data import load_data
from cmpe_se.errors import UserError
from cmpe_se.layers.attention import CompetitiveSE
from cmpe_se.training.run_data import load_run_data
from cmpe_se.training.run_folder import RunFolder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def frozen(folded, tmp_path_factory):
    """What the command returned, and the run that it made."""
    target = tmp_path_factory.mktemp("freeze") / "frozen"
    return freeze(str(folded), budget=0.0, epochs=1, images=700, output=str(target)), RunFolder(target)


def test_a_run_with_static_gates(folded, frozen):
    result, run = frozen
    views = {
        name.rpartition(".")[0]: module.view
        for name, module in run.load_model().named_modules()
        if isinstance(module, CompetitiveSE)
    }
    assert {name for name, view in views.items() if view == "static"} == set(result["static"])
    assert result["static"]
    config, before = run.read_config(), RunFolder(folded).read_config()
    assert config.static == result["static"]
    assert (config.epochs, config.lr) == (1, pytest.approx(before.lr / 10))
    changed = {
        "static",
        "pretrained",
        "epochs",
        "lr",
        "schedule",
        "min_lr",
        "warmup_epochs",
        "freeze_epochs",
        "patience",
        "progressive_resizing",
    }
    for name, value in vars(before).items():
        assert name in changed or name in ("reduction", "min_hidden", "bias") or getattr(config, name) == value, name
    assert run.read_result()["gates"] == {
        "folded_3x3": 9 - len(result["static"]),
        "static": len(result["static"]),
    }
    assert result["test_top1"] == run.read_result()["test_top1"]


def test_what_it_says_is_what_was_measured(folded, frozen):
    """Again from the files: the accuracies with no gate static, with the chosen ones, with all."""
    result, run = frozen
    data = load_run_data(RunFolder(folded))
    images, labels = next(data.test_batches(batch_size=data.test_size))
    network, start = RunFolder(folded).load_model(), RunFolder(run.path / "frozen").load_model()
    for model, measured in ((network, "dynamic"), (start, "frozen")):
        with torch.inference_mode():
            top1 = 100 * (model(images).argmax(1) == labels).double().mean().item()
        assert result[measured]["test_top1"] == pytest.approx(top1)
    within = [trial for trial in result["trials"] if trial["static"]]
    assert [trial["block"] for trial in within if trial["block"] not in result["static"]] == []
    assert len(within) == len(result["static"])
    assert within[-1]["top1"] == pytest.approx(result["frozen"]["choice_top1"])
    assert result["dynamic"]["choice_top1"] - result["frozen"]["choice_top1"] <= result["budget"]
    for trial in result["trials"]:
        assert trial["static"] == (result["dynamic"]["choice_top1"] - trial["top1"] <= result["budget"])
    effects = [trial["effect"] for trial in result["trials"]]
    assert effects == sorted(effects)
    written = json.loads((run.path / "freezing.json").read_text())
    assert written == {key: value for key, value in result.items() if key != "test_top1"} | {"run": str(folded)}


@pytest.mark.parametrize("most", [2, 100, 301, 5000])
def test_images_that_choose_calibrate_nothing(most):
    """Of a small set and of few images, too."""
    data = load_data("digits")
    calibrating, choosing, words = _images(data, 0.0, most)
    one, other = torch.cat(calibrating), torch.cat([images for images, _ in choosing])
    assert 0 < len(one) <= most
    assert 0 < len(other) <= most
    assert words == f"{len(other):,} training images, other than those of the means"
    # No two digits are alike.
    assert len({tuple(image.flatten().tolist()) for image in torch.cat((one, other))}) == len(one) + len(other)


def test_other_commands_take_the_run(frozen):
    result, run = frozen
    assert evaluate(str(run.path))["test_top1"] == pytest.approx(result["test_top1"])
    network = timm.create_model(f"local-dir:{run.model}", pretrained=True).eval()
    x = torch.randn(2, 1, 8, 8)
    with torch.inference_mode():
        assert torch.equal(network(x), run.load_model()(x))
        merged = cmpe_se.merge(network)
        torch.testing.assert_close(merged(x), network(x))
    assert sum(isinstance(module, CompetitiveSE) for module in merged.modules()) == 0


def test_the_same_command_goes_on(folded, frozen, tmp_path, capsys):
    """From the choice, and from the training; a finished one says its result again."""
    result, run = frozen
    half = tmp_path / "half"
    half.mkdir()
    shutil.copytree(run.path / "frozen", half / "frozen")
    shutil.copyfile(run.path / "freezing.json", half / "freezing.json")
    again = freeze(str(folded), budget=0.0, epochs=1, images=700, output=str(half))
    assert again["test_top1"] == result["test_top1"]
    before = (half / "model/model.safetensors").stat().st_mtime_ns
    assert freeze(str(folded), budget=0.0, epochs=1, images=700, output=str(half))["test_top1"] == again["test_top1"]
    assert (half / "model/model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"holds gates frozen with budget 0\.0, not 0\.4; name another --output"):
        freeze(str(folded), budget=0.4, epochs=1, images=700, output=str(half))


def test_a_run_that_has_static_gates_already(frozen, tmp_path):
    first, run = frozen
    again = freeze(str(run.path), budget=100.0, epochs=1, images=100, output=str(tmp_path / "all"))
    assert set(again["static"]).isdisjoint(first["static"])
    assert RunFolder(tmp_path / "all").read_result()["gates"] == {"static": 9}
    start = RunFolder(tmp_path / "all/frozen").load_model().state_dict()
    before = run.load_model().state_dict()
    for block in first["static"]:
        assert torch.equal(start[f"{block}.attention.fc2.bias"], before[f"{block}.attention.fc2.bias"])


def test_a_converted_network(converted, tmp_path):
    result = freeze(str(converted), budget=100.0, epochs=1, images=100, output=str(tmp_path / "all"))
    assert RunFolder(tmp_path / "all").read_result()["gates"] == {"static": 4}
    assert result["test_top1"] == pytest.approx(evaluate(str(tmp_path / "all"))["test_top1"])


def test_mistakes(folded, plain, static, cbam, tmp_path):
    for run, settings, words in (
        (tmp_path, {}, "is no run folder"),
        (plain, {}, "has no gate that depends on the image"),
        (static, {}, "has no gate that depends on the image"),
        (cbam, {}, "differs from position to position"),
        (folded, {"budget": -1.0}, "budget -1 should be at least 0"),
        (folded, {"epochs": 0}, "epochs 0 at least 1"),
        (folded, {"images": 1}, "images 1 at least 2"),
        (folded, {"output": str(folded)}, "holds a run already"),
    ):
        output = {"output": str(tmp_path / "new")} | settings
        with pytest.raises(UserError, match=words) as caught:
            freeze(str(run), **output)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_images_that_are_gone(folded, tmp_path):
    """Without images there is no calibration, and so no static gate."""
    run = tmp_path / "run"
    shutil.copytree(folded, run)
    config = (run / "config.yaml").read_text().replace("data: digits", "data: folder")
    (run / "config.yaml").write_text(config.replace("data_dir: null", "data_dir: /nowhere"))
    with pytest.raises(UserError, match="/nowhere"):
        freeze(str(run), output=str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
