"""Options of the loop do what they say."""

import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

from cmpe_se.data import LargeImages
from cmpe_se.data.plain import plain_training_batches
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.data_settings import without_foreign_test_size
from cmpe_se.training.optimisation import create_optimizer
from cmpe_se.training.run_data import load_run_data
from cmpe_se.training.run_folder import RunFolder
from tests.tiers import long_but
from tests.training.conftest import write_digits
from tests.training.processes import SHORT, SMALL, complaint_of, succeed, trained_run
from tests.training.runs import metrics, result, weights

pytestmark = pytest.mark.slow

OPTIONS = {
    "bfloat16": ["--precision", "bfloat16"],
    "contiguous": ["--channels-last", "false"],
    "clipping": ["--clip-grad", "0.5"],
    "mixup and cutmix": ["--mixup", "0.2", "--cutmix", "1", "--label-smoothing", "0.1"],
    "average": ["--ema", "0.9"],
    "adamw": ["--optimizer", "adamw", "--lr", "0.003"],
    "strikes back": [
        *("--optimizer=lamb", "--optimizer-args={eps: 1e-6}", "--lr=0.02", "--loss=bce", "--bce-threshold=0.2"),
        *("--mixup=0.1", "--cutmix=1", "--repeated-augmentation=3"),
    ],
    "parts": ["--accumulate", "4"],
    "wide": ["--model", "wrn16_4", "--epochs", "1", "--batch-size", "64"],
}


@pytest.mark.parametrize("option", long_but(OPTIONS, ["strikes back"]))
def test_learns(option):
    flags = OPTIONS[option]
    run = trained_run(*(SHORT if option != "wide" else ()), *flags)
    records = metrics(run)
    assert result(run)["test_top1"] > 30  # of ten classes
    assert all(math.isfinite(record["train_loss"]) for record in records)
    assert (records[0]["train_top1"] is None) == any("--mixup" in flag for flag in flags)


@pytest.mark.long
def test_memory_format_changes_little(short_run):
    run = trained_run(*SHORT, *OPTIONS["contiguous"])
    assert metrics(run)[0]["train_loss"] == pytest.approx(metrics(short_run)[0]["train_loss"], rel=0.02)


@pytest.mark.long
def test_compile(digit_folder, tmp_path):
    flags = ["--data", "folder", "--data-dir", digit_folder, "--epochs", "1", "--batch-size", "32", *SMALL]
    for name, compiled in (("plain", "false"), ("compiled", "true")):
        succeed("train", *flags, "--compile", compiled, "--output", tmp_path / name)
    first, second = (metrics(tmp_path / name)[0]["train_loss"] for name in ("plain", "compiled"))
    assert second == pytest.approx(first, rel=0.02)
    assert weights(tmp_path / "plain").keys() == weights(tmp_path / "compiled").keys()


def test_average_is_what_is_saved(everything_run):
    from tests.training.runs import assert_same_tensors, checkpoint

    assert_same_tensors(checkpoint(everything_run)["ema"], weights(everything_run))


def test_parts_of_a_batch_give_its_gradient():
    """Without batch norm's batch effect, accumulating is exact."""
    from cmpe_se import PreActResNet

    torch.manual_seed(0)
    model = PreActResNet(8, block="basic", view="folded_3x3").double().eval()
    images, labels = torch.randn(8, 3, 8, 8).double(), torch.randint(10, (8,))
    gradients = []
    for parts in (1, 4):
        model.zero_grad()
        for part, targets in zip(images.chunk(parts), labels.chunk(parts), strict=True):
            loss = torch.nn.functional.cross_entropy(model(part), targets)
            (loss * (len(part) / len(images))).backward()
        gradients.append(model.stem.conv.weight.grad.clone())
    torch.testing.assert_close(*gradients)


SCHEDULES = {
    "cosine": ({}, lambda step: 0.05 * (1 + math.cos(math.pi * step / 40))),
    "constant": ({"schedule": "constant"}, lambda step: 0.1),
    "multistep": (
        {"schedule": "multistep", "decay_milestones": [1, 3], "decay_rate": 0.1},
        lambda step: 0.1 * 0.1 ** ((step >= 9) + (step >= 29)),  # timm's convention: one update early
    ),
    "step": (
        {"schedule": "step", "decay_epochs": 2, "decay_rate": 0.5},
        lambda step: 0.1 * 0.5 ** (step // 20),
    ),
    "warmup": (
        {"schedule": "constant", "warmup_epochs": 2},
        lambda step: min(0.001 + 0.099 * step / 20, 0.1),
    ),
}


@pytest.mark.parametrize(("settings", "expected"), SCHEDULES.values(), ids=SCHEDULES)
def test_learning_rates(settings, expected):
    config = TrainingConfig(epochs=4, lr=0.1, **settings)
    optimizer, schedule = create_optimizer(config, torch.nn.Linear(2, 2), steps_per_epoch=10)
    for step in range(40):
        schedule.step_update(step)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected(step), rel=1e-6), step


def test_tensorboard(digit_folder, tmp_path):
    flags = ["--data", "folder", "--data-dir", digit_folder, "--epochs", "2", "--batch-size", "32", *SMALL]
    succeed("train", *flags, "--tensorboard", "true", "--output", tmp_path / "run")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    found = [event.value for event in events.Scalars("test_top1")]
    assert found == pytest.approx([record["test_top1"] for record in metrics(tmp_path / "run")])


@pytest.mark.long
def test_large_images_and_a_network_of_timm(tmp_path):
    data = write_digits(tmp_path / "data", {"train": 12, "val": 4}, side=128)
    flags = ["--data", "folder", "--data-dir", data, "--image-size", "128", "--batch-size", "16", "--epochs", "1"]
    flags += ["--model=test_resnet", "--crop-padding", "0", "--workers", "1", "--scale", "[0.5, 1.0]", "--flip"]
    succeed("train", *flags, "--output", tmp_path / "run")
    assert result(tmp_path / "run")["test_images"] == 16
    assert result(tmp_path / "run")["view"] is None
    succeed("evaluate", tmp_path / "run", "--output", tmp_path / "evaluation")
    image = data / "val" / "2" / "000.png"
    done = succeed("predict", tmp_path / "run", image)
    assert re.search(r"\d+\.\d %", done.out)


@pytest.mark.long
def test_a_test_at_another_size(tmp_path):
    """Trained at 40 pixels and tested at 64, uncropped; everything after training has the size of the tests."""
    data = write_digits(tmp_path / "data", {"train": 4, "val": 2}, side=128)
    flags = ["--data=folder", "--data-dir", data, "--batch-size=16", "--epochs=2", "--model=test_resnet", "--workers=0"]
    flags += ["--image-size=40", "--test-image-size=64", "--test-crop=1.0", "--crop-padding=0"]
    done = succeed("train", *flags, "--output", tmp_path / "run")
    assert "of 40x40 pixels (tested at 64x64)" in done.err
    config = RunFolder(tmp_path / "run")
    assert (config.preprocessing().size, config.preprocessing().crop) == ((3, 64, 64), 1.0)
    top1 = result(tmp_path / "run")["test_top1"]
    evaluated = succeed("evaluate", tmp_path / "run", "--output", tmp_path / "evaluation")
    assert f"{top1:.2f}" in evaluated.out
    images = load_run_data(config)
    assert isinstance(images, LargeImages)
    assert images.train_image_size == (40, 40)
    # What looks at training images looks at them as the network is used.
    assert next(plain_training_batches(images, 4, batch_size=4))[0].shape == (4, 3, 64, 64)
    # Longer at the same sizes goes on with them.
    succeed("train", "--resume", tmp_path / "run", "--epochs=3")
    assert load_run_data(config).train_image_size == (40, 40)
    assert config.preprocessing().size == (3, 64, 64)


def test_another_size_than_the_recipes_takes_its_test_along(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("image_size: 40\ntest_image_size: 64\n")
    config = TrainingConfig.from_recipe(recipe, image_size=48)
    assert without_foreign_test_size(config, {"image_size": 48}).test_image_size is None
    assert without_foreign_test_size(config, {"image_size": 48, "test_image_size": 64}).test_image_size == 64
    assert without_foreign_test_size(config, {"epochs": 3}).test_image_size == 64


def _truncate(data):
    path = next((data / "train" / "2").iterdir())
    path.write_bytes(path.read_bytes()[:60])
    return path.name


def _one_class(data):
    import shutil

    for part in ("train", "test"):
        for digit in "123":
            shutil.rmtree(data / part / digit)
    return "two"


FOLDER_MISTAKES = {"truncated image": _truncate, "one class": _one_class}


@pytest.mark.parametrize("spoil", FOLDER_MISTAKES.values(), ids=FOLDER_MISTAKES)
def test_folders_that_cannot_be_used(spoil, tmp_path):
    data = write_digits(tmp_path / "data", {"train": 4, "test": 2})
    message = spoil(data)
    complaint = complaint_of("train", "--data", "folder", "--data-dir", data, "--output", tmp_path / "run")
    assert message in complaint
    assert not (tmp_path / "run").exists()


def test_odd_images_are_converted(tmp_path):
    """Grey, palette, transparent and 16-bit files side by side in one class folder."""
    data = write_digits(tmp_path / "data", {"train": 8, "test": 2}, digits=(0, 1))
    folder = data / "train" / "0"
    grey = np.full((8, 8), 40000, np.uint16)
    Image.fromarray(grey).save(folder / "sixteen.png")
    Image.new("RGBA", (8, 8), (255, 0, 0, 128)).save(folder / "clear.png")
    Image.new("P", (8, 8), 3).save(folder / "palette.png")
    flags = ["--data", "folder", "--data-dir", data, "--epochs", "1", "--batch-size", "8", *SMALL]
    succeed("train", *flags, "--output", tmp_path / "run")
    assert result(tmp_path / "run")["train_images"] == 19
