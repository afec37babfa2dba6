"""The command line: help, versions, the list of networks, and a progress bar on a terminal."""

import functools
import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import timm

import cmpe_se
from cmpe_se.cli import _as_parsed, _switches
from cmpe_se.commands import benchmark, compare, evaluate, explore, export, models, predict, push, train
from cmpe_se.training.config import TrainingConfig, recipe_names
from cmpe_se.utils.cost import count_multiply_adds, count_parameters
from cmpe_se_command import COMMANDS
from tests.training.processes import CONSOLE_SCRIPT, SHORT, complaint_of, empty_folder, shown_on_terminal, succeed


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command):
    text = succeed(command, "--help").out
    assert text.startswith(f"usage: cmpe-se {command} ")
    assert COMMANDS[command] in " ".join(text.split())
    assert not re.search(r"(^ +|\[|, )--\w*_", text, re.MULTILINE)  # flags have dashes, in the usage line too
    assert "``" not in text
    # Explanations are noun phrases or imperatives, and none is missing.
    for explained in re.findall(r"^ +(?:--\S+ \S+|\w+) {2,}(\S+.*)|^ +--\S+ .*\n {20,}(\S.*)", text, re.MULTILINE):
        assert not re.match(r"(of|in|not|the|from|to|with) |\(type", "".join(explained)), explained


def test_help_names_every_command():
    text = " ".join(succeed("--help").out.split())
    assert "usage: cmpe-se" in text
    for name, summary in COMMANDS.items():
        assert f"{name} {summary}" in text
        function = getattr(importlib.import_module(f"cmpe_se.commands.{name}"), name)
        assert function.__doc__.strip().splitlines()[0] == summary


def test_a_command_imports_no_other():
    """What takes seconds to import is for those who need it."""
    code = (
        "import sys; from cmpe_se_command import main; sys.argv = ['cmpe-se', 'train', '--help']\n"
        "try: main()\n"
        "except SystemExit: print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    imported = set(done.stderr.split())
    assert "cmpe_se.training.config" in imported
    others = {f"cmpe_se.commands.{name}" for name in COMMANDS if name != "train"}
    assert not imported & (others | {"sklearn", "torchmetrics", "matplotlib", "captum", "gradio"})


FLAGS = {  # command, and what is typed, to what is parsed
    ("train", "--flip --batch-size 8"): ["--flip=true", "--batch_size", "8"],
    ("train", "--batch-size=8 --flip"): ["--batch_size=8", "--flip=true"],
    ("train", "--flip false --tensorboard=true"): ["--flip", "false", "--tensorboard=true"],
    ("train", "--flip maybe"): ["--flip", "maybe"],  # a wrong value, not a word of its own
    ("train", "--data-dir my-data"): ["--data_dir", "my-data"],
    ("compare", "--dry-run --seeds 2"): ["--dry_run=true", "--seeds", "2"],
    ("compare", "--channels-last"): ["--channels_last=true"],
    ("predict", "--as-json run a.png"): ["--as_json=true", "--", "run", "a.png"],
    ("predict", "--as-json False run a.png"): ["--as_json", "False", "--", "run", "a.png"],
    ("predict", "run --top 3 a.png"): ["--top", "3", "--", "run", "a.png"],
    ("predict", "a.png --run run b.png --top=3"): ["--run", "run", "--top=3", "--", "a.png", "b.png"],
    ("predict", "a.png -- --odd.png"): ["--", "a.png", "--odd.png"],
    ("predict", "--help"): ["--help"],
    ("explore", "run other"): ["run", "other"],
    ("report", "--images a.png b.png --run run"): ["--images", "a.png", "b.png", "--run", "run"],
    ("evaluate", "--corruptions run"): ["--corruptions=true", "run"],
    ("predict", "--fail-fast run a.png"): ["--fail_fast=true", "--", "run", "a.png"],
    ("export", "--int8 run --merge false"): ["--int8=true", "run", "--merge", "false"],
    ("models", "--as-json"): ["--as_json=true"],
}


@pytest.mark.parametrize(("command", "typed"), FLAGS)
def test_flags_as_parsed(command, typed):
    function = getattr(importlib.import_module(f"cmpe_se.commands.{command}"), command)
    assert _as_parsed(function, typed.split()) == FLAGS[command, typed]


def test_switches_are_the_parameters_that_are_true_or_false():
    of_training = {"bias", "download", "flip", "channels_last", "compile", "tensorboard", "sync_batchnorm", "profile"}
    assert _switches(train.train) == of_training
    assert _switches(compare.compare) == of_training | {"corruptions", "dry_run", "plan", "ray"}
    assert _switches(evaluate.evaluate) == {"corruptions", "fail_fast", "real_labels"}
    assert _switches(predict.predict) == {"as_json", "fail_fast", "trust_pickle"}
    assert _switches(models.models) == {"as_json"}
    assert _switches(explore.explore) == set()
    assert _switches(export.export) == {"merge", "int8"}
    assert _switches(push.push) == {"private"}
    assert _switches(benchmark.benchmark) == {"bias", "merged", "channels_last"}


@pytest.mark.parametrize("arguments", [("--help",), ("-h",), ("--version",), ()])
def test_the_console_script_answers_without_pytorch(arguments, tmp_path):
    """A sitecustomize of the process, which runs before the script, has torch fail to be imported."""
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, sys\nsys.modules['torch'] = None\natexit.register(lambda: print(*sys.modules, file=sys.stderr))"
    )
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([CONSOLE_SCRIPT, *arguments], capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == 0, done.stderr
    assert ("cmpe-se" if arguments == ("--version",) else "usage: cmpe-se") in done.stdout
    imported = set(done.stderr.split())
    assert "cmpe_se_command" in imported
    assert not imported & {"cmpe_se", "timm", "numpy", "jsonargparse"}


@functools.cache
def help_of(*command: str) -> str:
    """What ``--help`` prints, its lines joined."""
    return " ".join(succeed(*command, "--help").out.split())


@pytest.mark.parametrize("command", ["train", "compare"])
def test_help_names_every_recipe(command):
    text = help_of(command)
    *others, last = recipe_names()
    assert f"({', '.join(others)} or {last})" in text


def test_help_says_how_to_start_several_processes():
    text = help_of("train")
    assert "torchrun --nproc-per-node 2 -m cmpe_se train" in text
    assert "accelerate launch --num_processes 2 -m cmpe_se train" in text


def test_help_explains_every_setting():
    text = help_of("train")
    for field in fields(TrainingConfig):
        assert f"--{field.name.replace('_', '-')}" in text, field.name
    assert "default: cmpe_se_preact_resnet20" in text


def test_help_shows_the_named_recipe():
    text = help_of("train", "--recipe", "cifar-paper")
    assert "default: 200" in text
    assert "default: cmpe_se_preact_resnet164" in text


def test_no_command_teaches():
    done = succeed()
    assert "train" in done.out


def test_version():
    assert cmpe_se.__version__ in succeed("--version").out


def test_unknown_command():
    assert complaint_of("trian") == "cmpe-se: there is no command 'trian'; did you mean train? (cmpe-se --help)"
    assert complaint_of("fly") == "cmpe-se: there is no command 'fly' (cmpe-se --help)"


def test_unknown_flag_of_a_command():
    complaint = complaint_of("train", "--epoch", "1")
    assert "--epoch" in complaint
    assert complaint.endswith("(cmpe-se train --help)")


def test_unknown_flag_before_the_command():
    assert complaint_of("--foo", "train", "--epochs=1") == "cmpe-se: unrecognized arguments: --foo (cmpe-se --help)"


def test_module_is_the_command():
    command = [sys.executable, "-m", "cmpe_se", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=empty_folder())
    assert cmpe_se.__version__ in done.stdout


def test_console_script_is_installed():
    done = subprocess.run([CONSOLE_SCRIPT, "--version"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, cmpe_se.__version__ in done.stdout) == (0, True)


def test_models():
    done = succeed("models", "--as-json", "true")
    records = {record["name"]: record for record in json.loads(done.out)}
    assert len(records) == 30
    assert records["preact_resnet164"]["params"] == 1_703_258
    assert records["cmpe_se_preact_resnet164"]["params"] == 1_956_644
    # By hand: 3x3 convolutions of preact_resnet20, its two projections and its classifier.
    stages = [(16, 16, 32), (16, 32, 16), (32, 64, 8)]
    macs = 9 * 3 * 16 * 32**2 + 64 * 10
    for inner, outer, side in stages:
        macs += (9 * inner * outer + 5 * 9 * outer**2 + (inner != outer) * inner * outer) * side**2
    assert records["preact_resnet20"]["macs"] == macs
    model = timm.create_model("se_wrn16_4")
    assert records["se_wrn16_4"]["params"] == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("view", ["folded_3x3", "static"])
def test_models_without_whole_networks(view):
    """It builds short networks and adds up: the figures are those of the deep ones."""
    records = {record["name"]: record for record in models.models(view=view, image_size=20, num_classes=7)}
    for name in ("preact_resnet56", "se_preact_resnet56b", "cmpe_se_preact_resnet56b", "cmpe_se_wrn22_10"):
        own = {"view": view} if name.startswith("cmpe_se_") else {}
        whole = timm.create_model(name, num_classes=7, device="meta", **own)
        assert records[name]["params"] == count_parameters(whole)
        assert records[name]["macs"] == count_multiply_adds(whole, (3, 20, 20))


@pytest.mark.long
def test_models_table():
    done = succeed("models", "--view", "pair_view_1x1")
    assert re.search(r"preact_resnet164 +1,703,258.*\+193,536.*\+290,682", done.out)
    assert "pair_view_1x1" in done.out


def test_models_mistake():
    assert "choose one of" in complaint_of("models", "--view", "folded")


def test_progress_bar_on_a_terminal(tmp_path):
    text = shown_on_terminal("train", *SHORT, "--output", tmp_path / "run")
    assert re.search(r"epoch 2/2 .*step \d+/22 .*images/s .*loss \d\.\d+ .*top-1 \d+\.\d %.*whole run.*left", text)
    assert re.search(r"epoch +2/2 +loss", text)  # the line that an epoch leaves


def test_snippets_use_what_exists():
    """Commands that the README shows parse: their flags and names exist."""
    text = (Path(__file__).parent.parent / "README.md").read_text()
    shown = re.findall(r"^cmpe-se (.*)$", text, flags=re.MULTILINE)
    assert len(shown) >= 4
    for line in shown:
        for flag in re.findall(r"--[a-z-]+", line):
            assert flag in help_of(line.split()[0]), line
