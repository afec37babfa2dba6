"""A run's settings are complete or refused; recipes may have any of them."""

import json
import re
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest

from cmpe_se.errors import UserError
from cmpe_se.training import train
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.run_folder import RunFolder
from tests.training.processes import complaint_of

WHOLE = TrainingConfig(lr=0.2, epochs=3).to_yaml()
LATER = ("convert", "pretrained", "layer_decay", "gate_lr", "test_interval", *TrainingConfig(start="one").gate_settings)
LATER += ("reduction", "min_hidden", "bias", "mask")


def without(text: str, *names: str) -> str:
    return "".join(line for line in text.splitlines(keepends=True) if line.partition(":")[0] not in names)


# As the first version wrote it: fewer settings, and no line that counts them.
FIRST_VERSION = without(WHOLE, "# settings", *LATER)

DAMAGED = {
    "empty": ("", "is empty"),
    "comments": ("# repeat\n", "is empty"),
    "cut": (
        WHOLE[: WHOLE.index("lr:")],
        r"of the \d+ settings that were written; it lacks lr, momentum, optimizer_args, weight",
    ),
    "cut in a line": (WHOLE[: WHOLE.index("lr: ") + 5], "it lacks momentum"),
    "cut in a word": (WHOLE[: WHOLE.index("lr: ") + 1], "is not YAML: .* in line "),
    "a line missing": (without(WHOLE, "lr"), "it lacks lr; put it back"),
    "the last line missing": (without(WHOLE, "tensorboard"), "it lacks tensorboard"),
    "twice": (WHOLE + "lr: 0.3\n", r"is not YAML: found lr twice in line \d+"),
    "unknown": (WHOLE + "lrr: 0.3\n", "setting lrr does not exist"),
    "one for another": (WHOLE.replace("\nlr:", "\nLr:"), "setting Lr does not exist"),
    "type": (WHOLE.replace("lr: 0.2", "lr: fast"), '"lr": Expected'),
    "null": (WHOLE.replace("lr: 0.2", "lr: null"), "setting lr is null, should be float"),
    "truth": (WHOLE.replace("epochs: 3", "epochs: true"), '"epochs": Expected'),
    "infinite": (WHOLE.replace("lr: 0.2", "lr: .inf"), "lr is inf, should be a finite number"),
    "NaN": (WHOLE.replace("lr: 0.2", "lr: .nan"), "lr is nan, should be at least 0"),
    "code": (WHOLE.replace("lr: 0.2", "lr: !!python/object/apply:os.getpid []"), "is not YAML: could not determine"),
    "alias": ("a: &a [1]\nb: *a\n", "is not YAML: found an alias in line 2"),
    "list": ("- lr\n", "should map settings to values"),
    "levels": ("lr: " + "[" * 1000, "too many levels"),
    "count": (WHOLE.replace("# settings: ", "# settings: x"), "has a damaged line '# settings: x"),
    "two counts": (WHOLE + WHOLE.splitlines()[1], "has a damaged line"),
    "more than were written": (re.sub("# settings: [0-9]+", "# settings: 7", WHOLE), "settings, and 7 were written"),
    "first version, a line missing": (without(FIRST_VERSION, "lr"), "lacks lr; put it back"),
    "first version, cut": (FIRST_VERSION[: FIRST_VERSION.index("\nema")], "lacks ema, crop_padding"),
}


@pytest.mark.parametrize(("text", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_settings_of_a_run(text, message, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    for as_written in (False, True):
        with pytest.raises(UserError, match=message) as raised:
            TrainingConfig.of_run(path, as_written=as_written)
        assert str(raised.value).startswith(str(path))


def test_settings_of_earlier_versions(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(FIRST_VERSION)
    assert TrainingConfig.of_run(path, as_written=True) == TrainingConfig(lr=0.2, epochs=3)
    between = without(WHOLE, "# settings", "start", "mask")
    path.write_text(between)
    assert TrainingConfig.of_run(path, as_written=True) == TrainingConfig(lr=0.2, epochs=3)


def test_settings_of_a_version_in_between_that_counted_them(tmp_path, monkeypatch):
    """A later version knows more settings than the file counts."""
    from cmpe_se.training.settings_file import settings_text

    values = {field.name: field.default for field in fields(TrainingConfig) if field.name not in ("mask", "bias")}
    (tmp_path / "config.yaml").write_text(settings_text(values))
    assert TrainingConfig.of_run(tmp_path / "config.yaml", as_written=True) == TrainingConfig()


def test_kept_runs_of_earlier_versions():
    """Those that came with the repository, which have no line that counts settings."""
    root = Path(__file__).parents[2]
    listed = subprocess.run(["git", "-C", root, "ls-files", "results"], capture_output=True, text=True, check=False)
    found = [root / name for name in listed.stdout.splitlines() if name.endswith("config.yaml")]
    for path in found:
        run = RunFolder.open(path.parent)
        assert run.read_config(as_written=True).epochs == run.read_result()["epochs"] == len(run.read_metrics())


@pytest.mark.parametrize("text", [WHOLE.rstrip("\n"), WHOLE.replace("\n", "\r\n"), WHOLE + "\n# mine\n"])
def test_what_is_no_change(text, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode())
    assert TrainingConfig.of_run(path, as_written=True) == TrainingConfig(lr=0.2, epochs=3)


def test_changed_by_hand(tmp_path):
    """Looking at a run goes on, for instance after its data have moved; training does not."""
    path = tmp_path / "config.yaml"
    changed = WHOLE.replace("data_dir: null", "data_dir: /elsewhere")
    path.write_text(changed)
    assert TrainingConfig.of_run(path).data_dir == "/elsewhere"
    with pytest.raises(UserError, match=r"has changed since it was written.*as flags, or delete its line '# settings'"):
        TrainingConfig.of_run(path, as_written=True)
    path.write_text(without(changed, "# settings"))
    assert TrainingConfig.of_run(path, as_written=True).data_dir == "/elsewhere"


def test_a_recipe_may_have_any_settings_but_not_half_a_run(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(WHOLE.replace("lr: 0.2", "lr: 0.3"))
    assert TrainingConfig.from_recipe(path).lr == 0.3
    path.write_text(without(WHOLE, "lr"))
    with pytest.raises(UserError, match=r"own.yaml has \d+ of the \d+ .* it lacks lr; put them back, or delete"):
        TrainingConfig.from_recipe(path)
    path.write_text(without(WHOLE, "lr", "# settings"))
    assert TrainingConfig.from_recipe(path).lr == TrainingConfig().lr
    path.write_text("")
    with pytest.raises(UserError, match=r"recipe .*own\.yaml is empty"):
        TrainingConfig.from_recipe(path)


@pytest.mark.parametrize("damage", ["", WHOLE[:300]])
def test_a_finished_run_is_not_trained_under_other_settings(damage, plain, tmp_path):
    folder = RunFolder(shutil.copytree(plain, tmp_path / "run"))
    folder.config.write_text(damage)
    weights = (folder.model / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"config\.yaml "):
        train(resume=folder.path, epochs=2)
    assert str(folder.config) in complaint_of("train", "--resume", folder.path)
    assert (folder.model / "model.safetensors").read_bytes() == weights
    assert json.loads(folder.result.read_text())["epochs"] == 1
