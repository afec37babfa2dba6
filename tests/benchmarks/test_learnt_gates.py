"""What `benchmarks/learnt_gates.py` says of a network's gates, against sums written out."""

import pytest
import torch
from benchmarks.learnt_gates import rows_of, top1_of

import cmpe_se
from cmpe_se.data import plain_training_batches
from cmpe_se.training.run_data import load_run_data
from cmpe_se.training.run_folder import RunFolder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows(folded):
    return {row["block"]: row for row in rows_of(RunFolder.open(folded))}


@pytest.mark.long
def test_spreads(folded, rows):
    run = RunFolder.open(folded)
    images, labels = next(load_run_data(run).test_batches(batch_size=10_000))
    model = run.load_model()
    blocks = cmpe_se.inspect_gates(model, images)
    assert [block.name for block in blocks] == [name for name in rows if name.startswith("stages")]
    with torch.inference_mode():
        top1 = 100 * (model(images).argmax(1) == labels).double().mean().item()
    for block in blocks:
        gate, row = block.gate.double() / block.gain, rows[block.name]
        assert float(row["as_trained"]) == pytest.approx(top1, abs=0.01)
        assert float(row["spread_over_channels"]) == pytest.approx(gate.mean(0).std(correction=0).item(), abs=1e-4)
        over_images = gate.var(0, correction=0).mean().sqrt().item()
        assert float(row["spread_over_images"]) == pytest.approx(over_images, abs=1e-4)
        assert row["sleeps"] == ("yes" if over_images < 0.001 else "no")


@pytest.mark.long
def test_all_at_their_means_is_what_merge_makes(folded, rows):
    run = RunFolder.open(folded)
    data = load_run_data(run)
    images = [batch for batch, _ in plain_training_batches(data, 2000, batch_size=250)]
    merged = cmpe_se.merge(run.load_model(), static="all", images=images)
    assert float(rows["all"]["alone"]) == pytest.approx(top1_of(merged, data), abs=0.3)
    assert {"all", "most static half"} < set(rows)
    assert len({tuple(row) for row in rows.values()}) == 1  # a table
