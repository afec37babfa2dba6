"""The grid of a comparison: networks, seeds, and the folder of each run."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from cmpe_se.commands.compare.networks import gates_of
from cmpe_se.errors import UserError
from cmpe_se.layers.views import GATE_SETTINGS, TABLE
from cmpe_se.networks.registry import is_ours, view_of
from cmpe_se.training.config import GATE_FIELDS, TrainingConfig
from cmpe_se.training.gate_settings import with_pretrained_gates
from cmpe_se.training.run_folder import RunFolder

VARIED = ("model", "view", "convert", "seed")
"""Fields of a configuration that a comparison sets by itself."""

_COMPETITIVE = "cmpe_se_"
_WITHOUT_GATES = {field.name: field.default for field in fields(TrainingConfig) if field.name in GATE_FIELDS}


class Entry(NamedTuple):
    """A network of the comparison.

    ``model`` is a name that timm knows, ``view`` a view of our attention where one was asked for, ``options`` its own
    gate settings as (name, text) in the order in which they were typed.
    """

    model: str
    view: str | None = None
    options: tuple[tuple[str, str], ...] = ()

    @property
    def label(self) -> str:
        """As it is written on the command line and in tables: ``NAME[:VIEW][:key=value...]``."""
        options = (f"{name}={text}" for name, text in self.options)
        return ":".join([self.model, *([self.view] if self.view else []), *options])

    @property
    def has_gates(self) -> bool:
        """Whether a view was asked for, or the name stands for one."""
        return view_of(self.model, self.view) is not None

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of a configuration that make this network; foreign networks are converted to the view.

        Gate settings of the whole comparison are for networks with gates. One without has the defaults, so that the
        baseline is the same whatever the gates of the others are.
        """
        own = is_ours(self.model)
        network = {"model": self.model, "view": self.view if own else None, "convert": None if own else self.view}
        if not self.has_gates:
            return network | _WITHOUT_GATES
        return network | {name: _value(text) for name, text in self.options}


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
        seeds: of each network.
        config: everything else.
        published: accuracies in percent that a paper states, by label.
    """

    folder: Path
    entries: tuple[Entry, ...]
    seeds: range
    config: TrainingConfig
    published: dict[str, float]

    @property
    def recipe(self) -> Path:
        """The configuration as a file, which every run is started with."""
        return self.folder / "recipe.yaml"

    @property
    def cells(self) -> list[Cell]:
        """All runs, seed by seed: runs that are finished at an interruption can be compared."""
        return [self.cell(entry, seed) for seed in self.seeds for entry in self.entries]

    def cell(self, entry: Entry, seed: int) -> Cell:
        """The run of a network with a seed."""
        name = re.sub(r"[^\w.=-]", "_", f"{entry.label}-seed{seed}".replace(":", "-"))
        return Cell(entry, seed, RunFolder(self.folder / "cells" / name))

    def config_of(self, cell: Cell) -> TrainingConfig:
        """The whole configuration of a run."""
        config = self.config.changed(**cell.entry.settings, seed=cell.seed)
        # As train does: gates are those of the weights that they start from.
        return with_pretrained_gates(config, dict(cell.entry.options)) if config.pretrained else config

    def settings_of(self, cell: Cell) -> dict[str, Any]:
        """What a run is told beside the recipe: all that a comparison varies, and every other field of its own.

        A field is told even where it is None: a recipe that converts would else convert the plain network too.
        """
        shared = asdict(self.config)
        own = asdict(self.config_of(cell))
        return {name: own[name] for name in own if name in VARIED or own[name] != shared[name]}

    def check_runs(self) -> None:
        """Refuse runs in the folder that were made with other settings: they would not be a matched comparison."""
        for cell in self.cells:
            if mismatch := self.mismatch(cell):
                raise UserError(f"{mismatch}; give the same settings, or name another --output")

    def mismatch(self, cell: Cell) -> str | None:
        """The first thing in which a run differs from what this comparison asks for; None if there is none.

        Its settings and, once it has finished, the gates of the network that was trained.
        """
        if not cell.run.config.is_file():
            left = f"{cell.run.path} has a result but no config.yaml, so nothing tells what it was trained with"
            return left if cell.run.result.exists() else None
        found, wanted = cell.run.read_config(), self.config_of(cell)
        for name in (field.name for field in fields(wanted)):
            if getattr(found, name) != getattr(wanted, name):
                return (
                    f"{cell.run.path} was made with {name} {getattr(found, name)}, and this comparison has "
                    f"{getattr(wanted, name)}"
                )
        made = cell.run.read_result().get("gates") if cell.run.result.exists() else None  # earlier runs do not say
        asked = gates_of(wanted.model, wanted.view, wanted.convert) if made is not None else None
        if made != asked:
            return f"the network in {cell.run.path} has {_words(made)}, and {cell.entry.label} has {_words(asked)}"
        return None

    def is_finished(self, cell: Cell) -> bool:
        """Whether a run has a result, and one of what this comparison asks for."""
        return cell.run.result.exists() and self.mismatch(cell) is None

    def check_entries(self) -> None:
        """Refuse two entries that are one network, and settings that no network can have."""
        labels: dict[str, str] = {}
        for entry in self.entries:
            try:
                config = self.config.changed(**entry.settings)
            except UserError as error:
                raise UserError(f"{entry.label}: {error}") from None
            # as text: a configuration holds lists, which no dictionary takes as keys
            same = labels.setdefault(config.to_yaml(), entry.label)
            if same != entry.label:
                raise UserError(f"{same} and {entry.label} are the same network; name it once")


def parse_entries(models: Sequence[str], views: Sequence[str]) -> tuple[Entry, ...]:
    """Networks from names, ``NAME[:VIEW][:key=value...]``; a name with our prefix and no view takes all ``views``.

    Raises:
        UserError: an unknown view, a setting that is none of :data:`GATE_SETTINGS`, makes no difference to the view or
            is for a network without gates, a name twice, views for no network, fewer than two networks.
    """
    entries, used = [], False
    for name in models:
        entry = _parse_entry(name)
        expands = bool(views) and entry.view is None and entry.model.startswith(_COMPETITIVE)
        used = used or expands
        entries += [entry._replace(view=view) for view in views] if expands else [entry]
    if unknown := [entry.view for entry in entries if entry.view and entry.view not in TABLE]:
        raise UserError(f"unknown view '{unknown[0]}'; choose of {', '.join(TABLE)}")
    if gateless := [entry for entry in entries if entry.options and not entry.has_gates]:
        raise UserError(
            f"{gateless[0].label}: {gateless[0].model} has no gates to set; name a view, such as "
            f"{gateless[0].model}:se:{gateless[0].label.split(':')[1]}"
        )
    for entry in entries:
        view = view_of(entry.model, entry.view) if entry.options else None
        kind = TABLE[view] if view else None
        if kind and (ignored := [name for name, _ in entry.options if name not in kind.settings]):
            raise UserError(
                f"{entry.label}: {ignored[0]} makes no difference to this gate; these settings do: "
                f"{', '.join(kind.settings)}"
            )
    if views and not used:
        raise UserError(f"--views are for names that begin with {_COMPETITIVE}, and --models has none; write NAME:VIEW")
    if twice := [entry.label for entry in entries if entries.count(entry) > 1]:
        raise UserError(f"{twice[0]} is named twice; name each network once")
    if len(entries) < 2:
        raise UserError("a comparison needs at least two networks; the first one is what the others are compared with")
    return tuple(entries)


def _parse_entry(text: str) -> Entry:
    model, *parts = text.split(":")
    view = parts.pop(0) if parts and "=" not in parts[0] else None
    options: list[tuple[str, str]] = []
    for part in parts:
        name, equals, value = part.partition("=")
        if not (equals and value and name in GATE_SETTINGS):
            raise UserError(
                f"{text}: '{part}' is no setting of a gate; write NAME:VIEW:key=value with key one of "
                f"{', '.join(GATE_SETTINGS)}"
            )
        if name in dict(options):
            raise UserError(f"{text}: {name} is given twice")
        options.append((name, value))
    return Entry(model, view or None, tuple(options))


def _words(gates: dict[str, int] | None) -> str:
    return ", ".join(f"{number} gates of view {view}" for view, number in (gates or {}).items()) or "no gates"


def _value(text: str) -> Any:
    """As a recipe would read it; what is no YAML stays text, and the field's type refuses it."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
