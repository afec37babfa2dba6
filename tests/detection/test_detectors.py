"""Finished detectors of torchvision, converted: equal detections, gates that learn, merged maps."""

import copy
import pickle
import sys
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torchvision.models.detection as detection
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

import cmpe_se
from cmpe_se.errors import UserError
from cmpe_se.layers.attention import CompetitiveSE
from tests.tiers import long_but

SMALL = {"weights": None, "weights_backbone": None, "num_classes": 3, "min_size": 64, "max_size": 96}
TWO_STAGE = SMALL | {"box_score_thresh": 0.0, "box_detections_per_img": 5, "rpn_post_nms_top_n_test": 20}
TWO_STAGE |= {"rpn_post_nms_top_n_train": 20, "box_batch_size_per_image": 16}  # its heads take each box
ONE_STAGE = SMALL | {"score_thresh": 0.0, "detections_per_img": 5, "topk_candidates": 20}
DETECTORS = {  # function, its keywords, and the number of gates
    "fasterrcnn_resnet50_fpn": (TWO_STAGE, 5),
    "fasterrcnn_resnet50_fpn_v2": (TWO_STAGE, 5),
    "fasterrcnn_mobilenet_v3_large_320_fpn": (TWO_STAGE, 10),
    "maskrcnn_resnet50_fpn": (TWO_STAGE, 5),
    "keypointrcnn_resnet50_fpn": (TWO_STAGE | {"num_keypoints": 4}, 5),
    "retinanet_resnet50_fpn": (ONE_STAGE, 5),
    "retinanet_resnet50_fpn_v2": (ONE_STAGE, 5),
    "fcos_resnet50_fpn": (ONE_STAGE, 5),
    "ssdlite320_mobilenet_v3_large": (
        {key: value for key, value in ONE_STAGE.items() if "size" not in key},
        10,
    ),
}
PARTS = {"", "backbone.fpn", "rpn", "rpn.head", "roi_heads", "head.classification_head", "head.regression_head"}
"""Parts of detectors that torch.fx cannot trace."""
IMAGES = ((60, 80), (72, 50))  # height and width of each: a detector takes images of several sizes


def small_resnet(weights: None = None, progress: bool = True, **settings: Any) -> ResNet:
    """A ResNet-50 with 5 of its 16 blocks, one of them without a projection, and narrow inside."""
    return ResNet(Bottleneck, [2, 1, 1, 1], width_per_group=16, **settings)


def make(name: str) -> nn.Module:
    """torchvision's detector; its ResNet-50 is a small one, since blocks of one class say the same."""
    torch.manual_seed(0)
    build = getattr(detection, name)
    module = sys.modules[build.__module__]
    with mock.patch.object(module, "resnet50", small_resnet) if hasattr(module, "resnet50") else nullcontext():
        return randomised(build(**DETECTORS[name][0]))


def randomised(model: nn.Module) -> nn.Module:
    """With other statistics and factors in each norm, frozen ones among them."""
    for module in model.modules():
        if hasattr(module, "running_mean"):
            with torch.no_grad():
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.7, 1.4)
                module.weight.uniform_(0.7, 1.3)
                module.bias.normal_(0, 0.2)
    return model


def images() -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.rand(3, *size, generator=random) for size in IMAGES]


def targets(name: str) -> list[dict[str, Tensor]]:
    found = []
    for height, width in IMAGES:
        boxes = torch.tensor([[4.0, 6.0, 40.0, 50.0], [10.0, 3.0, 30.0, 28.0]])
        target = {"boxes": boxes, "labels": torch.tensor([1, 2])}
        if "mask" in name:
            target["masks"] = torch.ones(2, height, width, dtype=torch.uint8)
        if "keypoint" in name:
            points = torch.tensor([[12.0, 9.0, 1.0], [20.0, 20.0, 1.0], [28.0, 25.0, 1.0], [15.0, 12.0, 1.0]])
            target |= {"labels": torch.tensor([1, 1]), "keypoints": points.repeat(2, 1, 1)}
        found.append(target)
    return found


@torch.inference_mode()
def detect(model: nn.Module) -> list[dict[str, Tensor]]:
    return model.eval()(images())


def assert_same(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]], **tolerance: Any) -> None:
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        assert len(a["boxes"]) > 0
        for key in a:
            if tolerance:
                torch.testing.assert_close(a[key], b[key], **tolerance)
            else:
                assert torch.equal(a[key], b[key]), key


def gates_of(model: nn.Module) -> list[CompetitiveSE]:
    return [module for module in model.modules() if isinstance(module, CompetitiveSE)]


def loss_of(model: nn.Module, name: str) -> Tensor:
    torch.manual_seed(2)  # the two stages draw their samples
    return sum(model.train()(images(), targets(name)).values())


def move(gates: list[CompetitiveSE]) -> None:
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for gate in gates:
            for weight in gate.parameters():
                weight.add_(0.1 * torch.randn(weight.shape, generator=random))


@pytest.mark.slow
@pytest.mark.parametrize("name", long_but(DETECTORS, ["fasterrcnn_mobilenet_v3_large_320_fpn"]))
def test_converted_detector(name):
    """Equal detections, gates that learn, copies, and merged maps."""
    original = make(name)
    converted = cmpe_se.convert(original)
    report = cmpe_se.conversion_report(converted)
    assert len(report.gates) == DETECTORS[name][1]
    assert all(gate.block.startswith("backbone.") for gate in report.gates)
    assert report.skipped.keys() <= PARTS  # named, though none of them has a residual addition
    assert original.state_dict().keys() <= converted.state_dict().keys()
    assert_same(detect(original), detect(converted))

    loss_of(converted, name).backward()
    gates = gates_of(converted)
    for gate in gates:
        (last,) = [weight for key, weight in gate.named_parameters() if key.endswith("fc2.weight")]
        assert last.grad.abs().sum() > 0
        assert all(weight.grad is not None for weight in gate.parameters())

    converted.zero_grad()
    move(gates)
    before = detect(converted)
    assert_same(before, detect(copy.deepcopy(converted)))
    assert_same(before, detect(pickle.loads(pickle.dumps(converted))))
    first, unmoved = before[0]["scores"], detect(original)[0]["scores"]
    assert first.shape != unmoved.shape or not torch.equal(first, unmoved)

    # Of the maps, since what is detected can change from one box to another by a rounding error.
    merged = cmpe_se.merge(converted)
    norms = [module for module in merged.backbone.modules() if hasattr(module, "running_mean")]
    assert not norms
    x = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        maps, same = converted.eval().backbone(x), merged.backbone(x)
    for key, each in maps.items():
        torch.testing.assert_close(same[key], each, atol=1e-4 * float(each.abs().max()), rtol=0)
    assert len(detect(merged)) == len(IMAGES)


def test_detector_without_residual_additions_is_refused():
    with torch.device("meta"):
        model = detection.ssd300_vgg16(weights=None, weights_backbone=None, num_classes=3)
    with pytest.raises(UserError, match="SSD has no residual addition"):
        cmpe_se.convert(model, inplace=True)
