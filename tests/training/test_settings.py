"""Recipes, flags, what wins, and what is refused."""

from dataclasses import asdict
from importlib.resources import files

import pytest
import timm
import yaml

from cmpe_se.errors import UserError
from cmpe_se.training.config import TrainingConfig, recipe_names
from tests.training.processes import complaint_of, succeed
from tests.training.runs import assert_same_run, metrics, result, weights

RECIPES = (
    *("cifar-fast", "cifar-paper", "cifar100-fast", "digits", "finetune"),
    *("imagenet", "imagenet-a2", "imagenet-a3", "imagenet-classic", "svhn"),
)


def test_recipe_names():
    assert recipe_names() == list(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_load(name):
    values = yaml.safe_load(files("cmpe_se.training.recipes").joinpath(f"{name}.yaml").read_text())
    config = asdict(TrainingConfig.from_recipe(name))
    defaults = asdict(TrainingConfig())
    assert config == defaults | values
    assert timm.is_model(config["model"])


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "digits"])
def test_recipes_reach_their_data(name, tmp_path):
    """They load as far as the images, which are not here."""
    complaint = complaint_of("train", "--recipe", name, "--data-dir", tmp_path / "nowhere", cwd=tmp_path)
    assert str(tmp_path / "nowhere") in complaint
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def recipe(tmp_path, digit_folder):
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"data: folder\ndata_dir: {digit_folder}\nepochs: 2\nbatch_size: 32\nlr: 1e-2\nweight_decay: 1e-3\n"
        "model: preact_resnet20\n"
    )
    return path


def test_flags_win_over_the_recipe_whatever_the_order(recipe, tmp_path):
    flags = ["--epochs", "1", "--batch-size=16"]
    succeed("train", *flags, "--recipe", recipe, "--output", tmp_path / "first")
    succeed("train", "--output", tmp_path / "last", "--recipe", recipe, "--epochs=1", "--batch_size", "16")
    for folder in (tmp_path / "first", tmp_path / "last"):
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert (config["epochs"], config["batch_size"]) == (1, 16)
        assert (config["lr"], config["weight_decay"], config["model"]) == (0.01, 0.001, "preact_resnet20")
        assert config["momentum"] == 0.9
        assert metrics(folder)[-1]["step"] == 10
    assert_same_run(tmp_path / "first", tmp_path / "last")


@pytest.mark.long
def test_names_of_runs(recipe, tmp_path):
    flags = ["--recipe", recipe, "--epochs=1", "--model=cmpe_se_preact_resnet20", "--view", "pair_view_1x1"]
    for _ in range(2):
        succeed("train", *flags, "--seed=3", cwd=tmp_path)
    first = tmp_path / "runs" / "cmpe_se_preact_resnet20-pair_view_1x1-folder-seed3"
    second = first.with_name(first.name + "-2")
    assert_same_run(first, second)
    assert result(first)["view"] == "pair_view_1x1"
    assert result(first)["seed"] == 3
    assert next(w for name, w in weights(first).items() if "map_conv" in name).shape[2:] == (1, 1)


@pytest.mark.long
def test_seeds_differ(recipe, tmp_path):
    for seed in (0, 1):
        succeed("train", "--recipe", recipe, "--epochs=1", "--seed", seed, "--output", tmp_path / str(seed))
    first, second = (weights(tmp_path / str(seed)) for seed in (0, 1))
    assert not any((first[name] == second[name]).all() for name in first if name.endswith("conv1.weight"))


def test_config_repeats_the_run(short_run, tmp_path):
    succeed("train", "--recipe", short_run / "config.yaml", "--output", tmp_path / "again")
    assert_same_run(short_run, tmp_path / "again")
    assert (tmp_path / "again" / "config.yaml").read_text() == (short_run / "config.yaml").read_text()


def test_every_field_comes_back_from_the_file(tmp_path):
    config = TrainingConfig(
        view="se", data_dir="5", epochs=3, scale=(0.5, 1.0), decay_milestones=[1, 2], lr=1e-5, ema=0.999, flip=True
    )
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert TrainingConfig.from_recipe(path) == config


WRONG_FLAGS = {
    "unknown setting": (["--bogus", "1"], "--bogus"),
    "near a setting": (["--batchsize", "1"], "--batchsize"),
    "stray word": (["digits"], "digits"),
    "no number": (["--epochs", "many"], "epochs.*int.*many"),
    "no integer": (["--epochs", "1.5"], "epochs.*int.*1.5"),
    "no truth value": (["--flip", "perhaps"], "flip.*bool.*perhaps"),
    "no value": (["--epochs"], "epochs"),
    "no recipe": (["--recipe", "cifar"], "no recipe 'cifar'.*cifar-fast, .*finetune, imagenet, .*path"),
    "recipe without a value": (["--recipe"], "--recipe"),
    "no epochs": (["--epochs", "0"], "epochs is 0.*at least 1"),
    "batch size": (["--batch-size", "0"], "batch_size is 0.*at least 1"),
    "parts": (["--accumulate", "3"], "batch_size 64.*accumulate=3"),
    "learning rate": (["--lr", "-0.1"], "lr is -0.1.*at least 0"),
    "seed": (["--seed", "-1"], "seed is -1.*at least 0"),
    "momentum": (["--momentum", "1"], "momentum is 1.0.*below 1"),
    "ema": (["--ema", "1"], "ema is 1.0.*below 1"),
    "precision": (["--precision", "float8"], "'float8'.*float32, bfloat16, float16"),
    "device": (["--device", "tpu"], "'tpu'.*auto, cpu"),
    "network": (["--model", "cmpe_resnet20"], "no network 'cmpe_resnet20'.*did you mean.*resnet20"),
    "network unlike any": (["--model", "zzz"], "no network 'zzz'.*cmpe-se models"),
    "view": (["--view", "folded"], "unknown view 'folded'.*folded_3x3"),
    "view of a network without": (["--model", "resnet18", "--view", "se"], "resnet18.*view"),
    "network for other sizes": (["--model", "vit_tiny_patch16_224"], r"cannot take images of \(1, 8, 8\).*224"),
    "network for larger images": (["--model", "inception_v3"], r"cannot take images of \(1, 8, 8\)"),
    "data": (["--data", "digit"], "no data set 'digit'.*did you mean digits"),
    "image size": (["--image-size", "32"], "image_size is 32.*digits has 8"),
    "optimizer": (["--optimizer", "sgdd"], "optimizer 'sgdd'"),
    "argument that no optimizer has": (["--optimizer-args", "{betta: 1}"], "optimizer 'sgd'.*betta"),
    "too few numbers": (["--optimizer=adamw", "--optimizer-args", "{betas: [0.9]}"], "optimizer 'adamw'"),
    "arguments that do not go together": (
        ["--optimizer=adamw", "--optimizer-args", "{fused: true, foreach: true}"],
        "optimizer 'adamw'.*fused",
    ),
    "argument that fails in a step": (["--optimizer-args", "{differentiable: true}"], "optimizer 'sgd'.*in-place"),
    "argument that is a setting": (["--optimizer-args", "{lr: 1}"], "optimizer_args holds lr.*--lr"),
    "argument that is no number": (["--optimizer-args", "{dampening: .nan}"], "optimizer_args.*finite"),
    "arguments that are none": (["--optimizer-args", "3"], "optimizer_args.*3"),
    "loss": (["--loss", "focal"], "unknown loss 'focal'.*cross_entropy, bce"),
    "threshold without its loss": (["--bce-threshold", "0.2"], "bce_threshold.*--loss bce"),
    "threshold": (["--loss", "bce", "--bce-threshold", "1"], "bce_threshold is 1.0.*below 1"),
    "batch size of no average": (["--ema-batch-size", "64"], "ema_batch_size.*--ema"),
    "copies": (["--repeated-augmentation", "0"], "repeated_augmentation is 0.*at least 1"),
    "sizes first for no epoch": (["--progressive-resizing", "{4: 0}"], "progressive_resizing is {4: 0}.*at least 1"),
    "sizes for all epochs": (
        ["--epochs=2", "--progressive-resizing={4: 2}"],
        "progressive_resizing has 2 epochs of 2.*--epochs 3",
    ),
    "no smaller size": (["--progressive-resizing", "{8: 1}"], "progressive_resizing has images of 8 pixels.*8x8"),
    "test size alone": (["--data=folder", "--test-image-size=64"], "test_image_size is 64.*--image-size"),
    "test size of small images": (["--image-size=8", "--test-image-size=16"], "test_image_size is 16.*digits"),
    "test crop of small images": (["--test-crop", "0.9"], "test_crop is 0.9.*digits"),
    "test crop": (["--test-crop", "0"], "test_crop is 0.0.*above 0"),
    "schedule": (["--schedule", "cosines"], "schedule 'cosines'"),
    "no schedule": (["--schedule", "none"], "schedule 'none'.*constant"),
    "schedule over epochs": (["--schedule", "plateau"], "schedule 'plateau'"),
    "augmentation of large images": (["--color-jitter", "0.4"], "color_jitter.*digits.*crop_padding, flip, .*cutout"),
    "negative augmentation": (["--cutout", "-1"], "cutout is -1"),
    "abbreviation": (["--recip", "cifar-paper"], "--recip"),
    "float16 on a CPU": (["--precision", "float16", "--device", "cpu"], "float16 needs an accelerator.*bfloat16"),
    "odd mixup": (["--mixup", "1", "--batch-size", "63"], "mixup.*63 images.*multiple of 2"),
    "norm over one value": (["--model=resnet18", "--accumulate=64"], r"resnet18 cannot train on 1 image.*--accumulate"),
    "output and resume": (["--resume", "x", "--output", "y"], "x is no run folder"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG_FLAGS.values(), ids=WRONG_FLAGS)
def test_wrong_flags(arguments, message, tmp_path):
    assert _matches(message, complaint_of("train", *arguments, cwd=tmp_path))
    if "norm" not in message and "1 image" not in message:
        assert not list(tmp_path.iterdir())  # no half-made run stands in the way of the next try


WRONG_RECIPES = {
    "unknown setting": ("epoch: 3", "setting epoch does not exist"),
    "no number": ("epochs: many", "epochs.*int.*many"),
    "no pair": ("scale: 3", "scale.*3"),
    "no mapping": ("- epochs", "epochs: 30"),
    "no YAML": ("epochs: [", "not YAML"),
    "out of range": ("epochs: -1", "epochs is -1.*at least 1"),
    "no text": (b"\xff\xfe\x00epochs", "cannot be read"),
}


@pytest.mark.parametrize(("text", "message"), WRONG_RECIPES.values(), ids=WRONG_RECIPES)
def test_wrong_recipes(text, message, tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    complaint = complaint_of("train", "--recipe", path, cwd=tmp_path)
    assert _matches(message, complaint)
    assert not (tmp_path / "runs").exists()
    with pytest.raises(UserError, match=message):
        TrainingConfig.from_recipe(path)


def test_wrong_settings_from_python():
    with pytest.raises(UserError, match="setting epoch does not exist"):
        TrainingConfig.from_recipe("digits", epoch=3)
    with pytest.raises(UserError, match="setting epoch does not exist"):
        TrainingConfig().changed(epoch=3)


def test_types_from_python():
    assert TrainingConfig.from_recipe("digits", epochs="2").epochs == 2
    with pytest.raises(UserError, match=r"epochs.*int.*1\.5"):
        TrainingConfig.from_recipe("digits", epochs=1.5)


def test_switches_need_no_value(recipe, tmp_path):
    succeed("train", "--recipe", recipe, "--epochs=1", "--flip", "--output", tmp_path / "run", "--compile", "false")
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["flip"], config["compile"]) == (True, False)


@pytest.mark.slow
def test_the_folder_is_kept_whole(digit_folder, tmp_path):
    """A run is understood from another working directory."""
    flags = ["--data=folder", "--epochs=1", "--data-dir", digit_folder.name, "--output", tmp_path / "run"]
    succeed("train", *flags, cwd=digit_folder.parent)
    succeed("evaluate", tmp_path / "run", "--output", tmp_path / "evaluation")


@pytest.mark.slow
def test_what_only_the_recipe_asks_for_is_left_out(digit_folder, tmp_path):
    flags = ["--data=folder", "--data-dir", digit_folder, "--image-size=100", "--epochs=1", "--model=test_resnet"]
    done = succeed("train", *flags, "--output", tmp_path / "run")
    assert "the recipe's crop_padding left out: folder is loaded as 100x100 images" in done.err
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["crop_padding"] == 0
    assert "crop_padding cannot be used" in complaint_of("train", *flags, "--crop-padding=2")


def test_output_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("mine")
    complaint = complaint_of("train", "--output", tmp_path / "file" / "run")
    assert str(tmp_path / "file" / "run") in complaint
    assert (tmp_path / "file").read_text() == "mine"


def _matches(pattern: str, text: str) -> bool:
    import re

    assert re.search(pattern, text), text
    return True
