"""What ``import cmpe_se`` gives, and what it says where an extra is missing."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cmpe_se
from cmpe_se.errors import MissingPackageError, UserError
from cmpe_se.utils.packages import _TRAIN, EXTRAS
from cmpe_se_command import COMMANDS

ROOT = Path(__file__).parent.parent
WITHOUT_TRAIN = f"import sys; sys.modules |= dict.fromkeys({list(_TRAIN)})\n"
ALL_OF_TRAIN = "accelerate, docstring-parser, jsonargparse, matplotlib, rich, scipy, scikit-learn and torchmetrics"


def python(code: str) -> subprocess.CompletedProcess:
    """Run code in a process in which none of the packages of the extra ``train`` can be imported."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WITHOUT_TRAIN + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)


@pytest.mark.parametrize("name", ["train", "evaluate", "predict", "compare", "export"])
def test_commands_are_functions_at_the_top(name):
    assert getattr(cmpe_se, name) is getattr(importlib.import_module(f"cmpe_se.commands.{name}"), name)
    assert name in dir(cmpe_se)


def test_what_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'cmpe_se' has no attribute 'fly'"):
        _ = cmpe_se.fly
    assert not hasattr(cmpe_se, "fly")


def test_inspect_is_the_earlier_name_of_inspect_gates():
    assert cmpe_se.inspect is cmpe_se.inspect_gates
    assert cmpe_se.inspecting.inspect is cmpe_se.inspect_gates
    assert cmpe_se.inspect_gates.__name__ == "inspect_gates"


def test_gates_can_be_forced_from_the_top():
    assert cmpe_se.forced_gates is cmpe_se.inspecting.forced_gates


@pytest.mark.slow
def test_the_library_needs_no_extra():
    done = python(
        """
import timm, torch, cmpe_se
from cmpe_se.inspecting import gathering, statistics
model = cmpe_se.convert(timm.create_model("resnet18", num_classes=3))
images = torch.randn(2, 3, 32, 32)
merged = cmpe_se.merge(model.eval())
torch.testing.assert_close(merged(images), model(images), atol=1e-4, rtol=1e-4)
print(len(cmpe_se.inspect_gates(model, images)), len(list(cmpe_se.conversion_report(model).gates)))
with cmpe_se.forced_gates(model, "layer1.0", 0.5):
    model(images)
network = timm.create_model("cmpe_se_preact_resnet20", num_classes=10)
print(network(images).shape)
print(cmpe_se.CompetitiveSE(64), cmpe_se.reference.load_reference_parameters)
from cmpe_se import *
print(sorted({"train", "evaluate", "predict", "compare", "export"} & set(dir(cmpe_se))))
"""
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("8 8\ntorch.Size([2, 10])\n")
    assert done.stdout.endswith("\n[]\n")


def test_the_first_use_of_a_command_says_which_extra_is_missing():
    done = python(
        """
import cmpe_se
for name in ("train", "evaluate", "predict", "compare", "export"):
    try:
        getattr(cmpe_se, name)
    except ImportError as error:
        print(error)
for module in ("cmpe_se.training", "cmpe_se.commands.evaluate"):
    try:
        __import__(module)
    except ImportError as error:
        print(error)
"""
    )
    names = [
        "cmpe_se." + name for name in ("train", "evaluate", "predict", "compare", "export", "training", "commands")
    ]
    assert done.stdout.splitlines() == [
        f"{name} needs {ALL_OF_TRAIN}; pip install 'cmpe-se[{'export' if name == 'cmpe_se.export' else 'train'}]'"
        for name in names
    ]


@pytest.mark.long
def test_each_command_says_which_extra_is_missing():
    done = python(
        f"""
from cmpe_se_command import main
print([main([name, "--help"]) for name in {list(COMMANDS)}])
"""
    )
    assert done.stdout == f"{[1] * len(COMMANDS)}\n"
    assert done.stderr.splitlines() == [
        f"cmpe-se: cmpe-se {name} needs {ALL_OF_TRAIN}; pip install 'cmpe-se[{EXTRAS.get(name, 'train')}]'"
        for name in COMMANDS
    ]


@pytest.mark.long
def test_only_what_is_missing_is_named():
    command = [
        sys.executable,
        "-c",
        "import sys; sys.modules |= dict.fromkeys(['accelerate', 'jsonargparse'])\n"
        "from cmpe_se_command import main; sys.exit(main(['train']))",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr == ("cmpe-se: cmpe-se train needs accelerate and jsonargparse; pip install 'cmpe-se[train]'\n")


def test_a_missing_package_is_both_a_users_and_an_import_error():
    assert issubclass(MissingPackageError, UserError)
    assert issubclass(MissingPackageError, ImportError)
    assert str(MissingPackageError("one line")) == "one line"


def test_extras_are_what_the_code_looks_for():
    toml = pytest.importorskip("tomllib")
    project = toml.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {
        extra: {re.split(r"[\[><=]", line)[0] for line in lines if not line.startswith("cmpe-se")}
        for extra, lines in project["optional-dependencies"].items()
    }
    brought = {"filelock", "huggingface-hub", "pillow", "pyyaml", "safetensors"}  # by PyTorch and timm
    assert extras["train"] == set(_TRAIN.values()) | brought
    base = {re.split(r"[\[><=]", line)[0] for line in project["dependencies"]}
    assert base == {"torch", "torchvision", "timm", "numpy"}
    users = {name for name in extras if name not in ("train", "all", "dev", "docs")}
    for extra in users:
        assert "cmpe-se[train]" in project["optional-dependencies"][extra]
    (everything,) = project["optional-dependencies"]["all"]
    services = {"mlflow", "trackio", "wandb"}  # of which a person has one, and MLflow alone brings forty packages
    assert set(everything.removeprefix("cmpe-se[").rstrip("]").split(",")) == users - services
