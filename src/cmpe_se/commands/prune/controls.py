"""The controls of a pruning: what a reviewer asks for, trained beside it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cmpe_se.commands.compare.outcomes import Outcome
from cmpe_se.commands.compare.presenting import summary_rows, to_markdown, to_rich
from cmpe_se.commands.prune.images import batches_to_measure, load_images
from cmpe_se.commands.prune.record import PruningRecord
from cmpe_se.commands.prune.starting import rebuilt, write_recipe, write_start
from cmpe_se.commands.train import train
from cmpe_se.data import ImageData
from cmpe_se.pruning import Pruned
from cmpe_se.pruning import prune as prune_network
from cmpe_se.pruning.widths import Widths
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.provenance import provenance, write_table
from cmpe_se.training.run_folder import RunFolder
from cmpe_se.utils.devices import choose_device
from cmpe_se.utils.escaping import markdown_code
from cmpe_se.utils.files import os_errors_as, write_text
from cmpe_se.utils.terminal import Terminal
from cmpe_se.utils.text import counted

FOLDER = "controls"
"""Folder, in the pruned run's, of the controls' runs."""


@dataclass(frozen=True, eq=False)
class Controls:
    """Trainings beside a pruned run, with the same data, epochs and recipe.

    Args:
        parent: the run that was pruned.
        config: its settings.
        target: the pruned run.
        record: what was pruned there.
        seeds: number of seeds of each.
    """

    parent: RunFolder
    config: TrainingConfig
    target: RunFolder
    record: PruningRecord
    seeds: int

    def run(self) -> list[dict[str, Any]]:
        """Train what is not there yet, write compare.md and compare.csv, and return the rows."""
        folder = self.target.path / FOLDER
        with os_errors_as(f"cannot write to {folder}"):
            folder.mkdir(exist_ok=True)
        criterion = self.record["criterion"]
        criteria = [criterion, *(other for other in ("l1", "random") if other != criterion)]
        arms: dict[str, Callable[[str, int], RunFolder]] = {
            f"pruned by {one}": partial(self._finetuned, one) for one in criteria
        }
        arms["whole, trained on"] = self._trained_on
        arms["same shape, from scratch"] = partial(self._from_scratch, lambda: self.record["widths"])
        arms["thinner, from scratch"] = partial(self._from_scratch, self._thin_widths)
        outcomes = []
        for label, make in arms.items():
            name = label.replace("pruned by ", "").partition(",")[0].replace(" ", "-")
            runs = {seed: make(name, seed) for seed in range(self.seeds)}
            outcomes.append(_outcome(label, runs))
        return self._write(outcomes)

    def _finetuned(self, criterion: str, name: str, seed: int) -> RunFolder:
        folder = self.target.path / FOLDER
        # Random pruning differs from seed to seed; what the others choose does not.
        start = folder / (f"{name}-start{seed}" if criterion == "random" else f"{name}-start")
        recipe = start / "recipe.yaml"
        if not recipe.exists():
            widths = self._pruned_start(criterion, seed, start)
            write_recipe(self.config, recipe, widths, **self._training(), pretrained=str(start / "pruned"))
        return _trained(folder / f"{name}-seed{seed}", recipe, seed)

    def _trained_on(self, name: str, seed: int) -> RunFolder:
        """The network that was pruned, trained on without that: what the epochs alone are worth."""
        folder = self.target.path / FOLDER
        recipe = folder / f"{name}.yaml"
        if not recipe.exists():
            write_recipe(self.config, recipe, {}, **self._training(), pretrained=str(self.parent.path))
        return _trained(folder / f"{name}-seed{seed}", recipe, seed)

    def _from_scratch(self, widths: Callable[[], Widths], name: str, seed: int) -> RunFolder:
        folder = self.target.path / FOLDER
        recipe = folder / f"{name}.yaml"
        if not recipe.exists():
            # From scratch a network needs the learning rate of the run, not that of its repair.
            settings = self._training() | {"lr": self.config.lr, "warmup_epochs": self.config.warmup_epochs}
            write_recipe(self.config, recipe, widths(), **settings, pretrained=None)
        return _trained(folder / f"{name}-seed{seed}", recipe, seed)

    def _training(self) -> dict[str, Any]:
        return {"epochs": self.record["epochs"], "lr": self.record["lr"]}

    def _prune(self, criterion: str, seed: int, *, layerwise: bool) -> tuple[ImageData, Pruned]:
        model = self.parent.load_model().to(choose_device(self.config.device))
        data = load_images(self.parent, self.config, moved=self.config != self.parent.read_config())
        return data, prune_network(
            model,
            self.record["target_macs"],
            images=batches_to_measure(data, self.record["images"]),
            criterion=criterion,
            layerwise=layerwise,
            steps=self.record["steps"],
            round_to=self.record["round_to"],
            seed=seed,
        )

    def _pruned_start(self, criterion: str, seed: int, start: Path) -> Widths:
        data, pruned = self._prune(criterion, seed, layerwise=self.record["layerwise"])
        write_start(self.parent, rebuilt(self.parent, pruned.network.cpu(), pruned.widths), pruned.widths, start, data)
        return pruned.widths

    def _thin_widths(self) -> Widths:
        """Every layer thinner by the same part; which channels these are does not matter from scratch."""
        _, pruned = self._prune("l1", 0, layerwise=True)
        return pruned.widths

    def _write(self, outcomes: list[Outcome]) -> list[dict[str, Any]]:
        folder = self.target.path / FOLDER
        rows: list[dict[str, Any]] = [dict(row) for row in summary_rows(outcomes)]
        source = provenance()
        notes = [
            f"All from {self.parent.path.name} or in its recipe, for {counted(self.record['epochs'], 'epoch')}; at "
            f"most {self.record['target_macs']:g} of its {self.record['multiply_adds'][0]:,} multiply-adds. Pruned "
            "networks start from its weights; their seeds order images and augmentation (and choose at random).",
            f"Commit {source['commit']}; command: {markdown_code(source['command'])}",
        ]
        title = f"Pruned by {self.record['criterion']}, and the controls, {counted(self.seeds, 'seed')}"
        with os_errors_as(f"cannot write to {folder}"):
            write_table(folder / "compare.csv", rows)
            write_text(folder / "compare.md", to_markdown(outcomes, title=title, notes=notes))
        console = Terminal()
        console.print(to_rich(outcomes))
        console.print(f"{folder / 'compare.md'}", highlight=False, soft_wrap=True)
        return rows


def _trained(path: Path, recipe: Path, seed: int) -> RunFolder:
    run = RunFolder(path)
    if run.config.exists():
        train(resume=path)
    else:
        train(recipe=recipe, output=path, seed=seed)
    return run


def _outcome(label: str, runs: dict[int, RunFolder]) -> Outcome:
    results = {seed: run.read_result() for seed, run in runs.items()}
    first = results[0]
    return Outcome(
        label,
        first["params"],
        first["macs"],
        {seed: result["test_top1"] for seed, result in results.items()},
        [result["train_seconds"] for result in results.values()],
        {seed: run.read_metrics() for seed, run in runs.items()},
    )
