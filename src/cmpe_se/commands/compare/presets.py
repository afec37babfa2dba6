"""Comparisons under one word: the paper's tables with its published metrics beside ours, and recipes for ImageNet.

Published test errors: arXiv 1807.08920, for CIFAR-10 and CIFAR-100, each without and with mixup. A plain and an SE
network stand in each comparison even where the paper has no number for them: the others are compared with them. The
paper reports SVHN and ImageNet too, but its figures for them are not at hand, nor which of its networks they are of.
"""

from pathlib import Path
from typing import NamedTuple

from cmpe_se.commands.compare.grid import Entry, Grid
from cmpe_se.errors import UserError
from cmpe_se.networks.registry import is_ours
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.data_settings import with_whole_paths


class _Row(NamedTuple):
    """A network of a table: view of the attention, and published test errors in percent by column."""

    view: str | None
    errors: tuple[float | None, ...] = ()


class _Column(NamedTuple):
    """A training of a table."""

    name: str
    settings: dict


class _Preset(NamedTuple):
    """Tables of networks by their base, each trained as the columns say under a recipe."""

    recipe: str
    settings: dict
    columns: tuple[_Column, ...]
    tables: dict[str, list[_Row]]

    @property
    def has_published(self) -> bool:
        """Whether there is any published figure."""
        return any(error is not None for rows in self.tables.values() for row in rows for error in row.errors)

    @property
    def choices(self) -> str:
        """What chooses a column, in words."""
        values: dict[str, list[str]] = {}
        for column in self.columns:
            for name, value in column.settings.items():
                if (text := f"{value:g}" if isinstance(value, float) else value) not in values.setdefault(name, []):
                    values[name].append(text)
        return " and ".join(f"{name} {' or '.join(texts)}" for name, texts in values.items())


_CIFAR = (
    _Column("cifar10", {"data": "cifar10", "mixup": 0.0}),
    _Column("cifar10-mixup", {"data": "cifar10", "mixup": 1.0}),
    _Column("cifar100", {"data": "cifar100", "mixup": 0.0}),
    _Column("cifar100-mixup", {"data": "cifar100", "mixup": 1.0}),
)
_SVHN = (_Column("svhn", {"data": "svhn"}), _Column("svhn-extra", {"data": "svhn_extra"}))
_IMAGENET = (_Column("imagenet", {"data": "imagenet"}),)

_NONE = (None, None, None, None)
_PAPER: dict[str, dict[str, list[_Row]]] = {
    "paper-resnet": {
        "preact_resnet110": [
            _Row(None, (6.37, None, None, 23.98)),
            _Row("se", (5.68, None, 25.82, None)),
            _Row("pair_view_1x1", (5.45, 4.30, 25.35, 22.92)),
        ],
        "preact_resnet164": [
            _Row(None, (5.46, 4.15, 24.33, 20.84)),
            _Row("se", (4.85, 4.07, 22.61, 19.89)),
            _Row("double_fc", (4.72, 3.82, 22.38, 19.58)),
            _Row("pair_view_2x1", (4.59, 3.76, 22.41, 19.69)),
            _Row("pair_view_1x1", (4.57, 3.78, 22.35, 19.46)),
        ],
    },
    "paper-wrn": {
        "wrn16_8": [_Row(None, _NONE), _Row("se", _NONE), _Row("pair_view_1x1", (4.20, 3.18, 19.77, 17.26))],
        "wrn22_10": [
            _Row(None, (4.44, None, 20.75, 17.88)),
            _Row("se", (4.09, None, 19.52, 17.06)),
            _Row("pair_view_1x1", (3.75, 2.86, 18.86, 16.82)),
        ],
        "wrn28_10": [
            _Row(None, (4.17, 2.70, 20.50, 17.50)),
            _Row("se", (3.88, 2.68, 19.05, 16.77)),
            _Row("double_fc", (3.66, 2.62, 18.69, 16.23)),
            _Row("pair_view_2x1", (3.73, 2.65, 18.71, 16.18)),
            _Row("pair_view_1x1", (3.58, 2.58, 18.55, 16.13)),
        ],
    },
}
_PAPERS_VIEWS = (None, "se", "double_fc", "pair_view_2x1", "pair_view_1x1")
_MATCHED = {"resnet50": [_Row(None), _Row("se"), _Row("folded_3x3")]}  # one network, three ways

_PRESETS = {
    "paper-resnet": _Preset("cifar-paper", {"weight_decay": 1e-4}, _CIFAR, _PAPER["paper-resnet"]),
    "paper-wrn": _Preset("cifar-paper", {"weight_decay": 5e-4}, _CIFAR, _PAPER["paper-wrn"]),
    "paper-svhn": _Preset(
        "svhn",
        {},
        _SVHN,
        {
            "preact_resnet164": [_Row(view) for view in _PAPERS_VIEWS],
            "wrn16_8": [_Row(None), _Row("se"), _Row("pair_view_1x1")],
        },
    ),
    "paper-imagenet": _Preset("imagenet-classic", {}, _IMAGENET, {"resnet50": [_Row(view) for view in _PAPERS_VIEWS]}),
    "imagenet-classic": _Preset("imagenet-classic", {}, _IMAGENET, _MATCHED),
    "imagenet-a3": _Preset("imagenet-a3", {}, _IMAGENET, _MATCHED),
    "imagenet-a2": _Preset("imagenet-a2", {}, _IMAGENET, _MATCHED),
}
PRESETS = tuple(_PRESETS)
"""Names of the presets."""


def preset_grids(preset: str, folder: Path, seeds: range, settings: dict) -> list[Grid]:
    """A comparison for each base network and column of a preset, each in a folder of its own.

    Args:
        preset: one of :data:`PRESETS`.
        folder: holds their folders.
        seeds: of each.
        settings: fields that win over the preset's recipe; those that its columns differ in, such as ``data`` and
            ``mixup``, choose columns.

    Raises:
        UserError: an unknown preset, or settings that no column has.
    """
    if preset not in _PRESETS:
        raise UserError(f"no preset '{preset}'; choose one of {', '.join(PRESETS)}")
    chosen = _PRESETS[preset]
    columns = [
        (number, column)
        for number, column in enumerate(chosen.columns)
        if all(settings.get(name, value) == value for name, value in column.settings.items())
    ]
    if not columns:
        raise UserError(f"{preset} is for {chosen.choices}; give such settings, or leave them out for all of it")
    grids = []
    for number, column in columns:
        own = chosen.settings | column.settings | settings
        config = with_whole_paths(TrainingConfig.from_recipe(chosen.recipe, **own))
        for base, rows in chosen.tables.items():
            errors = {_entry(base, row.view): row.errors[number] for row in rows if row.errors}
            published = {entry.label: round(100 - error, 2) for entry, error in errors.items() if error is not None}
            entries = tuple(_entry(base, row.view) for row in rows)
            grids.append(Grid(folder / f"{base}-{column.name}", entries, seeds, config, published))
    return grids


def without_published(preset: str) -> str | None:
    """A sentence where the paper has figures for a preset's data that are not at hand; None for other presets."""
    if not preset.startswith("paper-") or _PRESETS[preset].has_published:
        return None
    return (
        f"{preset}: the paper's published figures for this data, and its exact networks and schedule, are not at hand; "
        "these are networks of its other tables"
    )


def _entry(base: str, view: str | None) -> Entry:
    if view is None:
        return Entry(base)
    if not is_ours(base):
        return Entry(base, view)  # converted
    return Entry(f"se_{base}") if view == "se" else Entry(f"cmpe_se_{base}", view)
