"""A gate in the report takes part in the output, whatever runs the block; where it would not, the block is listed."""

import copy
import functools
import pickle
import random
import types
import warnings

import numpy as np
import pytest
import timm
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import relu
from torch.nn.utils import parametrize

from cmpe_se import conversion_report, convert, merge
from cmpe_se.errors import UserError
from tests.conversion.networks import randomise
from tests.conversion.test_convert import gates, move_gates


class Block(nn.Module):
    def __init__(self, channels=12):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.scale = nn.Parameter(torch.rand(channels, 1, 1) + 0.5)
        self.register_buffer("calls", torch.zeros(()))

    def residual(self, x):
        return self.scale * self.conv2(relu(self.bn1(self.conv1(x))))

    def forward(self, x):
        return x + self.residual(x)


class Network(nn.Module):
    """Three blocks, of which the first two are alike and in a sequence."""

    def __init__(self, block=Block):
        super().__init__()
        self.layers = nn.Sequential(block(), block())
        self.last = Block()

    def forward(self, x):
        return self.last(self.layers(x))


X = torch.randn(2, 12, 8, 8, generator=torch.Generator().manual_seed(0))
ALL = ["layers.0", "layers.1", "last"]


def build(change=None, block=Block):
    torch.manual_seed(0)
    network = randomise(Network(block)).eval()
    return network if change is None else change(network) or network


def assert_right(original, converted, expected):
    """The same output at the start, and every gate that there is learns and matters."""
    report = conversion_report(converted)
    assert [gate.block for gate in report.gates] == expected
    with torch.no_grad():
        assert torch.equal(original(X), converted(X))
    assert_gates_matter(converted)


def assert_gates_matter(network):
    assert gates(network)
    network.zero_grad()
    y = network(X)
    y.square().sum().backward()
    for name, gate in gates(network).items():
        assert gate.fc2.weight.grad is not None, name
        assert gate.fc2.weight.grad.abs().sum() > 0, name


def blocks(network):
    return [*network.layers, network.last]


def bound_again(network):
    for block in blocks(network):
        block.forward = types.MethodType(type(block).forward, block)


def bound_everywhere(network):
    for module in network.modules():
        module.forward = types.MethodType(type(module).forward, module)


def hooked_layers(network):
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            add_hook_to_module(module, ModelHook())


def compiled_blocks(network):
    for block in blocks(network):
        block.compile(backend="eager")


CONVERTED = {
    "bound again": bound_again,
    "bound again at every module": bound_everywhere,
    "accelerate's hooks at layers": hooked_layers,
    "accelerate's hook at the network": lambda network: add_hook_to_module(network, ModelHook()),
    "another method of the network": lambda network: setattr(
        network, "forward", types.MethodType(lambda self, x: 2 * self.last(self.layers(x)), network)
    ),
    "compiled in place": lambda network: network.compile(backend="eager"),
    "compiled blocks": compiled_blocks,
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("change", CONVERTED.values(), ids=CONVERTED)
def test_forwards_that_run_the_class_s(change, inplace):
    torch.compiler.reset()
    original, network = build(change), build(change)
    with torch.no_grad():
        network(X)  # compiled code of before must not run afterwards
    assert_right(original, convert(network, inplace=inplace), ALL)


@pytest.mark.parametrize("inplace", [False, True])
def test_compiled_parts(inplace):
    torch.compiler.reset()
    network = build()
    network.last = torch.compile(network.last, backend="eager")
    with torch.no_grad():
        network(X)
    assert_right(build(), convert(network, inplace=inplace), ["layers.0", "layers.1", "last._orig_mod"])
    whole = torch.compile(build(), backend="eager")
    converted = convert(whole, inplace=inplace)
    assert_right(build(), converted, [f"_orig_mod.{name}" for name in ALL])
    assert not conversion_report(converted).skipped


COPIES = {
    "copy": copy.deepcopy,
    "pickle": lambda network: pickle.loads(pickle.dumps(network)),
    "average": lambda network: timm.utils.ModelEmaV3(network).module,
    "train and eval": lambda network: network.train().eval(),
    "to": lambda network: copy.deepcopy(network).double().to("cpu").float(),
    "data parallel": lambda network: nn.DataParallel(copy.deepcopy(network)),
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_copies_keep_their_gates(when, duplicate):
    """Whether a library binds the forward before the conversion or after it."""
    network = build(bound_again if when == "before" else None)
    converted = move_gates(convert(network))
    if when == "after":
        bound_again(converted)
    again = duplicate(duplicate(converted))
    with torch.no_grad():
        assert torch.equal(again(X), converted(X))
        assert not torch.equal(again(X), network(X))
    assert_gates_matter(again.requires_grad_(True))
    with torch.no_grad():
        torch.testing.assert_close(merge(converted)(X), converted(X))
        gate = move_gates(again)(X)
        assert not torch.equal(gate, converted(X)) or duplicate is COPIES["train and eval"]


def test_copies_share_a_class():
    converted = convert(build())
    assert type(copy.deepcopy(converted).last) is type(converted.last)
    assert type(pickle.loads(pickle.dumps(converted)).last) is type(converted.last)


def test_a_copy_of_a_compiled_block_runs_its_own_gates():
    torch.compiler.reset()
    converted = convert(build())
    compiled_blocks(converted)
    again = move_gates(copy.deepcopy(converted))
    with torch.no_grad():
        assert not torch.equal(again(X), converted(X))


def test_a_compiled_part_that_stands_elsewhere_too():
    torch.compiler.reset()
    network = build()
    network.last = torch.compile(network.layers[0], backend="eager")  # named before its wrapper
    report = conversion_report(convert(network))
    assert [gate.block for gate in report.gates] == ["layers.0", "layers.1"]


@pytest.mark.parametrize("inplace", [False, True])
def test_a_compiled_forward_and_a_compiled_sequence(inplace):
    """A compiled forward holds the module that it was made of, so that a copy would run the original."""
    torch.compiler.reset()
    network = build()
    network.forward = torch.compile(network.forward, backend="eager")
    if inplace:
        assert_right(build(), convert(network, inplace=True), ALL)
    else:
        with pytest.raises(UserError, match="its forward was replaced by function"):
            convert(network)
    network = build()
    network.layers = torch.compile(network.layers, backend="eager")
    with torch.no_grad():
        network(X)
    names = ["layers._orig_mod.0", "layers._orig_mod.1", "last"]
    assert_right(build(), convert(network, inplace=inplace), names)


def replaced(forward):
    def change(network):
        for block in network.layers:
            block.forward = forward(block)

    return change


class Callable:
    def __init__(self, block):
        self.forward = block.forward

    def __call__(self, x):
        return self.forward(x)


def scripted(network):
    network.layers = torch.jit.script(network.layers)


def traced(network):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network.layers = torch.jit.trace(network.layers, X)


def hooked(network):
    for block in network.layers:
        add_hook_to_module(block, ModelHook())


def container(network):
    old = network.layers.forward
    network.layers.forward = lambda x: old(x)


def own_layer(network):
    old = network.layers.forward
    network.layers.forward = lambda x: x + old(x)


def parametrised(network):
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    for block in network.layers:
        parametrize.register_parametrization(block, "scale", Twice())


def own_call_impl(network):
    for block in network.layers:
        block._call_impl = lambda x, block=block: type(block).forward(block, x)


LISTED = {
    "closure": (replaced(lambda block: lambda x, old=block.forward: old(x)), "<lambda>"),
    "partial": (replaced(lambda block: functools.partial(type(block).forward, block)), "functools.partial of"),
    "compiled": (replaced(lambda block: torch.compile(block.forward, backend="eager")), "replaced by function"),
    "wrapped": (replaced(lambda block: torch.no_grad()(block.forward)), "replaced by function"),
    "another method": (replaced(lambda block: types.MethodType(lambda self, x: self.residual(x), block)), "<lambda>"),
    "object": (replaced(Callable), "an object of class Callable"),
    "accelerate's hooks": (hooked, "functools.partial of function add_hook_to_module"),
    "container": (container, "inside layers: its forward was replaced by function container"),
    "container with an addition": (own_layer, "inside layers: its forward was replaced by function own_layer"),
    "parametrised": (parametrised, "has a __deepcopy__ of its own"),
    "call": (own_call_impl, "it has a _call_impl of its own"),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("change", "reason"), LISTED.values(), ids=LISTED)
def test_forwards_that_are_not_the_class_s_are_listed(change, reason, inplace):
    original, network = build(change), build(change)
    converted = convert(network, inplace=inplace)
    skipped = conversion_report(converted).skipped
    assert reason in skipped["layers.0"]
    assert reason in skipped["layers.1"]
    assert_right(original, converted, ["last"])


@pytest.mark.parametrize("change", [scripted, traced])
def test_torchscript_is_listed(change):
    original = build(change)
    converted = convert(build(change))
    assert conversion_report(converted).skipped == {
        "layers": "it is TorchScript, which runs code of its own; convert the network before it is scripted or traced"
    }
    assert_right(original, converted, ["last"])


def test_a_network_all_of_which_is_replaced_is_refused():
    network = build()
    old = network.forward
    network.forward = lambda x: old(x)
    with pytest.raises(UserError, match=r"no residual addition that can be converted \(the network itself: .*<lambda>"):
        convert(network)
    with pytest.raises(UserError, match="it is TorchScript"):
        convert(torch.jit.script(build()))


def test_a_function_that_a_copy_shares_is_named():
    """Its copy would run, and train, a layer of the original."""
    network = build()
    conv = network.last.conv2
    old = conv.forward
    conv.forward = lambda x: 2 * old(x)
    report = conversion_report(convert(network))
    assert len(report.gates) == 3
    assert "holds layers of the original network" in report.skipped["last.conv2"]
    assert "last.conv2" not in conversion_report(convert(network, inplace=True)).skipped


def test_generated_code():
    for whole in (True, False):
        network = build()
        if whole:
            network = torch.fx.symbolic_trace(network)
        else:
            network.last = torch.fx.symbolic_trace(network.last)
        converted = convert(network)
        assert_right(build(), converted, ["", "", ""] if whole else ALL)
        assert_gates_matter(copy.deepcopy(converted))
        move_gates(converted)
        with torch.no_grad():
            torch.testing.assert_close(copy.deepcopy(converted)(X), converted(X))
            assert not torch.equal(converted(X), build()(X))


def test_wrappers_of_several_processes_are_listed():
    """They know only the parameters that there were, so that each process would train gates of its own."""

    class Sharded(Network, FSDPModule):
        def __new__(cls):
            return nn.Module.__new__(cls)

    with pytest.raises(UserError, match="FSDPModule knows only the parameters that it was made with"):
        convert(Sharded(), inplace=True)


class OwnCall(Block):
    def __call__(self, x):
        return self.residual(x)


class OwnCopy(Block):
    def __deepcopy__(self, memo):
        return self


class Frozen(Block):
    def forward(self, x):
        with torch.no_grad():
            h = self.conv1(x)
        return x + self.conv2(h)


class HalfPrecision(Block):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return x + self.residual(x)


class KeepsItsResidual(Block):
    def forward(self, x):
        self.kept = self.residual(x)
        return x + self.kept


class Counts(Block):
    def forward(self, x):
        self.calls += 1
        return x + self.residual(x)


class Draws(Block):
    generator = staticmethod(lambda: torch.rand(()).item())

    def forward(self, x):
        return x if self.training and self.generator() < 1e-9 else x + self.residual(x)


class DrawsInPython(Draws):
    generator = staticmethod(random.random)


class DrawsInNumpy(Draws):
    generator = staticmethod(np.random.rand)


MORE_THAN_AN_OUTPUT = {
    Frozen: "switches gradients or autocast",
    HalfPrecision: "switches gradients or autocast",
    KeepsItsResidual: "keeps values on the block (kept)",
    Counts: "keeps values on the block (calls)",
    Draws: "draws random numbers",
    DrawsInPython: "draws random numbers",
    DrawsInNumpy: "draws random numbers",
}


def random_states():
    return random.getstate(), np.random.get_state()[2]  # noqa: NPY002


@pytest.mark.parametrize(("block", "reason"), MORE_THAN_AN_OUTPUT.items())
def test_forwards_that_do_more_than_compute_go_on_doing_it(block, reason):
    """Their graph would not; so their source is changed."""
    original, network = build(block=block), build(block=block)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    numbers = random_states()
    converted = convert(network, inplace=True)
    report = conversion_report(converted)
    assert [gate.block for gate in report.gates] == ALL
    assert not report.skipped
    assert set(report.notes) == {"layers.0", "layers.1"}
    assert all(reason in words for words in report.notes.values())
    # Looking left nothing behind.
    assert all(torch.equal(network.state_dict()[key], value) for key, value in before.items())
    assert "kept" not in vars(network.layers[0])
    assert random_states() == numbers

    for training in (False, True):
        outputs = []
        for one in (original, converted):
            torch.manual_seed(0), random.seed(0), np.random.seed(0)  # noqa: NPY002
            outputs.append((one.train(training)(X), random_states(), torch.get_rng_state().tolist()))
        assert torch.equal(outputs[0][0], outputs[1][0]) or training  # gates in training may round in another order
        torch.testing.assert_close(outputs[0][0], outputs[1][0])
        assert outputs[0][1:] == outputs[1][1:]
        assert torch.equal(original.layers[0].calls, converted.layers[0].calls)
        kept = [vars(one.layers[0]).get("kept") for one in (original, converted)]
        assert kept[0] is None or torch.allclose(*kept)

    assert_gates_matter(converted.eval())
    vars(converted.layers[0]).pop("kept", None), vars(converted.layers[1]).pop("kept", None)
    move_gates(converted)
    with torch.no_grad():
        moved = converted(X)
        assert not torch.equal(moved, original.eval()(X))
        for layer in converted.layers:
            vars(layer).pop("kept", None)
        for again in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
            assert torch.equal(again(X), moved)
        torch.testing.assert_close(merge(converted)(X), moved, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("block", "reason"), {OwnCall: "a __call__", OwnCopy: "OwnCopy has a __deepcopy__"}.items())
def test_blocks_that_need_not_run_their_forward_are_listed(block, reason):
    report = conversion_report(convert(build(block=block), inplace=True, where=lambda name, block: True))
    assert set(report.skipped) == {"layers.0", "layers.1"}
    assert all(reason in words for words in report.skipped.values())
    assert [gate.block for gate in report.gates] == ["last"]


def test_a_count_in_a_buffer_goes_on():
    class AddsOne(Block):
        def forward(self, x):
            self.calls.add_(1)
            return x + self.residual(x)

    converted = convert(build(block=AddsOne))
    assert converted.layers[0].calls == 0
    with torch.no_grad():
        converted(X), converted(X)
    assert converted.layers[0].calls == 2


class Wrapper(nn.Module):
    """Runs the forward of what it wraps, and is not it, as adapters of fine-tuning do."""

    def __init__(self, base=None):
        super().__init__()
        self.base = base or Block()

    def forward(self, x):
        return self.base.forward(x)


class RunsLayers(Wrapper):
    def forward(self, x):
        return self.base.conv2(self.base.conv1(x))


def test_a_block_whose_layers_are_run_from_outside_has_no_gate_of_its_own():
    network = build(block=Wrapper)
    converted = convert(network)
    assert_right(network, converted, ["layers.0", "layers.1", "last"])
    assert conversion_report(converted).skipped["layers.0.base"] == "layers.0 runs its layers without it"
    network = build(block=RunsLayers)
    converted = convert(network)
    assert_right(network, converted, ["last"])
    assert "layers.0.base" in conversion_report(converted).skipped


def test_a_block_at_two_places_has_one_gate():
    network = build()
    network.last = network.layers[0]
    converted = convert(network)
    assert_right(network, converted, ["layers.0", "layers.1"])
    assert converted.last is converted.layers[0]
    old = network.layers.forward  # a place where its gate might not be reached is not all that there is
    network.layers.forward = lambda x: old(x)
    assert [gate.block for gate in conversion_report(convert(network, inplace=True)).gates] == ["layers.0"]


def test_hooks_are_called_once():
    calls = []
    network = build()
    for block in blocks(network):
        block.register_forward_hook(lambda *_: calls.append(1))
        block.conv1.register_forward_pre_hook(lambda *_: calls.append(1))
    converted = convert(network)
    assert not calls
    with torch.no_grad():
        converted(X)
    assert len(calls) == 6


def test_data_parallel():
    converted = convert(nn.DataParallel(build()))
    assert_right(build(), converted, [f"module.{name}" for name in ALL])


def test_parts_that_torchscript_ignores():
    class Ignored(Block):
        @torch.jit.ignore
        def residual(self, x):
            return super().residual(x)

    network = build(block=Ignored)
    assert_right(network, convert(network), ALL)


def test_a_class_without_subclasses_is_refused_before_anything_changes():
    class Final(Block):
        def __init_subclass__(cls, **_):
            raise TypeError("no subclasses")

    network = build(block=Final)
    with pytest.raises(UserError, match=r"block layers\.0: Final cannot have a subclass \(no subclasses\).*where="):
        convert(network, inplace=True)
    assert not gates(network)
    assert type(network.last) is Block
    assert len(gates(convert(network, where="last"))) == 1
