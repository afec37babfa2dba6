"""The paper's tables as comparisons: its networks, its recipe, and its published metrics beside the measured ones.

Published test errors: arXiv 1807.08920, for CIFAR-10 and CIFAR-100, each without and with mixup. A plain and an SE
network stand in each comparison even where the paper has no number for them: the others are compared with them.
"""

from pathlib import Path
from typing import NamedTuple

from cmpe_se.commands.compare.grid import Entry, Grid
from cmpe_se.errors import UserError
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.data_settings import with_whole_paths


class _Row(NamedTuple):
    """A network of the paper's tables: view of the attention, and test errors in percent by column."""

    view: str | None
    errors: tuple[float | None, float | None, float | None, float | None]


class _Column(NamedTuple):
    """A training of the paper's tables."""

    name: str
    settings: dict


COLUMNS = (
    _Column("cifar10", {"data": "cifar10", "mixup": 0.0}),
    _Column("cifar10-mixup", {"data": "cifar10", "mixup": 1.0}),
    _Column("cifar100", {"data": "cifar100", "mixup": 0.0}),
    _Column("cifar100-mixup", {"data": "cifar100", "mixup": 1.0}),
)
"""The columns of the paper's tables."""

_NONE = (None, None, None, None)
_TABLES: dict[str, dict[str, list[_Row]]] = {
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
_RECIPES = {"paper-resnet": {"weight_decay": 1e-4}, "paper-wrn": {"weight_decay": 5e-4}}
PRESETS = tuple(_TABLES)
"""Names of the presets."""


def preset_grids(preset: str, folder: Path, seeds: range, settings: dict) -> list[Grid]:
    """A comparison for each base network and column of the paper's table, each in a folder of its own.

    Args:
        preset: one of :data:`PRESETS`.
        folder: holds their folders.
        seeds: of each.
        settings: fields that win over the paper's recipe; ``data`` and ``mixup`` choose columns.

    Raises:
        UserError: an unknown preset, or ``data`` and ``mixup`` that no column has.
    """
    if preset not in _TABLES:
        raise UserError(f"no preset '{preset}'; choose of {', '.join(PRESETS)}")
    columns = [
        (number, column)
        for number, column in enumerate(COLUMNS)
        if all(settings.get(name, value) == value for name, value in column.settings.items())
    ]
    if not columns:
        raise UserError("the paper has cifar10 and cifar100, each with mixup 0 and 1; give such --data and --mixup")
    grids = []
    for number, column in columns:
        own = _RECIPES[preset] | column.settings | settings
        config = with_whole_paths(TrainingConfig.from_recipe("cifar-paper", **own))
        for base, rows in _TABLES[preset].items():
            entries = {_entry(base, row.view): row.errors[number] for row in rows}
            published = {entry.label: round(100 - error, 2) for entry, error in entries.items() if error is not None}
            grids.append(Grid(folder / f"{base}-{column.name}", tuple(entries), seeds, config, published))
    return grids


def _entry(base: str, view: str | None) -> Entry:
    if view is None:
        return Entry(base)
    return Entry(f"se_{base}") if view == "se" else Entry(f"cmpe_se_{base}", view)
