"""The networks that come with the package: what they are said to be, and commands without a run."""

import json
import os
import re
from pathlib import Path

import pytest
import timm
import torch

import cmpe_se
from cmpe_se import shipped
from cmpe_se.commands.evaluate import evaluate
from cmpe_se.commands.export import export
from cmpe_se.commands.predict import predict
from cmpe_se.errors import UserError
from cmpe_se.inspecting.tested import read_tested, save_tested
from cmpe_se.networks.registry import view_of
from cmpe_se.training.run_folder import RunFolder
from cmpe_se.utils.escaping import visible
from tests.photos import write_photos
from tests.tiers import long_but
from tests.training.processes import complaint_of, empty_folder, succeed
from tests.training.runs import weights

NAMES = shipped.shipped_names()
OFFLINE = {"HF_HUB_OFFLINE": "1", "HTTP_PROXY": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}


def test_the_first_one_is_the_one_that_commands_take():
    assert NAMES[0] == shipped.SHIPPED
    assert sorted(timm.list_models("*.cifar10*", pretrained=True)) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_what_timm_makes_is_the_run_s_network(name):
    network = timm.create_model(name, pretrained=True).eval()
    run = RunFolder.open(name).load_model()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(network(images), run(images))
    new = timm.create_model(name, pretrained=True, num_classes=7)
    assert new(images).shape == (3, 7)
    assert torch.equal(new.stages[0].blocks[0].conv1.weight, network.stages[0].blocks[0].conv1.weight)
    untrained = timm.create_model(name)
    assert {key: value.shape for key, value in untrained.state_dict().items()} == {
        key: value.shape for key, value in network.state_dict().items()
    }
    assert view_of(name) == getattr(network, "view", None)


def test_a_name_without_a_tag():
    """With weights it has those of its first tag; without it is as ever, and says nothing of a training."""
    base = shipped.SHIPPED.partition(".")[0]
    bare, tagged = (timm.create_model(name, pretrained=True) for name in (base, shipped.SHIPPED))
    assert all(torch.equal(a, b) for a, b in zip(bare.parameters(), tagged.parameters(), strict=True))
    without = timm.create_model(base, num_classes=100)
    assert without.stages[0].blocks[0].attention.fc1.out_features == 1  # the paper's
    assert not {"description", "label_names", "tag"} & set(
        without.pretrained_cfg.to_dict() if hasattr(without.pretrained_cfg, "to_dict") else without.pretrained_cfg
    )
    assert without.pretrained_cfg["mean"] == (0.4914, 0.4822, 0.4465)


@pytest.mark.parametrize("name", NAMES)
def test_its_files_say_what_it_is(name):
    run = RunFolder.open(name)
    config, result, said = run.read_config(), run.read_result(), shipped.timm_configs()[name]["trained"]
    tested = read_tested(run.tested)
    top1 = 100 * (tested.predicted == tested.labels).double().mean().item()
    assert said["test_top1"] == result["test_top1"] == pytest.approx(top1, abs=0.02)
    assert (said["test_images"], said["train_images"]) == (10_000, 50_000)
    assert said["epochs"] == config.epochs >= 30
    assert (said["seed"], said["recipe"]) == (config.seed, "config.yaml")
    assert re.fullmatch("[0-9a-f]{40}", said["commit"])
    description = timm.create_model(name, pretrained=True).pretrained_cfg["description"]
    assert f"test accuracy {top1:.2f} %" in description
    assert len(run.read_metrics()) == config.epochs
    for file in run.path.rglob("*"):
        if file.is_file():
            assert b"/root" not in (content := file.read_bytes()), file
            assert b"/home" not in content, file
            assert len(content) < 1.3 * 2**20, file


@pytest.mark.slow
@pytest.mark.parametrize("name", long_but(NAMES, [shipped.SHIPPED]))
def test_the_accuracy_is_that_of_real_images(name, cifar10_subset, tmp_path):
    """Of a tenth of the images, whose accuracy has a standard deviation of a point."""
    found = evaluate(name, data_dir=str(cifar10_subset), output=str(tmp_path))["test_top1"]
    assert found == pytest.approx(RunFolder.open(name).read_result()["test_top1"], abs=4)


@pytest.mark.parametrize("name", NAMES)
def test_what_was_tested_comes_back(name, tmp_path):
    before = read_tested(RunFolder.open(name).tested)
    save_tested(before, tmp_path / "again.safetensors")
    after = read_tested(tmp_path / "again.safetensors")
    assert torch.equal(before.predicted, after.predicted)
    for one, other in zip(before.blocks, after.blocks, strict=True):
        assert torch.equal(one.mean, other.mean)
        assert one.quantiles(0.1, 0.5) == other.quantiles(0.1, 0.5)
        assert (one.name, one.kinds, one.explained) == (other.name, other.kinds, other.explained)


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    folder = write_photos(tmp_path_factory.mktemp("photos"))
    return next(folder.rglob("*.jpg"))


@pytest.mark.slow
def test_predictions_without_a_run(photo):
    folder = empty_folder()
    alone = succeed("predict", photo, "--as-json", cwd=folder, env=OFFLINE)
    named = succeed("predict", photo, "--as-json", f"--run={shipped.SHIPPED}", cwd=folder)
    first = succeed("predict", "--run", shipped.SHIPPED, photo, "--as-json", cwd=folder)
    assert alone.out == named.out == first.out
    assert json.loads(alone.out)["classes"] == predict(shipped.SHIPPED, str(photo))[0]["classes"]
    assert "airplane, automobile, bird" in alone.err
    between = succeed("predict", shipped.SHIPPED, "--as-json", photo, cwd=folder)
    assert between.out == alone.out
    two = succeed("predict", photo, photo.parent, "--as-json", cwd=folder)
    assert [line.split('"probability"')[0] for line in two.out.splitlines()[:1]] == [
        alone.out.split('"probability"')[0]
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_network_that_is_named(name, photo):
    done = succeed("predict", name, photo, "--as-json", "--top=10")
    probabilities = {each["class"]: each["probability"] for each in json.loads(done.out)["classes"]}
    run = RunFolder.open(name)
    image = run.preprocessing().normalise(run.preprocessing().read(photo))
    with torch.inference_mode():
        expected = run.load_model()(image[None]).softmax(1)[0]
    assert list(map(probabilities.get, run.preprocessing().classes)) == pytest.approx(expected.tolist(), abs=1e-4)
    assert done.err == ""


@pytest.mark.long
def test_commands_without_a_run_write_into_runs():
    folder = empty_folder()
    succeed("export", cwd=folder, env=OFFLINE)
    report = succeed("report", cwd=folder, env=OFFLINE)
    made = folder / "runs" / shipped.SHIPPED
    assert (made / "export/model.onnx").exists()
    page = (made / "report/report.html").read_text()
    top1 = RunFolder.open(shipped.SHIPPED).read_result()["test_top1"]
    assert f"{top1:.2f} %" in page
    assert "Photograph of a temple" in page
    assert "Over 10,000 test images" in page
    assert (made / "report/class-differences.png").exists() or "do not differ between classes" in page
    assert "Hardest class" in report.out
    assert visible(str(Path(cmpe_se.__file__).parent)) not in report.out


@pytest.mark.long
def test_a_report_on_images_that_are_at_hand(cifar10_subset):
    folder = empty_folder()
    succeed("report", "--data-dir", cifar10_subset, cwd=folder)
    page = (folder / "runs" / shipped.SHIPPED / "report/report.html").read_text()
    assert "Test image" in page
    assert "Over 1,000 test images" in page


@pytest.mark.slow
@pytest.mark.parametrize("pretrained", long_but([shipped.SHIPPED, "timm"], ["timm"]))
def test_a_run_starts_from_one(pretrained):
    folder = empty_folder()
    done = succeed(
        *("train", "--epochs=1", "--pretrained", pretrained, "--output", "run", "--data=folder"),
        *("--data-dir", os.fspath(write_photos(empty_folder())), "--image-size=32", "--batch-size=4", "--workers=0"),
        cwd=folder,
    )
    assert "starts from" in done.err + done.out
    assert "classifier head.fc re-initialised" in done.err + done.out
    assert set(weights(folder / "run")) == set(timm.create_model(shipped.SHIPPED).state_dict())
    assert RunFolder.open(folder / "run").read_config().reduction == 4


@pytest.mark.long
def test_a_folder_of_its_name_that_holds_no_run():
    """Such as the one that reports are written into."""
    folder = empty_folder()
    (folder / shipped.SHIPPED / "report").mkdir(parents=True)
    done = succeed("export", shipped.SHIPPED, cwd=folder)
    assert f"runs/{shipped.SHIPPED}/export/model.onnx" in done.out


def test_words_that_are_no_images(folded, photo):
    run = empty_folder() / "runs" / "mine"
    run.parent.mkdir()
    run.symlink_to(folded)
    assert f"no images given for {run}" in complaint_of("predict", run)
    assert f"no images given for {NAMES[0]}" in complaint_of("predict", NAMES[0])
    assert "no images given for export/model.onnx" in complaint_of("predict", "export/model.onnx")
    assert f"{run.parent} is no run folder" in complaint_of("predict", run.parent, photo)
    assert f"{run.parent} is no run folder" in complaint_of("predict", "--run", run.parent, photo)
    assert f"{photo.parent} is no run folder" in complaint_of("predict", "--run", photo.parent, photo)
    assert "no image at nothing.png" in complaint_of("predict", "nothing.png")
    assert "no image at nothing.png" in complaint_of("predict", "nothing.png", photo)
    assert "nothing is no run folder" in complaint_of("predict", "nothing", photo)


def test_mistakes(folded):
    if "preact_resnet20.cifar10" in NAMES:
        assert "preact_resnet20.cifar10: PreActResNet has no gates" in complaint_of("report", "preact_resnet20.cifar10")
    assert f"the package brings {NAMES[0]}" in complaint_of("export", "preact_resnet20.cifar11")
    assert "cifar10-png does not exist" in complaint_of("evaluate")
    assert f"--pretrained {NAMES[0]} starts from it" in complaint_of("train", "--resume", NAMES[0])
    assert f"{NAMES[0]} names weights; give --model cmpe_se" in complaint_of("train", "--model", NAMES[0])
    assert f"two runs are named, {folded} and {NAMES[0]}" in complaint_of("export", folded, "--run", NAMES[0])
    assert "expected one argument" in complaint_of("evaluate", "--run")


def test_test_images_that_are_there_are_not_passed_over():
    """Other images in the folder that the run names are a fault, and no reason to take what is in the package."""
    folder = empty_folder()
    write_photos(folder / "cifar10-png")
    assert "classes" in complaint_of("report", cwd=folder)


def test_a_file_that_was_changed_is_refused(tmp_path):
    run = RunFolder.open(shipped.SHIPPED)
    content = bytearray(run.tested.read_bytes())
    content[-1] ^= 1
    (tmp_path / "tested.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="checksum differs; install the package again"):
        read_tested(tmp_path / "tested.safetensors")


@pytest.mark.slow
def test_exported_file_gives_the_same(tmp_path, photo):
    exported = export(output=str(tmp_path / "model.onnx"))
    assert exported["largest_error"] < 1e-4
    ours, theirs = (predict(run, str(photo))[0]["classes"] for run in (shipped.SHIPPED, exported["path"]))
    assert [each["class"] for each in ours] == [each["class"] for each in theirs]
