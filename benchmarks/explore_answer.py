"""What an answer of ``cmpe-se explore`` takes with a converted, untrained ResNet-50 at 224 pixels: its parts, in turns.

    python benchmarks/explore_answer.py --turns 5

Prints a line of JSON for each turn: seconds on the clock and of the processor, which other programs do not lengthen.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import timm
import torch

from cmpe_se.commands.explore.answers import ATTRIBUTIONS, render
from cmpe_se.commands.explore.network import Force, Network
from cmpe_se.data import Preprocessing
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.provenance import provenance
from cmpe_se.training.run_folder import RunFolder

CLASSES = tuple(f"class {number}" for number in range(10))


def make_run(path: Path, model: str, side: int) -> RunFolder:
    """A run folder of an untrained network."""
    torch.manual_seed(0)
    run, arguments = RunFolder(path), {"num_classes": len(CLASSES)}
    network, how = timm.create_model(model, **arguments), Preprocessing.of_photos(CLASSES, side)
    run.write_config(TrainingConfig(model=model, data="folder", data_dir="/not/there", device="cpu"))
    run.save_model(network, model_args=arguments, data=SimpleNamespace(classes=CLASSES, preprocessing=how))
    numbers = {"test_top1": 10.0, "test_top5": 50.0, "test_loss": 2.3, "train_seconds": 1.0, "images_per_second": 1.0}
    counts = {"seed": 0, "epochs": 1, "params": 1, "macs": 4 * 10**9, "train_images": 1, "test_images": 1}
    words = {"model": model, "view": None, "data": "folder", "run": str(path), "processes": 1}
    run.write_result({**words, **counts, **numbers, **provenance()})
    return run


def main() -> None:
    """Time answers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="cmpe_se_resnet50")
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--turns", type=int, default=5)
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        network = Network(make_run(Path(folder) / "run", settings.model, settings.side))
        photo = network.photo(network.examples[0])
        blocks = network.blocks
        for turn in range(settings.turns + 1):  # the first one warms up
            block = blocks[turn % len(blocks)]
            for name, force in (("as trained", None), ("closed", Force(block, "closed"))):
                clock, processor = time.perf_counter(), time.process_time()
                render("run", network, photo, block=block, force=force, attribution=ATTRIBUTIONS[0])
                row = {"turn": turn, "gates": name, "seconds": time.perf_counter() - clock}
                print(json.dumps(row | {"processor_seconds": time.process_time() - processor}), flush=True)


if __name__ == "__main__":
    main()
