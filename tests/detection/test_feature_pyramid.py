"""Backbones with a feature pyramid: shapes, frozen parts, gates, and detectors of torchvision on them."""

import copy
import pickle

import pytest
import timm
import torch
from timm.layers.norm_act import FrozenBatchNorm2d
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

import cmpe_se
from cmpe_se.errors import UserError
from cmpe_se.layers.attention import CompetitiveSE
from tests.detection.test_detectors import assert_same, detect, gates_of, images, loss_of, move, randomised

SMALL = {"channels": (8, 16, 16, 32), "layers": (1, 1, 1, 1), "stem_width": 8, "out_channels": 16}


@pytest.mark.parametrize(
    ("name", "settings", "strides", "gates"),
    [
        ("resnet18", {}, (4, 8, 16, 32), 0),
        ("cmpe_se_resnet18", {"view": "se"}, (4, 8, 16, 32), 8),
        ("resnet18", {"convert": "se_sum", "in_chans": 4}, (4, 8, 16, 32), 8),
        ("resnet18", {"out_indices": (0, 1, 2)}, (2, 4, 8), 0),
        ("cmpe_se_preact_resnet20", {}, (1, 2, 4), 9),  # no two maps from stride 4 on
        ("convnext_atto", {"convert": "folded_3x3"}, (4, 8, 16, 32), 12),
        ("mobilenetv3_small_050", {"convert": "se"}, (4, 8, 16, 32), 7),
        pytest.param("hrnet_w18_small", {"convert": "se"}, (4, 8, 16, 32), None, marks=pytest.mark.long),
        ("darknet17", {"convert": "se"}, (4, 8, 16, 32), 5),  # strides from 1
        ("csatv2", {}, (8, 16, 32, 64), 0),
        ("swin_tiny_patch4_window7_224", {"strict_img_size": False}, (4, 8, 16, 32), 0),  # maps of NHWC
    ],
)
def test_maps(name, settings, strides, gates):
    with torch.device("meta"):
        backbone = cmpe_se.fpn_backbone(name, out_channels=24, **settings)
        maps = backbone.eval()(torch.empty(2, settings.get("in_chans", 3), 128, 192))
    assert (backbone.out_channels, backbone.strides) == (24, strides)
    assert list(maps) == [*map(str, range(len(strides))), "pool"]
    last = 2 * strides[-1]
    assert [each.shape for each in maps.values()] == [(2, 24, -(-128 // s), -(-192 // s)) for s in (*strides, last)]
    assert len(gates_of(backbone)) == gates or (gates is None and gates_of(backbone))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("resnet19", {}, "no network 'resnet19'; did you mean resnet18, "),
        ("qqqqqqqqq", {}, r"no network 'qqqqqqqqq'; timm.list_models\(\) has the names"),
        ("vit_tiny_patch16_224", {}, "strides of the feature maps of vit_tiny_patch16_224: 16; a pyramid needs two"),
        ("resnet18", {"out_indices": (1, 3)}, "strides of the feature maps of resnet18: 4, 16; a pyramid needs two"),
        ("resnet18", {"out_indices": (3, 2)}, r"out_indices is \(3, 2\), should be increasing numbers"),
        ("resnet18", {"out_indices": (3, 9)}, "cannot make feature maps of resnet18: "),
        ("resnet18", {"trainable_stages": 6}, "trainable_stages is 6, should be from 0 to 5"),
        ("resnet18", {"extra_blocks": "p8"}, "extra_blocks is 'p8', should be 'pool', 'p6p7'"),
        ("resnet18", {"nonsense": 3}, "cannot make feature maps of resnet18: .*nonsense"),
        ("resnet18", {"convert": "folded"}, "unknown view 'folded'; choose one of"),
        ("cmpe_se_resnet18", {"convert": "se"}, "has competition already"),
        ("vgg11", {"convert": "se"}, "no residual addition"),
    ],
)
def test_errors(name, settings, message):
    with torch.device("meta"), pytest.raises(UserError, match=message) as caught:
        cmpe_se.fpn_backbone(name, **settings)
    assert "\n" not in str(caught.value)


def learning(backbone: nn.Module) -> set[str]:
    """Children of the body with a parameter that learns; the gates' come under their block."""
    names = {name for name, weight in backbone.body.named_parameters() if weight.requires_grad}
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("convert", [None, "se"])
def test_frozen_stages(convert):
    everything = {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}
    expected = [set(), {"layer4"}, {"layer3", "layer4"}, {"layer2", "layer3", "layer4"}]
    expected += [everything - {"conv1", "bn1"}, everything]
    for stages, names in enumerate(expected):
        backbone = cmpe_se.fpn_backbone("resnet18", trainable_stages=stages, convert=convert, **SMALL)
        assert learning(backbone) == names
        assert all(weight.requires_grad for weight in backbone.fpn.parameters())
        for name, weight in backbone.body.named_parameters():
            assert weight.requires_grad == (name.partition(".")[0] in names)
    assert learning(cmpe_se.fpn_backbone("resnet18", convert=convert, **SMALL)) == everything


@pytest.mark.long
@pytest.mark.parametrize("name", ["mobilenetv2_100", "hrnet_w18_small"])
def test_frozen_stages_of_networks_with_feature_maps_of_their_own(name):
    """A frozen stage is frozen as a whole, gates included, and no layer of the next one is."""
    with torch.device("meta"):
        backbone = cmpe_se.fpn_backbone(name, convert="se", trainable_stages=2)
        frozen = [key for key, weight in backbone.body.named_parameters() if not weight.requires_grad]
        learning = [key for key, weight in backbone.body.named_parameters() if weight.requires_grad]
        assert frozen
        assert learning
        maps = backbone.body.train()(torch.empty(2, 3, 64, 64))
    deepest_frozen, last = maps[-3], maps[-1]
    assert not deepest_frozen.requires_grad
    weights = dict(backbone.body.named_parameters())
    reached = torch.autograd.grad(last.sum(), [weights[key] for key in learning], allow_unused=True)
    assert any(gradient is not None for gradient in reached)
    for key, gate in backbone.body.named_modules():
        if isinstance(gate, CompetitiveSE):
            beside = [
                other for other in weights if other.startswith(key.rpartition(".")[0]) and "competition" not in other
            ]
            assert {weights[other].requires_grad for other in beside} == {next(gate.parameters()).requires_grad}


def test_frozen_norms():
    """All but those inside gates; the backbone computes what it computed in eval mode, in training mode too.

    Up to rounding: a frozen norm multiplies and adds in another order.
    """
    torch.manual_seed(0)
    free = randomised(cmpe_se.fpn_backbone("resnet18", convert="folded_3x3", **SMALL))
    frozen = cmpe_se.fpn_backbone("resnet18", convert="folded_3x3", frozen_norms=True, **SMALL)
    frozen.load_state_dict(free.state_dict(), strict=False)  # frozen norms count no batches
    kinds = {type(module) for module in frozen.body.modules() if hasattr(module, "running_mean")}
    assert FrozenBatchNorm2d in kinds
    for name, module in frozen.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert ".competition." in name
    x = torch.randn(2, 3, 64, 64)
    maps = free.eval()(x)
    for mode in (False, True):
        for key, each in frozen.train(mode)(x).items():
            torch.testing.assert_close(each, maps[key], atol=1e-4, rtol=1e-4)


def test_extra_blocks():
    for given, kind, names in (
        ("pool", LastLevelMaxPool, ["0", "1", "2", "3", "pool"]),
        ("p6p7", LastLevelP6P7, ["0", "1", "2", "3", "p6", "p7"]),
        (LastLevelP6P7(16, 16), LastLevelP6P7, ["0", "1", "2", "3", "p6", "p7"]),
        (None, type(None), ["0", "1", "2", "3"]),
    ):
        backbone = cmpe_se.fpn_backbone("resnet18", extra_blocks=given, **SMALL)
        assert isinstance(backbone.fpn.extra_blocks, kind)
        assert list(backbone(torch.randn(2, 3, 64, 64))) == names


@pytest.mark.long
def test_pretrained_weights_are_those_of_the_network(tmp_path):
    """Also where timm names the feature maps' layers in another way than the network's."""
    for base, gate in (("resnet18", "se"), ("convnext_atto", "se"), ("mobilenetv3_small_050", "se")):
        torch.manual_seed(1)
        network = randomised(timm.create_model(base))
        file = tmp_path / f"{base}.safetensors"
        timm.models.save_for_hf(network, tmp_path / base, safe_serialization=True)
        weights = {"pretrained_cfg_overlay": {"file": str(tmp_path / base / "model.safetensors")}}
        plain = timm.create_model(base, pretrained=True, features_only=True, **weights).eval()
        converted = timm.create_model(
            "cmpe_se_converted", base=base, view=gate, pretrained=True, features_only=True, **weights
        ).eval()
        assert not file.exists()
        x = torch.randn(1, 3, 64, 64)
        assert gates_of(converted)
        for one, other in zip(plain(x), converted(x), strict=True):
            assert torch.equal(one, other)


DETECTORS = {
    "faster": lambda backbone, **size: FasterRCNN(
        backbone,
        num_classes=3,
        rpn_anchor_generator=AnchorGenerator(((16,), (32,), (64,), (64,), (96,)), ((1.0,),) * 5),
        box_score_thresh=0.0,
        box_detections_per_img=5,
        **size,
    ),
    "mask": lambda backbone, **size: MaskRCNN(
        backbone,
        num_classes=3,
        rpn_anchor_generator=AnchorGenerator(((16,), (32,), (64,), (64,), (96,)), ((1.0,),) * 5),
        mask_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], 14, 2),
        box_score_thresh=0.0,
        box_detections_per_img=5,
        **size,
    ),
    "retina": lambda backbone, **size: RetinaNet(
        backbone,
        num_classes=3,
        anchor_generator=AnchorGenerator(((16,), (32,), (64,), (64,), (96,)), ((1.0,),) * 5),
        score_thresh=0.0,
        detections_per_img=5,
        **size,
    ),
    "fcos": lambda backbone, **size: FCOS(
        backbone,
        num_classes=3,
        anchor_generator=AnchorGenerator(((8,), (16,), (32,), (64,), (96,)), ((1.0,),) * 5),
        score_thresh=0.0,
        detections_per_img=5,
        **size,
    ),
}


@pytest.mark.parametrize("kind", DETECTORS)
def test_detectors_on_it(kind):
    """A converted backbone in a detector: detections as those of the plain one, gates that learn, copies, merged."""
    settings = SMALL | {"out_channels": 32}
    torch.manual_seed(0)
    plain = randomised(DETECTORS[kind](cmpe_se.fpn_backbone("resnet18", **settings), min_size=64, max_size=96))
    gated = DETECTORS[kind](
        cmpe_se.fpn_backbone("resnet18", convert="folded_3x3", **settings), min_size=64, max_size=96
    )
    missing = gated.load_state_dict(plain.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert all(".competition." in key for key in missing.missing_keys)
    assert_same(detect(plain), detect(gated))
    assert len(cmpe_se.conversion_report(gated).gates) == 4

    loss_of(gated, kind).backward()
    gates = gates_of(gated)
    assert all(gate.fc2.weight.grad.abs().sum() > 0 for gate in gates)
    gated.zero_grad()
    move(gates)
    before = detect(gated)
    assert_same(before, detect(copy.deepcopy(gated)))
    assert_same(before, detect(pickle.loads(pickle.dumps(gated))))
    merged = cmpe_se.merge(gated)
    x = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        for one, other in zip(gated.eval().backbone(x).values(), merged.backbone(x).values(), strict=True):
            torch.testing.assert_close(other, one, atol=1e-4 * float(one.abs().max()), rtol=0)
    assert len(merged.eval()(images())) == 2


def test_report_of_a_detector_names_what_its_backbone_skipped():
    backbone = cmpe_se.fpn_backbone("cmpe_se_resnet18", where="layer4", **SMALL)
    model = nn.ModuleDict({"backbone": backbone})
    assert cmpe_se.conversion_report(model).skipped == {
        f"backbone.body.layer{stage}.0": "not in where" for stage in (1, 2, 3)
    }
