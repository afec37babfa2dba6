"""``benchmarks/gate_variants.py``: the change is in the network that trains, and rows compare what they name."""

import json

import benchmarks.gate_variants as script
import pytest

from cmpe_se.comparing.statistics import compare_paired
from cmpe_se.config import TrainingConfig
from cmpe_se.networks.blocks import PreActBlock

ACCURACIES = {
    "cells/preact_resnet20": [60.0, 61.5, 60.4],
    "cells/se_preact_resnet20": [61.0, 61.1, 61.9],
    "cells/cmpe_se_preact_resnet20-folded_3x3": [62.0, 61.0, 62.7],
    "variants/near_one_se": [63.0, 62.5, 63.1],
    "variants/near_one": [62.9, 63.5, 64.1],
}


@pytest.fixture
def comparison(tmp_path):
    for name, accuracies in ACCURACIES.items():
        for seed, top1 in enumerate(accuracies):
            run = tmp_path / f"{name}-seed{seed}"
            run.mkdir(parents=True)
            (run / "result.json").write_text(json.dumps({"test_top1": top1}))
    return tmp_path


def test_rows(comparison):
    rows = script.compared(comparison, "cmpe_se_preact_resnet20", ["near_one_se", "near_one"], 3)
    se, plain, folded = "se_preact_resnet20", "preact_resnet20", "cmpe_se_preact_resnet20-folded_3x3"
    assert [(row["variant"], row["against"]) for row in rows] == [
        *(("near_one_se", other) for other in (se, plain)),
        *(("near_one", other) for other in (folded, plain, se, "near_one_se")),
    ]
    for row in rows:
        own = ACCURACIES[f"variants/{row['variant']}"]
        other = ACCURACIES.get(f"cells/{row['against']}") or ACCURACIES[f"variants/{row['against']}"]
        expected = compare_paired(own, other)
        assert (row["difference"], row["p"]) == (round(expected.mean, 2), round(expected.p, 4))
        assert row["p_holm"] >= row["p"]


@pytest.mark.parametrize(("name", "trained"), [("near_one_se", "se"), ("near_one", "folded_3x3")])
def test_the_change_is_in_the_network_that_trains(name, trained, tmp_path, monkeypatch):
    config = TrainingConfig.from_recipe("digits", epochs=1)
    (tmp_path / "recipe.yaml").write_text(config.to_yaml())
    original, seen = script.near_one, []

    def noted(block: PreActBlock) -> None:
        original(block)
        seen.append((block.attention.view, block.attention.gain))

    monkeypatch.setitem(script.VARIANTS, name, script.VARIANTS[name]._replace(change=noted))
    result = script.variant_run(tmp_path, "cmpe_se_preact_resnet20", name, 1)
    assert seen == [(trained, 2.0)] * 9
    assert (result["seed"], result["epochs"]) == (1, 1)
    assert script.variant_run(tmp_path, "cmpe_se_preact_resnet20", name, 1)["test_top1"] == result["test_top1"]
    assert len(seen) == 9  # a finished run is left alone
