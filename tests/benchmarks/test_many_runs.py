"""``benchmarks/many_runs``: its runs are those of ``train``, and its queue keeps to time and order."""

import json
import math
import tarfile
import threading
import time
from pathlib import Path

import pytest
import torch
from benchmarks.many_runs import __main__ as script
from benchmarks.many_runs import cells
from benchmarks.many_runs.cells import OutOfTime, start
from benchmarks.many_runs.lanes import Queue
from benchmarks.many_runs.program import Program, _strided_as

from cmpe_se.commands.compare.compare import compare
from cmpe_se.commands.compare.grid import Grid, parse_entries
from cmpe_se.data import load_data
from cmpe_se.errors import UserError
from cmpe_se.training import train
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.run_folder import RunFolder
from tests.training.runs import metrics, weights

pytestmark = pytest.mark.slow

MODELS = ("preact_resnet20", "cmpe_se_preact_resnet20:folded_3x3:mask=0.2")
RECIPE = """
data: digits
epochs: 2
batch_size: 128
lr: 0.1
weight_decay: 0.0005
warmup_epochs: 1
label_smoothing: 0.1
crop_padding: 1
flip: true
cutout: 2
gate_lr: 0.5
test_interval: 2
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def many(recipe, tmp_path_factory) -> Path:
    """Two networks and two seeds, the second one after the first one's program."""
    output = tmp_path_factory.mktemp("many")
    queue = script.main(arguments(recipe, output, "--keep-weights=all"))
    assert not queue.failures
    return output


def arguments(recipe: Path, output: Path, *more: str) -> list[str]:
    models = ",".join(MODELS)
    return [
        "--models",
        models,
        "--seeds",
        "2",
        "--first-seed",
        "3",
        "--recipe",
        str(recipe),
        "--output",
        str(output),
        *more,
    ]


@pytest.mark.parametrize("cell", ["preact_resnet20-seed3", "cmpe_se_preact_resnet20-folded_3x3-mask=0.2-seed4"])
def test_a_run_is_that_of_train_bit_for_bit(cell, recipe, many, tmp_path):
    view = {"view": "folded_3x3", "mask": 0.2} if "folded" in cell else {}
    name = cell.split("-")[0]
    expected = train(recipe=recipe, model=name, seed=int(cell[-1]), output=tmp_path / "run", **view)
    own, other = many / "cells" / cell, tmp_path / "run"

    found, trained = weights(own), weights(other)
    assert found.keys() == trained.keys()
    for key, value in trained.items():
        assert torch.equal(found[key], value), key
    assert (own / "model" / "config.json").read_text() == (other / "model" / "config.json").read_text()
    assert (own / "config.yaml").read_text() == (other / "config.yaml").read_text()

    assert metrics(own) == metrics(other)
    keys = [[list(json.loads(line)) for line in (run / "metrics.jsonl").open()] for run in (own, other)]
    assert keys[0] == keys[1]
    result = json.loads((own / "result.json").read_text())
    assert result["tf32"] is False
    assert list(result) == list(expected)
    own_values = {"train_seconds", "images_per_second", "run", "command"}
    assert all(result[key] == expected[key] for key in expected if key not in own_values)


def test_compare_takes_the_runs_as_finished(many, recipe, capsys):
    before = {path: path.stat().st_mtime_ns for path in many.glob("cells/*/result.json")}
    rows = compare(models=",".join(MODELS), seeds=2, first_seed=3, recipe=recipe, output=many)
    assert [row["seeds"] for row in rows] == [2, 2]
    assert before == {path: path.stat().st_mtime_ns for path in many.glob("cells/*/result.json")}


def test_the_archive_holds_the_small_files(many):
    with tarfile.open(many / "cells.tar.gz") as archive:
        names = archive.getnames()
    runs = sorted(path.name for path in (many / "cells").iterdir() if path.is_dir())
    files = ("config.yaml", "metrics.jsonl", "result.json")
    assert names == ["recipe.yaml", *(f"cells/{run}/{file}" for run in runs for file in files)]
    assert len(runs) == 4


def test_finished_runs_are_left_alone(many, recipe, capsys):
    before = {path: path.stat().st_mtime_ns for path in many.glob("cells/*/*")}
    queue = script.main(arguments(recipe, many))
    assert (queue.finished, queue.cells) == ([], [])
    assert before == {path: path.stat().st_mtime_ns for path in many.glob("cells/*/*")}
    assert "4 of 4 runs are finished" in capsys.readouterr().out


def test_without_time_nothing_is_begun(recipe, tmp_path):
    queue = script.main(arguments(recipe, tmp_path, "--minutes=0.0"))
    assert (len(queue.cells), queue.finished) == (4, [])
    assert not list(tmp_path.glob("cells/*/*"))


def test_a_run_out_of_time_leaves_nothing(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(Queue, "note_epoch", lambda self, cell, epoch: setattr(self, "deadline", -math.inf))
    queue = script.main(arguments(recipe, tmp_path))
    assert list(queue.failures.values()) == ["out of time"]
    assert (len(queue.cells), queue.finished) == (3, [])
    assert not list(tmp_path.glob("cells/*/*"))


def test_the_fused_update_of_a_graph_is_that_of_train(recipe, many):
    """Rates looked up by group, momentum from zeros, and no decay where the trainer has none."""
    config = RunFolder(many / "cells" / "cmpe_se_preact_resnet20-folded_3x3-mask=0.2-seed3").read_config()
    data = load_data("digits")
    programs = []
    for fused in (False, True):
        begun = start(config, data)
        program = Program(config, data, begun.network, torch.device("cpu"), fused=fused)
        program.load(begun.network, 3)
        program.begin_epoch(torch.stack(list(data.plans(0, config.batch_size, 3, config.augmentation))))
        for _ in range(6):
            program.step()
        programs.append(program)
    plain, fused = programs
    for group, other in zip(plain.optimizer.param_groups, fused.optimizer.param_groups, strict=True):
        assert float(other["lr"]) == pytest.approx(group["lr"])
    assert fused.sums.tolist() == pytest.approx(plain.sums.tolist(), rel=1e-5)
    weights, others = plain.network.state_dict(), fused.network.state_dict()
    for key, value in weights.items():
        torch.testing.assert_close(others[key], value, rtol=1e-4, atol=1e-5, msg=key)


def test_a_program_begins_a_second_run_afresh(many):
    """The weights after a run do not depend on what the program did before."""
    config = RunFolder(many / "cells" / "preact_resnet20-seed3").read_config()
    data = load_data("digits")
    program = Program(config, data, start(config, data).network, torch.device("cpu"), fused=True)
    plan = torch.stack(list(data.plans(0, config.batch_size, 3, config.augmentation)))
    results = []
    for _ in range(2):
        program.load(start(config, data).network, 3)
        program.begin_epoch(plan)
        for _ in range(3):
            program.step()
        results.append([value.clone() for value in program.network.state_dict().values()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_the_queue_begins_only_what_can_finish():
    grid = Grid(Path("nowhere"), parse_entries(MODELS, []), range(3), TrainingConfig(), {})
    queue = Queue(list(grid.cells), time.monotonic() + 60, epochs=10)
    first, second = queue.take(), queue.take()
    assert [(cell.entry.label, cell.seed) for cell in (first, second)] == [(name, 0) for name in MODELS]
    queue._under_way[first] = (time.monotonic() - 10, 0.0)
    queue.note_epoch(first, 2)  # 10 s for 2 of 10 epochs: 50 s for all
    assert queue.estimate() == pytest.approx(50, abs=0.5)
    assert queue.take().seed == 1
    queue._under_way[second] = (time.monotonic() - 61, 0.0)
    assert queue.end(second) == pytest.approx(61, abs=0.5)
    assert queue.take() is None  # a run takes a minute, and less is left
    assert queue.finished == [second]


@pytest.mark.long
def test_corrupted_images_are_those_of_compare(recipe, tmp_path):
    script.main(arguments(recipe, tmp_path, "--corruptions", "--seeds=1", "--keep-weights=all"))
    files = sorted(tmp_path.glob("cells/*/corruptions.json"))
    found = [json.loads(file.read_text()) for file in files]
    with tarfile.open(tmp_path / "cells.tar.gz") as archive:
        assert sum(name.endswith("corruptions.json") for name in archive.getnames()) == 2
    for file in files:
        file.unlink()
    compare(models=",".join(MODELS), seeds=1, first_seed=3, recipe=recipe, output=tmp_path, corruptions=True)
    for file, own in zip(files, found, strict=True):
        right = json.loads(file.read_text())
        assert own.keys() == right.keys()
        assert all(own[key] == right[key] for key in ("clean", "mean", "jpeg", "noise", "data", "parameters"))


@pytest.mark.long
def test_a_failing_run_does_not_end_the_others(recipe, tmp_path, monkeypatch, capsys):
    def failing(program, *_):
        if not hasattr(program.network.stages[0].blocks[0].attention, "fc1"):
            raise ZeroDivisionError("by nought")
        return whole(program, *_)

    whole = cells._enqueue_epoch
    monkeypatch.setattr(cells, "_enqueue_epoch", failing)
    queue = script.main(arguments(recipe, tmp_path))
    assert list(queue.failures.values()) == ["ZeroDivisionError: by nought"] * 2
    assert {cell.entry.view for cell in queue.finished} == {"folded_3x3"}
    assert capsys.readouterr().err.count("Traceback") == 1


def test_a_stuck_device_does_not_hold_the_command(recipe, tmp_path, monkeypatch, capfd):
    """The first run trains, the second one's device never answers; what waits is named."""
    freed, begun = threading.Event(), []

    def stuck(program, *_):
        begun.append(program)
        if len(begun) > 2:  # epochs
            freed.wait()
            raise OutOfTime
        return whole(program, *_)

    whole = cells._enqueue_epoch
    monkeypatch.setattr(cells, "_enqueue_epoch", stuck)
    try:
        queue = script.main(arguments(recipe, tmp_path, "--patience=5"))
        assert queue.stuck
        assert (len(queue.finished), len(queue.cells)) == (1, 2)
        said = capfd.readouterr()
        assert "no epoch has ended for 5 s: the device is stuck" in said.out
        assert " in stuck\n" in said.err
        with tarfile.open(tmp_path / "cells.tar.gz") as archive:
            assert sum(name.endswith("result.json") for name in archive.getnames()) == 1
    finally:
        freed.set()


def test_a_loss_that_is_not_finite_ends_its_run(recipe, tmp_path):
    queue = script.main(arguments(recipe, tmp_path, "--lr=1e30", "--seeds=1"))
    assert len(queue.failures) == 2
    assert all("the loss is nan in epoch 1" in reason for reason in queue.failures.values())
    assert not list(tmp_path.glob("cells/*/*"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--mixup=0.2"], "train with mixup 0.0, not 0.2"),
        (["--precision", "bfloat16"], "train with precision float32, not bfloat16"),
        (["--optimizer=adamw"], "train with optimizer sgd, not adamw"),
        (["--class_weights=balanced"], "train with class_weights None, not balanced"),
        (["--validation=0.1"], "train with validation 0.0, not 0.1"),
        (["--epoch=3"], "setting epoch does not exist"),
        (["epochs=3"], "'epochs' is no setting"),
        (["--model", "a,b"], "a comparison sets model by itself; give --models, --views and --seeds"),
        (["--seed", "7"], "a comparison sets seed by itself"),
        (["--view=se"], "a comparison sets view by itself"),
        (["--lr="], "--lr has no value; write --lr=VALUE"),
        (["--lr"], "--lr has no value"),
        (["--flip", "--lr=0.1"], "--flip has no value"),
        (["--lr", "[0.1"], r"--lr cannot be '\[0.1': while parsing"),
        (["--models=preact_resnet20:se,preact_resnet20:se:reduction=16"], "are the same network"),
        (["--primary=preact_resnet20:se_preact_resnet20"], "is not two networks of this comparison"),
        (["--seeds=0"], "seeds 0 and lanes 1 should be at least 1"),
    ],
)
def test_settings_that_it_does_not_know(flags, words, recipe, tmp_path):
    with pytest.raises(UserError, match=words) as raised:
        script.main(arguments(recipe, tmp_path, *flags))
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("shape", "strides", "shared"),
    [((8, 4, 1, 1), (4, 1, 1, 1), True), ((6, 1, 3, 3), (9, 1, 3, 1), True), ((8, 4, 3, 3), (36, 9, 3, 1), False)],
)
def test_gradients_get_the_strides_of_their_parameter(shape, strides, shared):
    values = torch.randn(math.prod(shape))
    gradient = values.as_strided(shape, strides)
    parameter = torch.empty(shape).to(memory_format=torch.channels_last)
    parameter = parameter.as_strided(shape, (shape[1] * shape[2] * shape[3], 1, shape[3] * shape[1], shape[1]))
    found = _strided_as(gradient, parameter)
    assert found.stride() == parameter.stride()
    assert torch.equal(found, gradient)
    assert (found.data_ptr() == gradient.data_ptr()) is shared
