"""The grid of a comparison: which networks, which seeds, and where each run of them is."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

from cmpe_se.config import TrainingConfig
from cmpe_se.errors import UserError
from cmpe_se.networks.registry import PLAIN_NETWORKS, PREFIXES
from cmpe_se.run_folder import RunFolder
from cmpe_se.views import VIEWS

_COMPETITIVE = "cmpe_se_"
_OURS = {prefix + base for base in PLAIN_NETWORKS for prefix in PREFIXES}


class Entry(NamedTuple):
    """A network of the comparison: a name that timm knows, and a view of our attention where one was asked for."""

    model: str
    view: str | None = None

    @property
    def label(self) -> str:
        """As it is written on the command line and in tables."""
        return f"{self.model}:{self.view}" if self.view else self.model

    @property
    def settings(self) -> dict[str, str | None]:
        """The fields of a configuration that make this network; foreign networks are converted to the view."""
        own = self.model in _OURS or self.model.startswith(_COMPETITIVE)
        return {"model": self.model, "view": self.view if own else None, "convert": None if own else self.view}


class Cell(NamedTuple):
    """One run of the grid."""

    entry: Entry
    seed: int
    run: RunFolder

    @property
    def log(self) -> Path:
        """What its process prints."""
        return self.run.path.with_name(self.run.path.name + ".log")


@dataclass(frozen=True)
class Grid:
    """Networks and seeds under one configuration, in one folder.

    Args:
        folder: holds ``recipe.yaml`` and the runs in ``cells/``.
        entries: the networks; the first one is what the others are compared with.
        seeds: 0 to this, without it.
        config: everything else.
        published: accuracies in percent that a paper states, by label.
    """

    folder: Path
    entries: tuple[Entry, ...]
    seeds: int
    config: TrainingConfig
    published: dict[str, float]

    @property
    def recipe(self) -> Path:
        """The configuration as a file, which every run is started with."""
        return self.folder / "recipe.yaml"

    @property
    def cells(self) -> list[Cell]:
        """All runs, seed by seed: whatever is finished when somebody stops it can be compared."""
        return [self.cell(entry, seed) for seed in range(self.seeds) for entry in self.entries]

    def cell(self, entry: Entry, seed: int) -> Cell:
        """The run of a network with a seed."""
        name = f"{entry.label}-seed{seed}".replace(":", "-").replace("/", "_")
        return Cell(entry, seed, RunFolder(self.folder / "cells" / name))

    def config_of(self, cell: Cell) -> TrainingConfig:
        """The whole configuration of a run."""
        return self.config.changed(**cell.entry.settings, seed=cell.seed)

    def check_runs(self) -> None:
        """Refuse runs in the folder that were made with other settings: they would not be a matched comparison."""
        for cell in self.cells:
            if not cell.run.config.is_file():
                continue
            found, wanted = cell.run.read_config(), self.config_of(cell)
            others = [
                field.name for field in fields(wanted) if getattr(found, field.name) != getattr(wanted, field.name)
            ]
            if others:
                name = others[0]
                raise UserError(
                    f"{cell.run.path} was made with {name} {getattr(found, name)}, and this comparison has "
                    f"{getattr(wanted, name)}; give the same settings, or name another --output"
                )


def parse_entries(models: Sequence[str], views: Sequence[str]) -> tuple[Entry, ...]:
    """Networks from names, ``NAME`` or ``NAME:VIEW``; a name with our prefix and no view takes all ``views``.

    Raises:
        UserError: an unknown view, a name twice, views for no network, fewer than two networks.
    """
    entries, used = [], False
    for name in models:
        model, colon, view = name.partition(":")
        expands = bool(views) and not colon and model.startswith(_COMPETITIVE)
        used = used or expands
        entries += [Entry(model, view or None) for view in (views if expands else [view])]
    if unknown := [entry.view for entry in entries if entry.view and entry.view not in VIEWS]:
        raise UserError(f"unknown view '{unknown[0]}'; choose of {', '.join(VIEWS)}")
    if views and not used:
        raise UserError(f"--views are for names that begin with {_COMPETITIVE}, and --models has none; write NAME:VIEW")
    if twice := [entry.label for entry in entries if entries.count(entry) > 1]:
        raise UserError(f"{twice[0]} is there twice; name each network once")
    if len(entries) < 2:
        raise UserError("a comparison needs at least two networks; the first one is what the others are compared with")
    return tuple(entries)
