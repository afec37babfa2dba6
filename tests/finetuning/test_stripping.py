"""A network without its gates is the one that was converted, in every respect."""

import copy
import pickle
import subprocess
import sys

import pytest
import timm
import torch
from torch import fx, nn

import cmpe_se
from cmpe_se import CompetitiveSE, convert, strip_gates
from cmpe_se.errors import UserError
from tests.conversion.cifar import CifarResNet
from tests.finetuning.networks import FOREIGN, NETWORKS, build, equal, gated, gates, images, snapshot


def looks(model: nn.Module) -> list:
    """All that tells two networks apart besides numbers: classes, attributes, children."""
    return [
        (
            name,
            type(module),
            sorted(set(vars(module)) - {"_is_torch_compile"}),
            list(module._modules),
            module.training,
            module.extra_repr(),
        )
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("inplace", [False, True])
def test_the_original_comes_back(kind, inplace):
    original, x = build(kind), images()
    model = gated(kind)
    before, output = snapshot(model), model(x)
    stripped = strip_gates(model, inplace=inplace)
    assert (stripped is model) == inplace
    assert looks(stripped) == looks(original)
    assert equal(stripped.state_dict(), original.state_dict())
    assert torch.equal(stripped(x), original(x))
    assert not torch.equal(output, original(x))
    if not inplace:
        assert equal(before, model.state_dict())
        assert torch.equal(model(x), output)
    for network in (stripped.train(), original.train()):
        network(x).square().sum().backward()
    for one, other in zip(stripped.parameters(), original.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("kind", FOREIGN)
def test_it_can_be_converted_again(kind):
    original, x = build(kind), images()
    again = convert(strip_gates(gated(kind), inplace=True))
    assert len(gates(again)) == len(gates(gated(kind)))
    assert torch.equal(again.eval()(x), original(x))


def test_hooks_modes_and_sharing_stay():
    model, calls = gated("cifar"), []
    model.layer2 = nn.Sequential(model.layer1[0], model.layer1[0], *model.layer2)
    model.layer1[0].train()
    model.layer1[0].register_forward_hook(lambda *_: calls.append("block"))
    model.layer1[0].conv2.register_forward_hook(lambda *_: calls.append("layer"))
    stripped = strip_gates(model, inplace=True)
    assert stripped.layer2[0] is stripped.layer2[1] is stripped.layer1[0]
    assert stripped.layer1[0].training
    assert stripped.layer1[0].conv1.training is not stripped.training
    stripped(images())
    assert calls == ["layer", "block"] * 3


@pytest.mark.slow
def test_its_pickle_needs_no_cmpe_se(tmp_path):
    model = strip_gates(convert(timm.create_model("test_resnet").eval()))
    torch.save(model, tmp_path / "model.pt")
    code = (
        "import sys; sys.modules['cmpe_se'] = None\n"
        f"import torch; model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "print(model(torch.zeros(1, 3, 32, 32)).shape, sorted(name for name in sys.modules if 'cmpe_se' in name))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.stdout == "torch.Size([1, 1000]) ['cmpe_se']\n", done.stderr


@pytest.mark.parametrize("traced", ["before", "after"])
def test_graph_modules(traced):
    for kind in ("cifar", "scaled"):
        original, x = build(kind), images()
        model = gated(kind, model=fx.symbolic_trace(original)) if traced == "before" else fx.symbolic_trace(gated(kind))
        assert not torch.equal(model(x), original(x))
        for form in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            stripped = strip_gates(form)
            assert not gates(stripped)
            assert torch.equal(stripped(x), original(x))
            assert equal(stripped.state_dict(), original.state_dict())
            assert "competition" not in stripped.code


@pytest.mark.parametrize("wrap", ["compile", "ema", "average", "copy", "pickle"])
def test_wrapped_and_copied(wrap):
    original, model, x = build("cifar"), gated("cifar"), images()
    wrapped = {
        "compile": lambda: torch.compile(model, backend="eager"),
        "ema": lambda: timm.utils.ModelEmaV3(model),
        "average": lambda: torch.optim.swa_utils.AveragedModel(model),
        "copy": lambda: copy.deepcopy(model),
        "pickle": lambda: pickle.loads(pickle.dumps(model)),
    }[wrap]()
    stripped = strip_gates(wrapped)
    assert looks(stripped) == looks(original)
    assert torch.equal(stripped(x), original(x))


def test_a_compiled_network_runs_without_gates_too():
    original, model, x = build("cifar"), gated("cifar"), images()
    compiled = torch.compile(model, backend="eager")
    assert not torch.equal(compiled(x), original(x))
    strip_gates(model, inplace=True)
    assert torch.equal(compiled(x), original(x))


def test_some_blocks():
    original, x = build("bottleneck"), images()
    stripped = strip_gates(convert(original, where="layer2"))
    assert looks(stripped) == looks(original)
    assert torch.equal(stripped(x), original(x))


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.add = nn.Conv2d(16, 16, 3, padding=1), CompetitiveSE(16)

    def forward(self, x):
        return self.add(self.conv(x), x)


class DistributedDataParallel(nn.Module):
    """Known by its name."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def replaced(model):
    block = model.layer1[0]
    own = block.forward
    block.forward = lambda x: own(x)
    return model


def parametrised(model):
    block = model.layer1[0]
    block.factor = nn.Parameter(torch.ones(1))
    nn.utils.parametrize.register_parametrization(block, "factor", nn.Identity())
    return model


REFUSALS = {
    "no gates": (lambda: build("cifar"), "CifarResNet has no gates; cmpe_se.convert adds them"),
    "merged": (
        lambda: cmpe_se.merge(gated("cifar")),
        "this CifarResNet is merged: .* the network that it was merged from",
    ),
    "merged, own gates": (lambda: cmpe_se.merge(gated("cifar", "timm_se")), "this CifarResNet is merged"),
    "merged, nothing left": (lambda: cmpe_se.merge(gated("cifar", "static")), "this CifarResNet is merged"),
    "part of it merged": (lambda: nn.Sequential(cmpe_se.merge(gated("cifar"))), "this Sequential is merged"),
    "a gate": (lambda: CompetitiveSE(16), "this is a gate by itself"),
    "no network": (lambda: 3, r"gates are in a network \(torch.nn.Module\), got int"),
    "own block": (
        lambda: nn.Sequential(Own()),
        r"block 0 \(Own\) keeps its gates: add is part of the block's own code",
    ),
    "own block alone": (Own, r"the network itself \(Own\) keeps its gates: add is part of"),
    "replaced": (lambda: replaced(gated("cifar")), "block layer1.0 .* its forward was replaced after it was converted"),
    "parametrised": (lambda: parametrised(gated("cifar")), "block layer1.0 .* its class has changed since"),
    "held": (
        lambda: nn.Sequential(DistributedDataParallel(gated("cifar"))),
        "DistributedDataParallel knows the gates' parameters, so they cannot be taken out in place; strip a copy",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused(case):
    make, sentence = REFUSALS[case]
    model = make()
    before = looks(model) if isinstance(model, nn.Module) else None
    with pytest.raises(UserError, match=sentence) as error:
        strip_gates(model, inplace=True)
    assert "\n" not in str(error.value)
    assert before is None or looks(model) == before


def test_a_layer_that_cannot_be_copied_is_named():
    model = gated("cifar")
    model.layer1[0].conv1.lock = __import__("threading").Lock()
    with pytest.raises(
        UserError, match=r"layer layer1.0.conv1 .* cannot be copied: .*; strip in place \(inplace=True\)"
    ):
        strip_gates(model)
    assert not gates(strip_gates(model, inplace=True))


def test_a_converted_block_alone():
    original, x = CifarResNet(8).layer1[0].eval(), torch.randn(2, 16, 8, 8)
    block = convert(original)
    assert isinstance(strip_gates(block), type(original))
    assert looks(strip_gates(block)) == looks(original)
    assert torch.equal(strip_gates(block)(x), original(x))
