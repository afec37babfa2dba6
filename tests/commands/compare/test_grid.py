"""Which runs a comparison has, and what makes them comparable."""

import sys
from dataclasses import fields
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from rich.console import Console

from cmpe_se.cli import _as_parsed, _parser
from cmpe_se.commands.compare import estimate
from cmpe_se.commands.compare.compare import compare
from cmpe_se.commands.compare.grid import VARIED, Entry, Grid, parse_entries
from cmpe_se.commands.compare.networks import check_networks
from cmpe_se.commands.compare.outcomes import collect
from cmpe_se.commands.compare.presets import PRESETS, preset_grids, without_published
from cmpe_se.commands.compare.running import _job
from cmpe_se.commands.train import train
from cmpe_se.data import load_data
from cmpe_se.errors import UserError
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.gate_settings import without_recipe_gates
from cmpe_se.training.network import create_network
from tests.tiers import slow_but
from tests.training.written import a_record, a_result

FIELDS = [field.name for field in fields(TrainingConfig)]
DEFAULTS = {"start": None, "reduction": 16, "min_hidden": 1, "bias": False, "mask": 0.0}
GIVEN = {"start": "one", "reduction": 4, "min_hidden": 4, "bias": True, "mask": 0.5}


def grid(folder, entries=("preact_resnet20", "cmpe_se_preact_resnet20"), *, recipe="digits", **settings) -> Grid:
    config = without_recipe_gates(TrainingConfig.from_recipe(recipe, **settings), settings)
    return Grid(folder, parse_entries(entries, []), range(2), config, {})


def test_views_multiply_competitive_names_only():
    entries = parse_entries(["preact_resnet20", "se_wrn16_4", "cmpe_se_wrn16_4"], ["pair_view_1x1", "folded_3x3"])
    assert [entry.label for entry in entries] == [
        "preact_resnet20", "se_wrn16_4", "cmpe_se_wrn16_4:pair_view_1x1", "cmpe_se_wrn16_4:folded_3x3",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "view", "convert"),
    [
        ("cmpe_se_wrn16_4:double_fc", "double_fc", None),
        ("wrn16_4:se", "se", None),
        ("resnet18:folded_3x3", None, "folded_3x3"),
        ("cmpe_se_resnet18:double_fc", "double_fc", None),
        ("resnet18", None, None),
    ],
)
def test_a_view_is_the_networks_own_or_a_conversion(name, view, convert):
    entry = parse_entries([name, "preact_resnet20"], [])[0]
    made = {name: entry.settings[name] for name in ("model", "view", "convert")}
    assert made == {"model": name.partition(":")[0], "view": view, "convert": convert}


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("preact_resnet20", DEFAULTS),
        ("resnet18", DEFAULTS),
        ("se_preact_resnet20", GIVEN),
        ("cmpe_se_wrn16_4", GIVEN),
        ("preact_resnet20:se", GIVEN),
        ("resnet18:folded_3x3", GIVEN),
        ("cmpe_se_resnet18", GIVEN),
        ("preact_resnet20:se:reduction=2:start=half", GIVEN | {"reduction": 2, "start": "half"}),
        ("cmpe_se_wrn16_4:bias=false:mask=0.25", GIVEN | {"bias": False, "mask": 0.25}),
        ("resnet18:se:start=null:min_hidden=8", GIVEN | {"start": None, "min_hidden": 8}),
    ],
)
def test_gate_settings_are_for_networks_with_gates(name, own, tmp_path):
    compared = grid(tmp_path, (name, "wrn16_8"), **GIVEN)
    config = compared.config_of(compared.cells[0])
    assert {key: getattr(config, key) for key in own} == own
    assert config.static is None
    assert compared.entries[0].label == name


def test_views_keep_an_entrys_settings():
    entries = parse_entries(["preact_resnet20", "cmpe_se_wrn16_4:reduction=2"], ["se", "folded_3x3"])
    labels = [entry.label for entry in entries[1:]]
    assert labels == ["cmpe_se_wrn16_4:se:reduction=2", "cmpe_se_wrn16_4:folded_3x3:reduction=2"]


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (["wrn16_4:se", "wrn16_4:se:reduction=16"], "wrn16_4:se and wrn16_4:se:reduction=16 are the same network"),
        (["wrn16_4", "wrn16_4:se:reduction=two"], 'wrn16_4:se:reduction=two: setting "reduction"'),
        (["wrn16_4", "wrn16_4:se:reduction=["], r'wrn16_4:se:reduction=\[: setting "reduction"'),
    ],
)
def test_entries_that_cannot_be_told_apart_or_made(names, complaint, tmp_path):
    with pytest.raises(UserError, match=complaint):
        grid(tmp_path, names).check_entries()


@pytest.mark.parametrize(
    ("models", "views", "complaint"),
    [
        (["preact_resnet20"], [], "at least two networks"),
        (["preact_resnet20", "preact_resnet20"], [], "preact_resnet20 is named twice"),
        (["preact_resnet20", "cmpe_se_preact_resnet20:folded"], [], "unknown view 'folded'; choose of se, double_fc"),
        (["preact_resnet20", "se_preact_resnet20"], ["folded_3x3"], "--models has none; write NAME:VIEW"),
        (["preact_resnet20", "se_wrn16_4:lr=1"], [], "se_wrn16_4:lr=1: 'lr=1' is no setting of a gate; .* min_hidden"),
        (
            ["a", "preact_resnet20:static:reduction=2"],
            [],
            "reduction makes no difference to this gate; these .*: start",
        ),
        (["a", "preact_resnet20:timm_se:bias=true"], [], "bias makes no difference to this gate; these .*: start, red"),
        (["preact_resnet20", "se_wrn16_4:reduction="], [], "'reduction=' is no setting of a gate"),
        (["preact_resnet20", "se_wrn16_4:bias=true:se"], [], "'se' is no setting of a gate; write NAME:VIEW:key=value"),
        (["preact_resnet20", "se_wrn16_4:bias=true:bias=false"], [], "bias is given twice"),
        (
            ["preact_resnet20", "wrn16_4:bias=true"],
            [],
            "wrn16_4 has no gates to set; name a view, such as wrn16_4:se:b",
        ),
    ],
)
def test_grids_that_cannot_be(models, views, complaint):
    with pytest.raises(UserError, match=complaint):
        parse_entries(models, views)


def test_cells_come_seed_by_seed(tmp_path):
    cells = grid(tmp_path).cells
    assert [(cell.entry.model, cell.seed) for cell in cells] == [
        ("preact_resnet20", 0), ("cmpe_se_preact_resnet20", 0), ("preact_resnet20", 1), ("cmpe_se_preact_resnet20", 1),
    ]  # fmt: skip
    assert len({cell.run.path for cell in cells}) == 4


def test_a_cells_folder_has_a_safe_name(tmp_path):
    compared = grid(tmp_path, ("timm/resnet18.a1_in1k", "resnet18:se:mask=0.1:start=half"))
    names = [cell.run.path.name for cell in compared.cells[:2]]
    assert names == ["timm_resnet18.a1_in1k-seed0", "resnet18-se-mask=0.1-start=half-seed0"]


@pytest.mark.parametrize(
    ("names", "recipe", "settings"),
    [
        (("resnet18", "resnet18:folded_3x3"), "finetune", {}),  # whose recipe converts
        (("preact_resnet20", "cmpe_se_preact_resnet20:se"), "digits", {"view": "double_fc"}),
        (("wrn16_4", "wrn16_4:se:start=half:bias=true", "wrn16_4:se"), "digits", {"start": "one", "mask": 0.5}),
    ],
)
def test_each_run_is_told_all_that_it_varies(names, recipe, settings, tmp_path):
    """The command line that a run is started with, read as the command reads it."""
    compared = grid(tmp_path, names, recipe=recipe, **settings)
    compared.recipe.write_text(compared.config.to_yaml())
    told = [_job(compared, cell) for cell in compared.cells]
    assert all(isinstance(value, str | int | float | None) for job in told for _, value in job.settings)
    for cell, job in zip(compared.cells, told, strict=True):
        assert set(VARIED) <= dict(job.settings).keys()
        arguments = _as_parsed(train, job.command[4:])  # behind python -m cmpe_se train
        parsed = _parser("train", arguments).parse_args(arguments)
        config = TrainingConfig.from_recipe(
            parsed["recipe"], **{name: value for name, value in vars(parsed).items() if name in FIELDS}
        )
        assert config == compared.config_of(cell)


@pytest.mark.parametrize(
    "names",
    [
        ("preact_resnet20:se", "se_preact_resnet20"),
        ("cmpe_se_preact_resnet20", "preact_resnet20:folded_3x3"),
        ("preact_resnet20:se", "preact_resnet20:se:start=half"),
        ("resnet18:folded_3x3", "cmpe_se_resnet18"),
        ("resnet18:se:start=one", "cmpe_se_resnet18:se"),
    ],
)
def test_one_network_by_two_names_is_refused(names, tmp_path):
    first, other = names
    with pytest.raises(UserError, match=f"{first} and {other} are the same network; name it once"):
        compare(models=f"preact_resnet20,{first},{other}", output=tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_networks_that_differ_in_one_setting_are_not_one():
    variants = ["", ":se", ":se:start=one", ":se:mask=0.1", ":se:reduction=4", ":double_fc", ":folded_3x3", ":static"]
    configs = {
        name: TrainingConfig().changed(**entry.settings)
        for name, entry in zip(variants, parse_entries([f"preact_resnet20{one}" for one in variants], []), strict=True)
    }
    check_networks(configs, load_data("digits"))


def test_a_network_with_other_gates_than_asked_for_is_no_result(tmp_path):
    """As of a run whose settings are right and whose network is not: seen in the gates that were trained."""
    compared = grid(tmp_path, ("preact_resnet20", "preact_resnet20:se"))
    plain, se = compared.cells[:2]
    for cell, gates in ((plain, {}), (se, {"se": 9})):
        cell.run.write_config(compared.config_of(cell))
        cell.run.write_metrics([a_record()])
        cell.run.write_result(a_result(gates=gates))
    compared.check_runs()
    assert [outcome.label for outcome in collect(compared, {})] == ["preact_resnet20", "preact_resnet20:se"]

    plain.run.write_result(a_result(gates={"folded_3x3": 9}))
    se.run.write_result(a_result(gates={"se": 8}))
    assert collect(compared, {}) == []
    assert not any(map(compared.is_finished, compared.cells))
    with pytest.raises(UserError, match="seed0 has 9 gates of view folded_3x3, and preact_resnet20 has no gates; give"):
        compared.check_runs()
    assert compared.mismatch(se).endswith("has 8 gates of view se, and preact_resnet20:se has 9 gates of view se")


def test_a_result_without_settings_is_refused(tmp_path):
    compared = grid(tmp_path)
    run = compared.cells[0].run
    run.path.mkdir(parents=True)
    run.write_result({"test_top1": 50.0})
    with pytest.raises(UserError, match=r"has a result but no config\.yaml"):
        compared.check_runs()


def test_only_what_is_compared_differs_between_cells(tmp_path):
    own = grid(tmp_path, epochs=3)
    for one, other in combinations([own.config_of(cell) for cell in own.cells], 2):
        assert one != other
        assert one.changed(model="x", view=None, seed=0) == other.changed(model="x", view=None, seed=0)


def test_networks_see_the_same_images_for_one_seed_and_others_for_another(tmp_path):
    own = grid(tmp_path)
    data = load_data("digits")

    def batches(cell):
        config = own.config_of(cell)
        kwargs = {"batch_size": config.batch_size, "seed": config.seed, "augmentation": config.augmentation}
        return [images for images, _ in data.train_batches(1, start=0, rank=0, world=1, device="cpu", **kwargs)]

    plain, competitive, plain_again, _ = map(batches, own.cells)
    assert all(torch.equal(a, b) for a, b in zip(plain, competitive, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(plain, plain_again, strict=True))


def test_runs_made_with_other_settings_are_refused(tmp_path):
    before = grid(tmp_path, epochs=3)
    before.cells[2].run.write_config(before.config_of(before.cells[2]))
    before.check_runs()
    assert before.mismatch(before.cells[0]) is None  # not begun
    with pytest.raises(UserError, match="was made with epochs 3, and this comparison has 4"):
        grid(tmp_path, epochs=4).check_runs()


@pytest.mark.parametrize("preset", slow_but(["paper-resnet", "paper-wrn"], ["paper-wrn"]))
def test_presets_are_the_papers_tables(preset, tmp_path):
    grids = preset_grids(preset, tmp_path, range(1), {})
    assert len(grids) == len({grid.folder for grid in grids}) == {"paper-resnet": 8, "paper-wrn": 12}[preset]
    assert without_published(preset) is None
    for own in grids:
        assert (own.config.epochs, own.config.lr, own.config.batch_size, own.config.flip) == (200, 0.1, 128, True)
        assert own.config.weight_decay == (1e-4 if preset == "paper-resnet" else 5e-4)
        assert [entry.settings["view"] for entry in own.entries[:2]] == [None, None]
        assert own.entries[1].model == f"se_{own.entries[0].model}"
        for entry in own.entries:
            assert timm.is_model(entry.model)
            assert (
                entry.view is None or timm.create_model(entry.model, view=entry.view, device="meta").view == entry.view
            )


@pytest.mark.parametrize("preset", ["paper-svhn", "paper-imagenet", "imagenet-classic", "imagenet-a2", "imagenet-a3"])
def test_presets_without_published_figures(preset, tmp_path):
    grids = preset_grids(preset, tmp_path, range(2), {})
    assert len(grids) == (4 if preset == "paper-svhn" else 1)
    assert not any(grid.published for grid in grids)
    note = without_published(preset)
    assert ("not at hand" in note) if preset.startswith("paper") else note is None
    for own in grids:
        assert own.entries[0] == Entry(own.entries[0].model)
        assert own.config.data in ("svhn", "svhn_extra", "imagenet")
        assert own.config.mixup == (0.1 if preset in ("imagenet-a2", "imagenet-a3") else 0.0)
        assert not own.config.flip if "svhn" in own.config.data else own.config.flip
        for entry in own.entries[1:]:
            settings = entry.settings
            assert entry.has_gates
            assert settings["convert"] == (entry.view if own.config.data == "imagenet" else None)


def test_imagenets_presets_are_one_network_in_several_ways(tmp_path):
    (own,) = preset_grids("imagenet-a3", tmp_path, range(1), {})
    assert [entry.label for entry in own.entries] == ["resnet50", "resnet50:se", "resnet50:folded_3x3"]
    assert (own.config.image_size, own.config.test_image_size, own.config.loss) == (160, 224, "bce")


def test_published_figures():
    """A few of the paper's numbers, as accuracies."""
    figures = {
        grid.folder.name: grid.published
        for preset in PRESETS[:2]
        for grid in preset_grids(preset, Path("x"), range(1), {})
    }
    assert figures["preact_resnet164-cifar10"]["preact_resnet164"] == 94.54
    assert figures["preact_resnet164-cifar100-mixup"]["cmpe_se_preact_resnet164:double_fc"] == 80.42
    assert figures["wrn28_10-cifar10"]["cmpe_se_wrn28_10:pair_view_1x1"] == 96.42
    assert figures["wrn16_8-cifar100"] == {"cmpe_se_wrn16_8:pair_view_1x1": 80.23}
    assert figures["preact_resnet110-cifar10-mixup"] == {"cmpe_se_preact_resnet110:pair_view_1x1": 95.7}
    assert sum(map(len, figures.values())) == 62


def test_a_presets_columns_are_chosen_by_data_and_mixup(tmp_path):
    folders = [grid.folder.name for grid in preset_grids("paper-wrn", tmp_path, range(1), {"data": "cifar100"})]
    assert len(folders) == 6
    assert all("cifar100" in name for name in folders)
    (both,) = {g.config.mixup for g in preset_grids("paper-wrn", tmp_path, range(1), {"data": "cifar10", "mixup": 1.0})}
    assert both == 1.0
    with pytest.raises(UserError, match="paper-wrn is for data cifar10 or cifar100 and mixup 0 or 1; give such"):
        preset_grids("paper-wrn", tmp_path, range(1), {"data": "svhn"})
    with pytest.raises(UserError, match="imagenet-a3 is for data imagenet; give such"):
        preset_grids("imagenet-a3", tmp_path, range(1), {"data": "folder"})
    with pytest.raises(UserError, match="no preset 'paper'; choose one of paper-resnet, paper-wrn, paper-svhn"):
        preset_grids("paper", tmp_path, range(1), {})


@pytest.mark.parametrize(
    ("settings", "seeds"),
    [({}, [0, 1, 2]), ({"first_seed": 7, "seeds": 1}, [7]), ({"first_seed": 6, "seeds": 3}, [6, 7, 8])],
)
def test_seeds_begin_where_one_says(settings, seeds, tmp_path, monkeypatch):
    asked = []
    module = sys.modules[compare.__module__]  # the package has the function under the module's name
    monkeypatch.setattr(module, "run_cells", lambda grid, cells, *_: asked.extend(cells) or {})
    compare(models="preact_resnet20,se_preact_resnet20", output=tmp_path, device="cpu", **settings)
    assert [cell.seed for cell in asked if cell.entry.model == "preact_resnet20"] == seeds
    assert {cell.run.path.name.rpartition("-seed")[2] for cell in asked} == set(map(str, seeds))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({}, "name the networks"),
        ({"models": "preact_resnet20,se_preact_resnet20", "seed": 1}, "sets seed by itself"),
        ({"models": "preact_resnet20,se_preact_resnet20", "seeds": 0}, "should be at least 1"),
        ({"models": "preact_resnet20,se_preact_resnet20", "first_seed": -1}, "first_seed is -1, should be at least 0"),
        ({"models": "se_preact_resnet20,se_preact_resnet20:reduction=16"}, "are the same network; name it once"),
        ({"models": "preact_resnet20,se_preact_resnet20", "part": "3/2"}, "give I/N with I from 1 to N"),
        ({"models": "preact_resnet20,se_preact_resnet20", "preset": "paper-wrn"}, "a preset has its own networks"),
        ({"models": "preact_resnet20,se_preact_resnet21"}, "no network 'se_preact_resnet21'"),
        (
            {"models": "preact_resnet20,se_preact_resnet20", "primary": "wrn16_4:se"},
            "it has preact_resnet20, se_preact",
        ),
        ({"models": "preact_resnet20,se_preact_resnet20", "margin": -1}, "margin is -1"),
        ({"preset": "paper-wrn", "primary": "wrn16_8:se_wrn16_8"}, "primary is for one comparison"),
        ({"models": "preact_resnet20,se_preact_resnet20", "sd": 0.4}, "sd is for a plan; add --plan"),
        ({"plan": True, "effect": 0.3}, "a plan needs --effect and --sd in points"),
        ({"plan": True, "effect": 0.3, "sd": 0.4, "seeds": 5}, "a plan needs no seeds"),
        ({"plan": True, "effect": 0.3, "sd": 0.4, "margin": 0.1}, "a plan needs no margin"),
        ({"plan": True, "effect": 0.3, "sd": 0.4, "lr": 0.1}, "a plan needs no lr"),
        ({"plan": True, "effect": -0.3, "sd": 0.4}, "effect is -0.3"),
        ({"models": "preact_resnet20,se_preact_resnet20", "epoch": 3}, "setting epoch does not exist"),
        ({"models": "preact_resnet20,resnet18:folded_3x3", "lr": -1}, "lr is -1"),
    ],
)
def test_mistakes_are_found_before_anything_is_made(settings, complaint, tmp_path):
    with pytest.raises(UserError, match=complaint):
        compare(output=tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_an_entry_makes_its_network():
    data = load_data("digits")
    config = TrainingConfig.from_recipe("digits")
    network, _ = create_network(config.changed(**Entry("preact_resnet20", "double_fc").settings), data)
    assert network.view == "double_fc"


def test_an_interrupted_comparison_stops_its_runs(tmp_path, monkeypatch):
    """Else closing would wait, for hours, until what is being trained has finished."""
    did = []
    module = sys.modules[compare.__module__]
    place = SimpleNamespace(stop=lambda: did.append("stop"), close=lambda: did.append("close"))
    monkeypatch.setattr(module, "_place", lambda *_: place)

    def insist(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run_cells", insist)
    with pytest.raises(KeyboardInterrupt):
        compare(models="preact_resnet20,se_preact_resnet20", output=tmp_path, device="cpu")
    assert did == ["stop", "close"]


def test_a_batch_that_does_not_fit_is_measured_in_parts(tmp_path, monkeypatch):
    """A dry run halves the images of a step until they fit, and says what training needs."""
    tried = []

    def measure(config, shape, device, count):
        tried.append(count)
        if count > 20:
            raise torch.OutOfMemoryError("no room")
        return {"training": 0.001, "forward": 0.0005}

    monkeypatch.setattr(estimate, "_measure", measure)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    grid = Grid(tmp_path, (Entry("preact_resnet20"),), range(1), TrainingConfig(data="cifar10", batch_size=128), {})
    console = Console(record=True, width=200)
    (row,) = estimate.estimate(grid, grid.cells, console)
    assert tried == [128, 64, 32, 16]
    assert "training needs --accumulate 8" in console.export_text()
    assert row["milliseconds"] == 128.0
    assert row["hours"] == pytest.approx(30 * (390 * 0.128 + 10_000 * 0.0005) / 3600)
