"""What finished runs have written, as tests write it in their place."""

from pathlib import Path
from types import SimpleNamespace

import timm
import torch

from cmpe_se.data import Preprocessing
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.provenance import provenance
from cmpe_se.training.run_folder import RunFolder
from cmpe_se.training.summary import EpochRecord, RunResult
from cmpe_se.utils.randomness import seeded


def a_result(**own) -> RunResult:
    """A complete ``result.json``, with values of one's own."""
    return {
        "model": "preact_resnet20",
        "view": None,
        "data": "digits",
        "seed": 0,
        "epochs": 1,
        "params": 1000,
        "macs": 2000,
        "test_top1": 90.0,
        "test_top5": 99.0,
        "test_loss": 0.3,
        "train_images": 1437,
        "test_images": 360,
        "train_seconds": 2.0,
        "images_per_second": 100.0,
        "processes": 1,
        "run": "runs/made",
        **provenance(),
        **own,
    }


def a_record(**own) -> EpochRecord:
    """A complete line of ``metrics.jsonl``, with values of one's own."""
    return {
        "epoch": 1,
        "step": 22,
        "lr": 0.1,
        "train_loss": 1.0,
        "train_top1": 50.0,
        "images_per_second": 100.0,
        "seconds": 2.0,
        "test_images": 360,
        "test_loss": 0.3,
        "test_top1": 90.0,
        "test_top5": 99.0,
        **own,
    }


def write_run(path: Path, model: str, preprocessing: Preprocessing, *, seed: int = 0, **settings) -> RunFolder:
    """A finished run's folder with an untrained network whose outputs differ from image to image.

    Args:
        path: of the folder.
        model: timm's name.
        preprocessing: with the classes.
        seed: of the weights.
        settings: more of the run's.
    """
    run, arguments = RunFolder(path), {"num_classes": len(preprocessing.classes), "in_chans": preprocessing.size[0]}
    with seeded(seed):
        network = timm.create_model(model, **arguments)
        torch.nn.init.normal_(network.get_classifier().weight)
    run.write_config(TrainingConfig(model=model, device="cpu", **settings))
    data = SimpleNamespace(classes=preprocessing.classes, preprocessing=preprocessing)
    run.save_model(network, model_args=arguments, data=data)
    run.write_result(a_result(model=model, run=str(path)))
    return run
