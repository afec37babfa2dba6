"""``log_to``: what trackers are told, once each, whatever happens to the run or to them."""

import json
import sqlite3

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from cmpe_se.errors import UserError
from cmpe_se.training import train
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.watching.trackers import _PACKAGES, check_trackers, tracker_names
from tests.training.processes import SMALL, complaint_of, start, succeed
from tests.training.runs import place

QUICK = {"model": "test_resnet", "convert": "pair_view_1x1", "device": "cpu", "batch_size": 256}


class Told(GeneralTracker):
    """Keeps what it is told, over all its instances; fails when it is asked to."""

    name, requires_logging_directory, main_process_only = "told", False, False
    told: list = []  # noqa: RUF012
    configurations: list = []  # noqa: RUF012
    fails_at: set = set()  # noqa: RUF012

    def __init__(self, project, **settings):
        self.project = project

    @property
    def tracker(self):
        return self

    def start(self):
        if "start" in self.fails_at:
            raise ConnectionError("no route\nto host")

    def store_init_configuration(self, values):
        self.configurations.append(values)

    def log(self, values, step=None, **_):
        print("told")  # as some libraries do; stdout has the result of a command
        if step in self.fails_at:
            raise ConnectionError("gone")
        self.told.append((step, values))

    def finish(self):
        if "finish" in self.fails_at:
            raise ConnectionError("gone at the end")


@pytest.fixture
def told(monkeypatch):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "told", Told)
    for name in ("told", "configurations", "fails_at"):
        monkeypatch.setattr(Told, name, type(getattr(Told, name))())
    return Told


def test_every_epoch_once_and_the_settings(told, tmp_path, capsys):
    result = train(**QUICK, epochs=2, log_to="told", output=tmp_path / "run")
    assert "told" not in capsys.readouterr().out
    assert [step for step, _ in told.told] == [5, 10]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    gates = [json.loads(line) for line in (tmp_path / "run" / "gates.jsonl").read_text().splitlines()]
    for (_, values), record, statistics in zip(told.told, records, gates, strict=True):
        assert {key: values[key] for key in ("lr", "train_loss", "test_top1")} == {
            key: record[key] for key in ("lr", "train_loss", "test_top1")
        }
        for block, numbers in statistics["gates"].items():
            assert values[f"gates/{block}/mean"] == numbers["mean"]
            assert values[f"gates/{block}/sleeping"] == numbers["sleeping"]
    assert records[-1]["test_top1"] == result["test_top1"]
    (settings,) = told.configurations
    assert (settings["epochs"], settings["convert"], settings["view"]) == (2, "pair_view_1x1", "null")
    assert all(isinstance(value, bool | int | float | str) for value in settings.values())

    train(resume=tmp_path / "run", epochs=3)
    assert [step for step, _ in told.told] == [5, 10, 15]
    assert len(told.configurations) == 1


def test_a_tracker_that_comes_later_is_told_of_all_epochs(told, tmp_path):
    train(**QUICK, epochs=1, output=tmp_path / "run")
    train(resume=tmp_path / "run", epochs=2, log_to="told")
    assert [step for step, _ in told.told] == [5, 10]


@pytest.mark.long
def test_a_failure_ends_no_training_and_is_made_good(told, tmp_path, capsys):
    told.fails_at |= {10}
    train(**QUICK, epochs=3, log_to="told", output=tmp_path / "run")
    assert [step for step, _ in told.told] == [5]
    err = capsys.readouterr().err
    assert err.count("log_to told has failed and is told no more, training goes on: gone; ") == 1
    told.fails_at.clear()
    train(resume=tmp_path / "run", epochs=4)
    assert [step for step, _ in told.told] == [5, 10, 15, 20]
    told.fails_at |= {"finish"}
    train(resume=tmp_path / "run", epochs=5)
    assert "log_to told did not end well: gone at the end" in capsys.readouterr().err


def test_a_service_that_cannot_be_reached_is_one_line(told, tmp_path):
    told.fails_at |= {"start"}
    with pytest.raises(UserError, match=r"^log_to told cannot start: no route to host; leave it off, or mend"):
        train(**QUICK, epochs=1, log_to="told", tensorboard=True, output=tmp_path / "run")
    told.fails_at.clear()
    assert train(**QUICK, epochs=1, log_to="told", tensorboard=True, output=tmp_path / "run")  # nothing is in its way


def test_validation_runs_tell_their_one_test(told, tmp_path):
    result = train(**QUICK, epochs=2, validation=0.2, log_to="told", output=tmp_path / "run")
    steps = [step for step, _ in told.told]
    assert steps == [steps[0], 2 * steps[0], 2 * steps[0]]
    assert "test_top1" not in told.told[1][1]
    assert told.told[-1][1]["test_top1"] == result["test_top1"]
    assert not told.told[-1][1].keys() & told.told[-2][1].keys()


@pytest.mark.long
def test_a_killed_run_tells_no_step_twice(tmp_path):
    """TensorBoard, in processes."""
    flags = ("--epochs=3", *SMALL, "--log-to=tensorboard", "--output", tmp_path / "run")
    start("train", *flags).until(lambda: place(tmp_path / "run") >= (2, 0)).send(9)
    succeed("train", "--resume", tmp_path / "run")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    steps = [event.step for event in events.Scalars("train_loss")]
    # Between the note and the event, which are a millisecond apart, a kill would leave the epoch out.
    assert steps in ([22, 44, 66], [22, 66])


def test_the_old_flag_is_one_of_the_trackers():
    assert tracker_names(TrainingConfig(tensorboard=True)) == ["tensorboard"]
    assert tracker_names(TrainingConfig(log_to="tensorboard, told,told", tensorboard=True)) == ["told", "tensorboard"]
    assert tracker_names(TrainingConfig()) == []


def test_names_and_packages(monkeypatch):
    assert set(_PACKAGES) == set(LOGGER_TYPE_TO_CLASS)
    assert "unknown log_to 'tensorbord'; choose one or more of aim, " in complaint_of("train", "--log-to", "tensorbord")
    monkeypatch.setattr("cmpe_se.training.watching.trackers.is_installed", lambda name: False)
    with pytest.raises(UserError, match=r"^log_to wandb needs wandb; pip install 'cmpe-se\[wandb\]'$"):
        check_trackers(TrainingConfig(log_to="wandb"))
    with pytest.raises(UserError, match=r"^log_to comet_ml needs comet-ml; pip install comet-ml$"):
        check_trackers(TrainingConfig(log_to="comet_ml"))


@pytest.mark.parametrize("text", ["{", '{"told": {"id": 3, "epochs": 1}}', '{"told": {"id": null}}'])
def test_a_damaged_note_is_one_line(text, told, tmp_path):
    train(**QUICK, epochs=1, log_to="told", output=tmp_path / "run")
    (tmp_path / "run" / "trackers.json").write_text(text)
    with pytest.raises(UserError, match=r"trackers\.json cannot be read: .*; delete it, and new tracked runs begin"):
        train(resume=tmp_path / "run", epochs=2)


REAL = {  # each in a process of its own, as a user has it; no account, no internet
    "wandb": {"WANDB_MODE": "offline"},
    "trackio": {"HF_HUB_OFFLINE": "1", "TRACKIO_DIR": "{}/trackio"},
    "mlflow": {"MLFLOW_TRACKING_URI": "file:{}/mlflow", "MLFLOW_ALLOW_FILE_STORE": "true"},
}


@pytest.mark.long
@pytest.mark.parametrize("name", REAL)
def test_real_trackers_continue_their_run(name, tmp_path):
    pytest.importorskip(name, reason=f"{name} is not installed")
    env = {key: value.format(tmp_path) for key, value in REAL[name].items()}
    run = tmp_path / "runs" / "a run"
    quick = ("--model=test_resnet", "--convert=pair_view_1x1", "--batch-size=256")
    succeed("train", *quick, "--epochs=2", "--log-to", name, "--output", run, env=env, cwd=tmp_path)
    first = json.loads((run / "trackers.json").read_text())[name]
    succeed("train", "--resume", run, "--epochs", "3", env=env, cwd=tmp_path)
    again = json.loads((run / "trackers.json").read_text())[name]
    assert first == {"id": again["id"], "epochs": 2}
    assert again["epochs"] == 3
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    expected = [(record["step"], record["train_loss"]) for record in records]
    found, title = OF_A_RUN[name](tmp_path, run, again["id"])
    assert [step for step, _ in found] == [5, 10, 15]
    assert [value for _, value in found] == pytest.approx([value for _, value in expected])
    assert title.startswith("a run")


def _in_mlflow(folder, run, number):
    (place,) = (folder / "mlflow").glob(f"*/{number}")
    lines = [line.split() for line in (place / "metrics" / "train_loss").read_text().splitlines()]
    assert len(list((place / "metrics" / "gates").rglob("mean"))) > 0
    title = next(line for line in (place / "meta.yaml").read_text().splitlines() if line.startswith("run_name"))
    assert (place / "params" / "epochs").read_text() == "2"
    return [(int(step), float(value)) for _, value, step in lines], title.split(": ")[1]


def _in_trackio(folder, run, number):
    (file,) = (folder / "trackio").glob("*.db")
    rows = sqlite3.connect(file).execute("select step, metrics, run_name from metrics order by step").fetchall()
    assert {row[2] for row in rows} == {number}
    return [(step, json.loads(values)["train_loss"]) for step, values, _ in rows], number


def _in_wandb(folder, run, number):
    """Both parts, as ``wandb sync`` would send them to one run."""
    from wandb.proto.wandb_internal_pb2 import Record

    files = sorted((run / "wandb").glob(f"offline-run-*-{number}/run-{number}.wandb"))
    assert len(files) == 2
    found, names = [], set()
    for data in (data for file in files for data in _records_of_wandb(file.read_bytes())):
        record = Record()
        record.ParseFromString(data)
        items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        names |= {record.run.display_name} - {""}
        if "train_loss" in items:
            found.append((int(items["_step"]), float(items["train_loss"])))
    return found, names.pop()


def _records_of_wandb(content):
    """A log of LevelDB's format: blocks of 32 KiB, in which parts have a head of check sum, length and kind."""
    place, whole = 7, b""
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole one, or the last part
            yield whole
            whole = b""


OF_A_RUN = {"mlflow": _in_mlflow, "trackio": _in_trackio, "wandb": _in_wandb}


def test_tensorboard_of_runs_from_before_the_note_is_told_no_epoch_twice(tmp_path):
    """They wrote to the same folder, and had no ``trackers.json``."""
    pytest.importorskip("tensorboard")
    train(**QUICK, epochs=1, tensorboard=True, output=tmp_path / "run")
    (tmp_path / "run" / "trackers.json").unlink()
    train(resume=tmp_path / "run", epochs=2)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train_loss")] == [5, 10]
