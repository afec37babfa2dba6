"""``benchmarks/many_runs`` on a GPU: a captured step is the eager one, and lanes do not disturb each other."""

import copy
import json

import pytest
import torch
from benchmarks.many_runs import __main__ as script
from benchmarks.many_runs.cells import start
from benchmarks.many_runs.program import Program

from cmpe_se import VIEWS
from cmpe_se.data import load_data
from cmpe_se.training import train
from cmpe_se.training.config import TrainingConfig

SETTINGS = {"epochs": 2, "batch_size": 128, "label_smoothing": 0.1, "crop_padding": 1, "flip": True, "cutout": 2}


@pytest.mark.parametrize("view", [None, *VIEWS])
def test_a_captured_step_is_the_eager_one(view):
    model = "cmpe_se_preact_resnet20" if view else "preact_resnet20"
    config = TrainingConfig.from_recipe("digits", model=model, view=view, lr=0.02, **SETTINGS)
    data = load_data("digits")
    plan = torch.stack(list(data.plans(0, config.batch_size, 0, config.augmentation)))
    begun, programs = start(config, data), []
    with torch.cuda.stream(torch.cuda.Stream()):
        for captured in (False, True):
            program = Program(config, data, copy.deepcopy(begun.network), torch.device("cuda", 0))
            if captured:
                program.capture()
            for _ in range(2):  # the second run shows that nothing of the first one is left
                program.load(begun.network, 0)
                program.begin_epoch(plan)
                for _ in range(4):
                    program.step()
            programs.append(program)
        torch.cuda.synchronize()
    eager, graph = programs
    assert graph.sums.tolist() == pytest.approx(eager.sums.tolist(), rel=1e-3, abs=2)
    assert (graph.place.item(), graph.row.item()) == (4, 4)
    for (name, value), other in zip(
        eager.network.state_dict().items(), graph.network.state_dict().values(), strict=True
    ):
        assert (value - other).abs().max() <= 1e-2 * value.abs().max().clamp(min=1), name


@pytest.mark.parametrize("compiled", [False, True])
def test_runs_side_by_side_are_those_of_train(compiled, tmp_path):
    models = "preact_resnet20,cmpe_se_preact_resnet20:folded_3x3"
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    more = ["--compile=true", "--seeds=1"] if compiled else ["--seeds=3"]
    lanes = ["--lanes=4", "--patience=60"]  # several can stop for good (results/LOG.md), which should fail and not wait
    queue = script.main(["--models", models, "--recipe=digits", *lanes, "--output", str(tmp_path), *flags, *more])
    assert not queue.failures
    assert not queue.stuck
    assert len(queue.finished) == (2 if compiled else 6)
    for cell in queue.finished:
        if cell.seed:
            continue
        view = {"view": cell.entry.view} if cell.entry.view else {}
        name = f"train-{cell.entry.model}"
        train(recipe="digits", model=cell.entry.model, output=tmp_path / name, **view, **SETTINGS)
        right = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])
        found = json.loads(cell.run.metrics.read_text().splitlines()[0])
        assert found["train_loss"] == pytest.approx(right["train_loss"], rel=0.02)  # float32 on a GPU does not repeat
        assert found["lr"] == right["lr"]
