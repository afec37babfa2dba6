"""What watching costs a training: the share of a run's time that each part of ``Watch`` takes, timed inside the run.

    python benchmarks/watching.py --epochs 4 --threads 1

The parts are timed where the loop calls them. A GPU would have to be waited for at each; this is for a CPU.
"""

import argparse
import tempfile
import time
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import torch

from cmpe_se.training import train
from cmpe_se.training.provenance import write_results
from cmpe_se.training.watching import Watch

PARTS = {
    "gates": ("before_step", "after_backward", "measure_gates"),
    "page": ("_page",),
    "trackers": ("_tell_trackers",),
}
NETWORKS = {
    "folded_3x3": {"model": "cmpe_se_preact_resnet20"},
    "se": {"model": "se_preact_resnet20"},
    "plain": {"model": "preact_resnet20"},
    "converted": {"model": "test_resnet", "convert": "folded_3x3"},
    "cbam": {"model": "preact_resnet20", "view": "timm_cbam"},
}


def shares(settings: dict, epochs: int) -> dict[str, float]:
    """Percent of the epochs' time by part, tests and checkpoints included, and the seconds of an epoch."""
    spent: Counter[str] = Counter()
    patches = []
    for part, names in PARTS.items():
        for name in names:
            patches.append(patch.object(Watch, name, timed(getattr(Watch, name), spent, part)))
    for change in patches:
        change.start()
    try:
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            with patch.object(Watch, "__enter__", timed(Watch.__enter__, spent, "start")):
                train(**settings, epochs=epochs, device="cpu", output=f"{folder}/run")
            total = time.perf_counter() - began
    finally:
        for change in patches:
            change.stop()
    return {part: 100 * spent[part] / total for part in PARTS} | {"seconds_per_epoch": total / epochs}


def timed(function, spent: Counter, part: str):
    """A method whose time is added up."""

    def call(self, *args, **settings):
        began = time.perf_counter()
        try:
            return function(self, *args, **settings)
        finally:
            spent[part] += time.perf_counter() - began

    return call


def main() -> None:
    """Train each network on the digits, and write a table to ``results/``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--log-to", default="tensorboard")
    parser.add_argument("--output", type=Path, default=Path("results"))
    choice = parser.parse_args()
    torch.set_num_threads(choice.threads)
    train(model="test_resnet", epochs=1, device="cpu", output=f"{tempfile.mkdtemp()}/first")  # imports are no part
    rows = []
    for name in choice.networks.split(","):
        found = shares({**NETWORKS[name], "log_to": choice.log_to}, choice.epochs)
        rows.append({"network": name, **{f"{part}_percent": f"{found[part]:.2f}" for part in PARTS}})
        rows[-1]["seconds_per_epoch"] = f"{found['seconds_per_epoch']:.2f}"
        print(rows[-1], flush=True)
    notes = {"data": "digits, 1437 images of 8x8, batch 64", "epochs": str(choice.epochs), "log_to": choice.log_to}
    write_results(choice.output, "watching", rows, setup=f"{choice.threads}-thread", **notes)


if __name__ == "__main__":
    main()
