"""A comparison that was kept as small files: configurations, records and results, without weights and checkpoints."""

import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cmpe_se.commands.compare import compare, latency
from cmpe_se.data import load_data
from cmpe_se.errors import UserError
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.gate_settings import without_recipe_gates
from cmpe_se.training.network import count_gates, create_network
from cmpe_se.training.run_folder import RunFolder
from cmpe_se.utils.cost import count_parameters
from tests.training.written import a_record, a_result

SETTINGS = {"recipe": "digits", "epochs": 1, "device": "cpu"}
MODELS = {"preact_resnet20": [90.0, 91.0], "cmpe_se_preact_resnet20": [91.5, 92.0]}


def keep(run: RunFolder, config: TrainingConfig, top1: float) -> None:
    """What stays of a finished run."""
    run.write_config(config)
    run.write_metrics([a_record(test_top1=top1)])
    run.write_result(a_result(test_top1=top1, macs=10_000, train_seconds=5.0, images_per_second=300.0))


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setattr(latency, "_TURNS", 5)
    for model, accuracies in MODELS.items():
        for seed, top1 in enumerate(accuracies):
            config = without_recipe_gates(TrainingConfig.from_recipe(**SETTINGS, model=model, seed=seed), ())
            keep(RunFolder(tmp_path / "cells" / f"{model}-seed{seed}"), config, top1)
    return tmp_path


def compare_again(folder, **settings):
    return compare(models=",".join(MODELS), seeds=2, output=folder, **(SETTINGS | settings))


def test_it_is_reported_again_without_a_run(kept):
    before = sorted(kept.glob("cells/*"))
    rows = compare_again(kept)
    assert [row["top1_mean"] for row in rows] == [90.5, 91.75]
    assert sorted(kept.glob("cells/*")) == before  # no log, no lock: nothing was started
    assert not list(kept.glob("cells/*/model"))
    with open(kept / "compare.csv") as file:
        written = list(csv.DictReader(line for line in file if not line.startswith("#")))
    assert all(float(row["latency_ms"]) > 0 for row in written)
    assert float(written[0]["latency_ratio"]) == 1


def test_what_trained_it_is_said_and_not_what_reports_it(kept):
    """Versions are of the runs; a seed whose networks were made in two ways is named."""
    ways = {
        "preact_resnet20-seed0": ("NVIDIA A", True, "2.9.0"),
        "cmpe_se_preact_resnet20-seed0": ("NVIDIA A", True, "2.9.0"),
        "preact_resnet20-seed1": ("NVIDIA A", True, "2.10.0"),
        "cmpe_se_preact_resnet20-seed1": (None, False, "2.10.0"),
    }
    for name, (gpu, tf32, torch_version) in ways.items():
        run = RunFolder(kept / "cells" / name)
        result = run.read_result() | {"seed": int(name[-1]), "tf32": tf32}
        result["versions"]["torch"] = torch_version
        result["hardware"] |= {"gpu": gpu, "cpu": "a CPU", "threads": 3}
        run.write_result(result)
    compare_again(kept)
    text = (kept / "compare.md").read_text()
    assert "Trained on NVIDIA A, a CPU (3 threads); commit" in text
    assert "torch 2.10.0 or 2.9.0, " in text
    assert "float32, TF32 in convolutions. `recipe.yaml`" in text
    assert "**Of seed 1 the networks were not all trained on the same hardware" in text


def test_other_settings_are_refused(kept):
    with pytest.raises(UserError, match=r"was made with lr 0\.1, and this comparison has 0\.3"):
        compare_again(kept, lr=0.3)


def test_weights_are_used_where_they_are_left(kept, monkeypatch):
    data = load_data("digits")
    run = RunFolder(kept / "cells" / "cmpe_se_preact_resnet20-seed1")
    trained, model_args = create_network(run.read_config(), data)
    run.save_model(trained, model_args=model_args, data=data)
    images, timed, make_step = torch.randn(4, data.in_chans, *data.image_size), [], latency.make_step

    def noted(network, batch, *rest):
        assert batch.shape[1:] == images.shape[1:]
        timed.append(network(images))
        return make_step(network, batch, *rest)

    monkeypatch.setattr(latency, "make_step", noted)
    compare_again(kept)
    drawn, loaded = timed
    torch.testing.assert_close(loaded, trained.eval()(images), rtol=1e-3, atol=1e-4)
    assert drawn.shape == loaded.shape
    assert json.loads((kept / "latency.json").read_text())["networks"] == list(MODELS)


PUBLISHED = sorted((Path(__file__).parents[3] / "results" / "experiments").glob("*/cells/*/*/config.yaml"))


@pytest.mark.parametrize("path", PUBLISHED, ids=[path.parent.name for path in PUBLISHED])
def test_a_published_run_is_of_the_network_that_its_folder_names(path):
    run = RunFolder(path.parent)
    config, result = run.read_config(), run.read_result()
    assert not Path(result["run"]).is_absolute()  # no place of the machine that trained it
    model, *words = path.parent.name.rpartition("-seed")[0].split("-")
    view = words[0] if words else None
    assert (config.model, config.view, config.convert) == (model, view, None)
    for option, _, value in (word.partition("=") for word in words[1:]):
        assert str(getattr(config, option)) == value
    classes = 10 if Path(config.data_dir).name == "cifar10-10k" else 100
    network, _ = create_network(config, SimpleNamespace(classes=range(classes), in_chans=3))
    assert count_parameters(network) == result["params"]
    depth, bottleneck = re.fullmatch(r"preact_resnet(\d+)(b?)", model).groups()
    blocks = (int(depth) - 2) // (3 if bottleneck else 2)
    assert count_gates(network) == ({view: blocks} if view else {})
