"""A comparison that was kept as small files: configurations, records and results, without weights and checkpoints."""

import csv
import json

import pytest
import torch

from cmpe_se.commands.compare import compare, latency
from cmpe_se.data import load_data
from cmpe_se.errors import UserError
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.gate_settings import without_recipe_gates
from cmpe_se.training.network import create_network
from cmpe_se.training.provenance import provenance
from cmpe_se.training.run_folder import RunFolder

SETTINGS = {"recipe": "digits", "epochs": 1, "device": "cpu"}
MODELS = {"preact_resnet20": [90.0, 91.0], "cmpe_se_preact_resnet20": [91.5, 92.0]}


def keep(run: RunFolder, config: TrainingConfig, top1: float) -> None:
    """What stays of a finished run."""
    tested = {"test_top1": top1, "test_top5": 99.0, "test_loss": 0.3}
    run.write_config(config)
    speed, training = {"images_per_second": 300.0}, {"train_loss": 1.0, "train_top1": 80.0, "seconds": 5.0}
    run.write_metrics([{"epoch": 1, "step": 22, "lr": 0.1, "test_images": 360, **training, **speed, **tested}])
    sizes = {"params": 1000, "macs": 10_000, "epochs": 1, "train_images": 1437, "test_images": 360}
    settings = {"model": config.model, "view": config.view, "data": config.data, "seed": config.seed}
    place = {"processes": 1, "run": str(run.path), "train_seconds": 5.0}
    run.write_result(settings | sizes | tested | place | speed | provenance())


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
