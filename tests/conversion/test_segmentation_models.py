"""segmentation_models_pytorch: encoders by their name in timm, and finished networks through ``convert``."""

import copy
import pickle

import pytest
import timm
import torch

import cmpe_se
from tests.conversion.networks import randomise
from tests.conversion.test_convert import assert_same, gates, move_gates
from tests.tiers import long_but

smp = pytest.importorskip(
    "segmentation_models_pytorch", reason="its networks are tested where segmentation-models-pytorch is installed"
)

SMALL = {"encoder_weights": None, "channels": (8, 16, 24, 32), "layers": (1, 2, 1, 1)}
"""A narrow and short ResNet-18 as the encoder."""
ENCODERS = [
    ("Unet", {}, 5),
    ("Unet", {"in_channels": 4, "encoder_depth": 4, "decoder_channels": (16, 8, 8, 4)}, 4),
    ("DeepLabV3Plus", {"encoder_output_stride": 16}, 5),
    ("DeepLabV3", {"encoder_output_stride": 8}, 5),
]
"""Networks with settings of their encoders, and how many blocks those have."""
DECODERS = [
    "Unet",
    "UnetPlusPlus",
    "MAnet",
    "Linknet",
    "FPN",
    "PSPNet",
    "DeepLabV3",
    "DeepLabV3Plus",
    "UPerNet",
    "Segformer",
]


def images(channels=3):
    return torch.randn(2, channels, 64, 64, generator=torch.Generator().manual_seed(1))


def make(network, encoder, **settings):
    torch.manual_seed(0)
    return randomise(getattr(smp, network)(encoder, **(SMALL | settings))).eval()


@pytest.mark.parametrize(("network", "settings", "blocks"), ENCODERS)
def test_encoder_by_name(network, settings, blocks):
    """It computes what the encoder without gates does, whatever the channels and the stride."""
    plain = make(network, "tu-resnet18", **settings)
    model = make(network, "tu-cmpe_se_resnet18", **settings)
    assert len(cmpe_se.conversion_report(model).gates) == len(gates(model)) == blocks
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all(".competition." in key for key in missing)
    x = images(settings.get("in_channels", 3))
    assert_same(plain, model, x)
    model.train()(x).square().sum().backward()
    assert all(gate.fc2.weight.grad.abs().sum() > 0 for gate in gates(model).values())


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    long_but(
        ["tu-cmpe_se_resnet50", "tu-cmpe_se_converted.convnext_atto", "tu-cmpe_se_resnext50_32x4d"],
        ["tu-cmpe_se_converted.convnext_atto"],
    ),
)
def test_encoder_on_the_meta_device(name):
    with torch.device("meta"):
        model = smp.Unet(name, encoder_weights=None, classes=5)
        assert model(torch.empty(1, 3, 64, 64)).shape == (1, 5, 64, 64)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    assert gates(model)


def test_encoder_with_the_weights_of_its_base(tmp_path):
    """smp's ``encoder_weights`` is timm's ``pretrained``; the first layer takes more channels as timm adapts it."""
    base = randomise(timm.create_model("resnet18", num_classes=5))
    timm.models.save_for_hf(base, tmp_path, safe_serialization=True)
    overlay = {"file": str(tmp_path / "model.safetensors"), "source": "file", "num_classes": 5}
    settings = {"encoder_weights": True, "pretrained_cfg_overlay": overlay, "in_channels": 4}
    plain, model = (smp.Unet(f"tu-{name}", **settings).encoder for name in ("resnet18", "cmpe_se_resnet18"))
    assert torch.equal(model.state_dict()["model.layer4.1.conv2.weight"], base.layer4[1].conv2.weight)
    assert gates(model)
    for one, other in zip(plain.eval()(images(4)), model.eval()(images(4)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("network", long_but(DECODERS, ("Unet",)))
def test_networks_through_convert(network):
    original = make(network, "tu-resnet18")
    model = cmpe_se.convert(original)
    report = cmpe_se.conversion_report(model)
    assert sum(gate.block.startswith("encoder") for gate in report.gates) == (3 if network == "PSPNet" else 5)
    assert original.state_dict().keys() <= model.state_dict().keys()
    assert_same(original, model, images())
    model.train()(images()).square().sum().backward()
    assert all(gate.fc2.weight.grad.abs().sum() > 0 for gate in gates(model).values())

    randomise(move_gates(model)).eval()  # the forward in training mode has moved the statistics
    assert_same(model, copy.deepcopy(model), images())
    assert_same(model, pickle.loads(pickle.dumps(model)), images())
    with torch.no_grad():
        y = model(images())
        torch.testing.assert_close(cmpe_se.merge(model)(images()), y, rtol=1e-3, atol=1e-4 * float(y.abs().max()))


@pytest.mark.slow
def test_addition_in_a_decoder_gets_a_gate():
    """MAnet adds what its attention at the bottom finds to what it was given."""
    report = cmpe_se.conversion_report(cmpe_se.convert(make("MAnet", "tu-resnet18")))
    assert [gate.block for gate in report.gates if gate.block.startswith("decoder")] == ["decoder.center"]
