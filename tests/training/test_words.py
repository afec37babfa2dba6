"""What ``train`` says on the terminal: what is trained where, how far it is, and what to do with it."""

import io
import json
from pathlib import Path

import pytest
import torch

from cmpe_se.commands.train import _SHOWN, _next_steps, _six_digits
from cmpe_se.data import load_data
from cmpe_se.training.config import TrainingConfig, recipe_names
from cmpe_se.training.progress import TrainingProgress, only_warmup, opening
from cmpe_se.utils.text import counted, shortened
from tests.training.processes import complaint_of, succeed
from tests.training.runs import result


def first_line(*, view=None, validation_images=0, **settings) -> str:
    config = TrainingConfig.from_recipe(**settings)
    rest = {"params": 12_345, "steps_per_epoch": 23, "device": torch.device("cpu"), "run": Path("runs/x")}
    return opening(config, load_data("digits"), view=view, validation_images=validation_images, **rest)


def test_the_first_line_says_all_that_matters():
    threads = counted(torch.get_num_threads(), "thread")
    assert first_line(model="resnet18", convert="folded_3x3", start="one", epochs=1) == (
        "resnet18 converted to folded_3x3, start one, reduction 2, min_hidden 8, bias (12,345 parameters) on digits: "
        "1,437 training images and 360 test images of 8x8 pixels, 1 epoch of 23 steps of 64 images on cpu "
        f"({threads}), run folder runs/x"
    )
    assert " with view folded_3x3, " in first_line(view="folded_3x3")
    assert first_line(model="resnet18", reduction=16, min_hidden=1, bias=False).startswith("resnet18 (12,345 ")
    assert " training images, 1 validation image and 360 test " in first_line(validation_images=1)
    assert " on flowers: " in first_line(data="folder", data_dir="/data/flowers")


@pytest.mark.parametrize(
    ("epochs", "warmup", "said"),
    [(1, 0, None), (2, 1, None), (1, 1, "over its first epoch, and epochs is 1"), (3, 5, "over its first 5 epochs")],
)
def test_a_run_that_is_all_warmup_says_so(epochs, warmup, said):
    sentence = only_warmup(TrainingConfig(epochs=epochs, warmup_epochs=warmup))
    assert (sentence is None) == (said is None)
    assert said is None or said in sentence


def test_recipes_are_more_than_their_warmup():
    assert [name for name in recipe_names() if only_warmup(TrainingConfig.from_recipe(name))] == []


def test_the_bar_counts_steps_of_the_epoch():
    progress = TrainingProgress(3, 66)
    progress.bar.disable = False
    progress.update(2, 30, 0.5, 90.0, 1000.0)
    shown = io.StringIO()
    progress.console.file = shown
    progress.console.width = 150
    progress.console.print(progress.bar.get_renderable())
    line = " ".join(shown.getvalue().split())
    assert line.startswith("epoch 2/3 step 8/22 1,000 images/s loss 0.500 top-1 90.0 % whole run")
    assert "45 %, left" in line


def test_numbers_have_six_digits_where_people_read_them(short_run, tmp_path):
    done = succeed("train", "--resume", short_run)
    shown = json.loads(done.out)
    assert tuple(shown) == _SHOWN
    exact = result(short_run)
    for name in ("test_top1", "test_loss", "train_seconds"):
        assert shown[name] == float(f"{exact[name]:.6g}")
        assert len(str(shown[name]).replace(".", "").lstrip("0")) <= 6
    assert exact["test_top1"] == pytest.approx(shown["test_top1"], rel=1e-5)
    assert done.err.splitlines()[-3:] == [
        f"next: cmpe-se report {short_run}  (a page on the run and the competition in its network)",
        f"next: cmpe-se explore {short_run}  (single images in the browser)",
        f"next: cmpe-se evaluate {short_run}  (accuracy by class, confusion matrix)",
    ]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(95.55555555555556, 95.5556), (100.0, 100.0), (1e-7 / 3, 3.33333e-8), (290873, 290873), ("a", "a")],
)
def test_six_digits(value, shown):
    assert _six_digits(value) == shown


def test_next_steps_can_be_typed():
    said = _next_steps({"run": "runs/my [x] run", "view": None})
    assert said.splitlines()[0].startswith("next: cmpe-se explore 'runs/my [x] run'  (")
    assert "report" not in said  # which is about gates
    assert "no run folder" in complaint_of("explore", "runs/my [x] run")


@pytest.mark.parametrize(
    ("number", "words"), [(0, "0 epochs"), (1, "1 epoch"), (2, "2 epochs"), (1437, "1,437 epochs")]
)
def test_counted(number, words):
    assert counted(number, "epoch") == words


def test_shortened():
    assert shortened("short") == "short"
    long = shortened("a" * 50 + "b" * 50)
    assert len(long) == 44
    assert long.startswith("aaa")
    assert long.endswith("bbb")
