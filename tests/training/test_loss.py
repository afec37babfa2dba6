"""Cross-entropy and binary cross-entropy, with weights of the classes."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight
from timm.loss import BinaryCrossEntropy
from torch import Tensor

from cmpe_se.data import SmallImages, load_data
from cmpe_se.training import train
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.loss import balanced_class_weights, binary_cross_entropy, cross_entropy
from cmpe_se.training.run_folder import RunFolder
from tests.training.conftest import write_digits
from tests.training.processes import complaint_of
from tests.training.runs import metrics

LABELS = torch.tensor([0] * 7 + [1] * 3 + [3] * 2)  # none of class 2
CLASSES = 4


@pytest.fixture
def data() -> SmallImages:
    images = torch.zeros(len(LABELS), 1, 8, 8, dtype=torch.uint8)
    return SmallImages("digits", tuple("abcd"), images, LABELS, images[:1], LABELS[:1])


def naive(logits: Tensor, targets: Tensor, weights: Tensor, smoothing: float) -> float:
    """The mean over images, one by one in float64."""
    total = 0.0
    for row, target in zip(logits.double(), targets, strict=True):
        wanted = torch.zeros(CLASSES, dtype=torch.float64).index_fill_(0, target, 1.0) if target.ndim == 0 else target
        wanted = wanted.double() * (1 - smoothing) + smoothing / CLASSES
        total -= float((weights.double() * wanted * (row - row.exp().sum().log())).sum())
    return total / len(logits)


def test_balanced_weights(data):
    weights = balanced_class_weights(data)
    assert weights[2] == 0
    expected = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=LABELS.numpy())
    np.testing.assert_allclose(weights[[0, 1, 3]], expected, rtol=1e-6)
    assert weights[LABELS].mean() == pytest.approx(1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mixed", [False, True], ids=["labels", "mixed labels"])
def test_against_float64(mixed, smoothing, data):
    torch.manual_seed(0)
    logits, weights = 3 * torch.randn(len(LABELS), CLASSES), balanced_class_weights(data)
    targets = torch.rand(len(LABELS), CLASSES).softmax(1) if mixed else LABELS
    found = cross_entropy(logits, targets, weights=weights, label_smoothing=smoothing)
    assert float(found) == pytest.approx(naive(logits, targets, weights, smoothing), rel=1e-5)
    plain = cross_entropy(logits, targets, weights=None, label_smoothing=smoothing)
    assert float(plain) == pytest.approx(naive(logits, targets, torch.ones(CLASSES), smoothing), rel=1e-5)


def naive_binary(logits: Tensor, targets: Tensor, weights: Tensor, smoothing: float, threshold: float | None) -> float:
    """The mean over images and classes, one by one in float64."""
    total = 0.0
    for row, target in zip(logits.double(), targets, strict=True):
        wanted = torch.zeros(CLASSES, dtype=torch.float64).index_fill_(0, target, 1.0) if target.ndim == 0 else target
        wanted = wanted.double() * (1 - smoothing) + smoothing / CLASSES
        weight = float((wanted * weights.double()).sum())
        for logit, share in zip(row.tolist(), wanted.tolist(), strict=True):
            if threshold is not None:
                share = float(share > threshold)
            positive = 1 / (1 + math.exp(-logit))
            total -= weight * (share * math.log(positive) + (1 - share) * math.log(1 - positive))
    return total / len(logits) / CLASSES


@pytest.mark.parametrize("threshold", [None, 0.0, 0.2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mixed", [False, True], ids=["labels", "mixed labels"])
def test_binary_against_float64(mixed, smoothing, threshold, data):
    torch.manual_seed(0)
    logits, weights = 3 * torch.randn(len(LABELS), CLASSES), balanced_class_weights(data)
    targets = (4 * torch.rand(len(LABELS), CLASSES)).softmax(1) if mixed else LABELS
    for of_classes in (weights, None):
        found = binary_cross_entropy(
            logits, targets, weights=of_classes, label_smoothing=smoothing, threshold=threshold
        )
        each = torch.ones(CLASSES) if of_classes is None else of_classes
        assert float(found) == pytest.approx(naive_binary(logits, targets, each, smoothing, threshold), rel=1e-5)
    if not (mixed and smoothing):  # timm leaves the smoothing of mixed labels to mixup
        criterion = BinaryCrossEntropy(smoothing=smoothing, target_threshold=threshold)
        assert float(found) == pytest.approx(float(criterion(logits, targets)), rel=1e-6)


def test_parts_of_a_batch_give_its_loss(data):
    torch.manual_seed(0)
    logits, weights = torch.randn(len(LABELS), CLASSES), balanced_class_weights(data)
    whole = cross_entropy(logits, LABELS, weights=weights, label_smoothing=0.1)
    parts = [  # of one class nearly each
        cross_entropy(part, labels, weights=weights, label_smoothing=0.1)
        for part, labels in zip(logits.chunk(4), LABELS.chunk(4), strict=True)
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


@pytest.mark.parametrize("kind", [None, "balanced"])
def test_the_loss_of_a_run(kind, tmp_path):
    """Of one step that changes no weight, on all images: 30 of a class and 3 of the other."""
    folder = write_digits(tmp_path / "digits", {"train": 30, "test": 2}, digits=(0,))
    write_digits(tmp_path / "rare", {"train": 3, "test": 2}, digits=(1,))
    for part in ("train", "test"):
        (tmp_path / "rare" / part / "1").rename(folder / part / "1")
    settings = {"data": "folder", "data_dir": str(folder), "epochs": 1, "batch_size": 33, "lr": 0.0, "workers": 0}
    train(**settings, class_weights=kind, output=tmp_path / "run")
    data = load_data("folder", folder, workers=0)
    [(images, labels)] = data.train_batches(
        0, batch_size=33, seed=0, augmentation=TrainingConfig.from_recipe().augmentation
    )
    logits = RunFolder(tmp_path / "run").load_model().train()(images)
    weights = torch.tensor([33 / 60, 33 / 6] if kind else [1.0, 1.0])
    expected = (weights[labels] * F.cross_entropy(logits, labels, reduction="none")).mean()
    assert metrics(tmp_path / "run")[0]["train_loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_a_kind_that_does_not_exist():
    assert "unknown class_weights 'inverse'; choose one of balanced" in complaint_of("train", "--class-weights=inverse")
