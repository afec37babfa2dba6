"""The short form of a merged gate in eager inference: the same bits, and only where nothing else is asked for."""

import pytest
import timm
import torch

import cmpe_se
from cmpe_se.layers.merged_gate import MergedGate
from cmpe_se.networks.blocks import PreActBottleneck
from tests.merging.test_merging import move_gates


@pytest.fixture(scope="module", params=[("folded_3x3", "half", False), ("double_fc", "one", True)], ids=str)
def merged(request):
    """A merged bottleneck network in float32, with statistics that are not the first ones."""
    view, start, bias = request.param
    torch.manual_seed(0)
    network = timm.create_model("preact_resnet20b", num_classes=5, view=view, start=start, bias=bias)
    return cmpe_se.merge(move_gates(network, images()))


@pytest.fixture
def steps(monkeypatch):
    """How often the short form has run."""
    seen, step = [], MergedGate.step
    monkeypatch.setattr(MergedGate, "step", lambda self, *inputs: seen.append(self) or step(self, *inputs))
    return seen


def images(layout=torch.contiguous_format):
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(memory_format=layout)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_same_bits_as_the_long_form(layout, merged, steps):
    x = images(layout)
    expected = merged(x)  # with gradients allowed
    assert not steps
    for mode in (torch.no_grad, torch.inference_mode):
        steps.clear()
        with mode():
            assert torch.equal(merged(x), expected)
        assert len(steps) == 6


def test_error_is_float32_s(merged, steps):
    with torch.no_grad():
        found = merged(images())
        assert len(steps) == 6
        exact = cmpe_se.merge(merged).double()(images().double())
    assert ((found - exact).abs().max() / exact.abs().max()) < 1e-5


@pytest.mark.parametrize("part", ["attention", "attention.read", "attention.excite"])
def test_hooks_are_called(part, merged, steps):
    seen, block = [], next(module for module in merged.modules() if isinstance(module, PreActBottleneck))
    with torch.no_grad():
        expected = merged(images())
        handle = block.get_submodule(part).register_forward_hook(lambda *_: seen.append(1))
        try:
            steps.clear()
            torch.testing.assert_close(merged(images()), expected, rtol=1e-4, atol=1e-4)
        finally:
            handle.remove()
    assert seen == [1]
    assert len(steps) == 5


def test_not_under_autocast_nor_in_other_dtypes(merged, steps):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        merged(images())
    with torch.no_grad():
        cmpe_se.merge(merged).bfloat16()(images().bfloat16())
    assert not steps
