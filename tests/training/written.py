"""What finished runs have written, as tests write it in their place."""

from cmpe_se.training.provenance import provenance
from cmpe_se.training.summary import EpochRecord, RunResult


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
