"""Would another gate be better? Changes of it against the paper's own in a finished comparison, seed by seed.

    python benchmarks/gate_variants.py runs/compare-folder --variants near_one,std_squeeze --seeds 2 --output results/

The comparison (made by `cmpe-se compare`) gives recipe, data and the runs to compare with: the plain network, SE, and
the competitive ones.
Each variant's runs go to its folder ``variants/``, and finished ones are left alone. They are no networks to use: the
saved model does not know of the change.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MethodType
from typing import NamedTuple

import torch
from torch import Tensor, nn

import cmpe_se.training
from cmpe_se import CompetitiveSE
from cmpe_se.comparing.statistics import compare_paired, holm, summarise
from cmpe_se.config import TrainingConfig
from cmpe_se.networks.blocks import PreActBlock
from cmpe_se.provenance import write_results
from cmpe_se.run_folder import RunFolder


def near_one(block: PreActBlock) -> None:
    """A gain of 2: gates start near 1 instead of 1/2, and can amplify."""
    block.attention.gain = 2.0


def no_convolution(block: PreActBlock) -> None:
    """The 1x1 view's convolution scales a map that is normalised next; here the norm reads the picture itself."""
    block.attention.map_conv = nn.Identity()
    block.attention.map_norm = nn.BatchNorm2d(1)


def slow_statistics(block: PreActBlock) -> None:
    """Running statistics of the map norm with a momentum of 0.01 instead of 0.1."""
    block.attention.map_norm.momentum = 0.01


def max_squeeze(block: PreActBlock) -> None:
    """Squeezes are mean plus maximum over the positions."""
    _read_maps(block, lambda maps: maps.mean((2, 3)) + maps.amax((2, 3)))


def std_squeeze(block: PreActBlock) -> None:
    """Squeezes are mean plus standard deviation over the positions."""
    _read_maps(block, lambda maps: maps.mean((2, 3)) + (maps.var((2, 3), correction=0) + 1e-5).sqrt())


def _read_maps(block: PreActBlock, squeeze: Callable[[Tensor], Tensor]) -> None:
    """Squeezes that do not commute with a convolution: each reads its maps."""

    def squeezes(gate: CompetitiveSE, residual: Tensor, identity: Tensor) -> tuple[Tensor, Tensor]:
        return squeeze(residual.float()), squeeze(identity.float())

    def forward(block: PreActBlock, x: Tensor, _=None) -> tuple[Tensor, None]:
        h = torch.relu(block.bn1(x))
        shortcut = x if block.shortcut is None else block.shortcut(h)
        return block.attention(block.last_conv(block.branch(h)), shortcut), None

    block.attention._squeezes = MethodType(squeezes, block.attention)
    block.forward = MethodType(forward, block)


class Variant(NamedTuple):
    """A view of the comparison, and what is changed in each block."""

    view: str
    change: Callable[[PreActBlock], None]


VARIANTS = {
    "near_one_se": Variant("se", near_one),
    "near_one": Variant("folded_3x3", near_one),
    "slow_statistics": Variant("folded_3x3", slow_statistics),
    "max_squeeze": Variant("folded_3x3", max_squeeze),
    "std_squeeze": Variant("folded_3x3", std_squeeze),
    "no_convolution": Variant("pair_view_1x1", no_convolution),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, help="folder of a finished `cmpe-se compare`")
    parser.add_argument("--model", default="cmpe_se_preact_resnet20b", help="competitive network of the comparison")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="names with commas between")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--output", type=Path, help="folder for the CSV; without it, only train")
    options = parser.parse_args()

    names = options.variants.split(",")
    for seed in range(options.seeds):
        for name in names:
            variant_run(options.comparison, options.model, name, seed)
    if options.output:
        rows = compared(options.comparison, options.model, names, options.seeds)
        print(write_results(options.output, "gate-variants", rows, comparison=options.comparison.name))


def variant_run(comparison: Path, model: str, name: str, seed: int) -> dict:
    """The result of a variant's run, trained if it is not there."""
    run = RunFolder(comparison / "variants" / f"{name}-seed{seed}")
    if run.result.exists():
        return run.read_result()
    variant, original = VARIANTS[name], cmpe_se.training.create_network

    def changed_network(config: TrainingConfig, data) -> tuple[nn.Module, dict]:
        network, arguments = original(config, data)
        for module in network.modules():
            if isinstance(module, PreActBlock):
                variant.change(module)
        return network, arguments

    cmpe_se.training.create_network = changed_network
    network = {"model": _se(model)} if variant.view == "se" else {"model": model, "view": variant.view}
    try:
        return cmpe_se.training.train(recipe=comparison / "recipe.yaml", output=run.path, seed=seed, **network)
    finally:
        cmpe_se.training.create_network = original


def _se(model: str) -> str:
    return model.removeprefix("cmpe_")


def compared(comparison: Path, model: str, names: Sequence[str], seeds: int) -> list[dict]:
    """Each variant against its unchanged network, the plain one, SE, and the variants named before it."""
    plain = model.removeprefix("cmpe_se_")
    accuracies = {
        name: [variant_run(comparison, model, name, seed)["test_top1"] for seed in range(seeds)] for name in names
    }
    rows, p_values = [], []
    for place, name in enumerate(names):
        view = VARIANTS[name].view
        unchanged = _se(model) if view == "se" else f"{model}-{view}"
        for other in dict.fromkeys([unchanged, plain, _se(model), *names[:place]]):
            if other not in accuracies:
                cells = [RunFolder(comparison / "cells" / f"{other}-seed{seed}") for seed in range(seeds)]
                accuracies[other] = [cell.read_result()["test_top1"] for cell in cells]
            difference = compare_paired(accuracies[name], accuracies[other])
            p_values.append(difference.p)
            rows.append(
                {
                    "variant": name,
                    "against": other,
                    "seeds": seeds,
                    "top1_mean": round(summarise(accuracies[name]).mean, 2),
                    "against_mean": round(summarise(accuracies[other]).mean, 2),
                    "difference": round(difference.mean, 2),
                    "low": round(difference.low, 2),
                    "high": round(difference.high, 2),
                    "p": round(difference.p, 4),
                    "top1": " ".join(f"{value:.2f}" for value in accuracies[name]),
                    "against_top1": " ".join(f"{value:.2f}" for value in accuracies[other]),
                }
            )
    for row, adjusted in zip(rows, holm(p_values), strict=True):
        row["p_holm"] = round(adjusted, 4)
    return rows


if __name__ == "__main__":
    main()
