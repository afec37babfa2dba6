"""Statistics that grow batch by batch, against those of all gates at once; which images and blocks are chosen."""

import re

import numpy as np
import pytest
import torch

from cmpe_se import PreActResNet
from cmpe_se.errors import UserError
from cmpe_se.exhibits.choosing import choose_blocks, choose_images, confused_pairs, named_blocks
from cmpe_se.exhibits.depth import class_differences, standstill, telling_channels
from cmpe_se.exhibits.drawing.depth import highest
from cmpe_se.inspecting import BlockView
from cmpe_se.inspecting.gathering import Gathered, gather
from cmpe_se.inspecting.statistics import BlockStatistics

CLASSES = 3


def view(gate, gain=1.0, name="block", energies=None, kind="se"):
    residual, identity = energies or (None, None)
    return BlockView(name, kind, gain, gate, gate, None, None, gate, None, identity, residual)


@pytest.fixture(params=[1.0, 2.0])
def gain(request):
    return request.param


@pytest.fixture
def all_at_once(gain):
    """Gates (N, C) of which channel 0 is always closed, 1 always open, 2 dead; labels; energies."""
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (300,), generator=random)
    gate = torch.rand(300, 8, generator=random, dtype=torch.float64)
    gate[:, 5] = 0.2 + 0.3 * labels + 0.01 * gate[:, 5]
    gate[:, 0] *= 0.049
    gate[:, 1] = 0.951 + 0.04 * gate[:, 1]
    gate[:, 2] = 0.3 + 0.004 * gate[:, 2]
    return gain * gate, labels, torch.rand(2, 300, 8, generator=random, dtype=torch.float64)


@pytest.fixture
def statistics(all_at_once, gain):
    gate, labels, (residual, identity) = all_at_once
    grown = None
    for part in (slice(0, 7), slice(7, 200), slice(200, 300)):
        seen = view(gate[part], gain, energies=(residual[part], identity[part]))
        grown = grown or BlockStatistics(seen, CLASSES)
        grown.add(seen, labels[part])
    return grown


def test_as_all_at_once(statistics, all_at_once, gain):
    gate, labels, (residual, identity) = all_at_once
    close = torch.testing.assert_close
    close(statistics.mean, gate.mean(0))
    close(statistics.std, gate.std(0, correction=0))
    close(statistics.closed, (gate < 0.05 * gain).double().mean(0))
    close(statistics.open, (gate > 0.95 * gain).double().mean(0))
    means = torch.stack([gate[labels == k].mean(0) for k in range(CLASSES)])
    close(statistics.class_means, means)
    between = ((means[labels] - gate.mean(0)) ** 2).mean(0)
    close(statistics.between, between)
    assert statistics.explained == pytest.approx((between.sum() / gate.var(0, correction=0).sum()).item())
    parts = torch.tensor([0.05, 0.5, 0.9], dtype=torch.float64)
    assert statistics.quantiles(*parts.tolist()) == pytest.approx(gate.flatten().quantile(parts).tolist(), abs=0.002)
    shares = residual.sum(1) / (residual.sum(1) + identity.sum(1))
    close(statistics.residual_shares, shares)
    assert statistics.class_residual_shares[1] == pytest.approx(shares[labels == 1].mean().item())


def test_kinds_of_channels(statistics):
    assert statistics.kinds == {"closed": [0], "open": [1], "dead": [2]}


_RAMP = torch.linspace(0, 1, 20)[:, None]
STANDING = {
    "constants at their start": ("static", 1, torch.full((20, 6), 0.5), "constants, and none .* as 0.01 .* value, 0.5"),
    "constants that learnt": ("static", 2, torch.linspace(0.4, 1.6, 6).expand(20, 6), "the same for every image"),
    "gates that learnt nothing": ("se", 2, torch.ones(20, 6) + 1e-3 * _RAMP, "have hardly moved: none has .* value, 1"),
    "products at their start": ("timm_cbam", 4, torch.ones(20, 6), "have hardly moved: none has .* value, 1"),
    "gates as constants": ("se", 1, 0.3 + 1e-3 * _RAMP.expand(20, 6), "No gate depends on the image: .* below 0.005 "),
    "gates that follow the image": ("se", 1, 0.3 + 0.1 * _RAMP.expand(20, 6), None),
}


@pytest.mark.parametrize(("kind", "gain", "gate", "sentence"), STANDING.values(), ids=STANDING)
def test_gates_that_stand_still(kind, gain, gate, sentence):
    seen = view(gate, gain, kind=kind)
    block = BlockStatistics(seen, CLASSES)
    block.add(seen, torch.arange(20) % CLASSES)
    said = standstill([block])
    assert (said is None) == (sentence is None) == block.varies
    assert sentence is None or re.search(sentence, said)
    assert block.moved == (said is None or "moved" not in said)
    assert (block.kinds["dead"] == []) == (kind == "static" or block.varies or not block.moved)


def test_rounding_noise_tells_no_classes_apart():
    labels = torch.arange(30) % CLASSES
    noise, signal = 0.5 + 1e-6 * labels[:, None].expand(30, 4), 0.2 + 0.2 * torch.rand(30, 4) + 0.1 * labels[:, None]
    blocks = [BlockStatistics(view(gate, name=name), CLASSES) for name, gate in (("noise", noise), ("signal", signal))]
    for block, gate in zip(blocks, (noise, signal), strict=True):
        block.add(view(gate.double()), labels)
    assert blocks[0].explained > 0.99 > blocks[1].explained
    assert "differ most in signal" in class_differences(blocks, "abc").title
    assert telling_channels(blocks, "abc").title.startswith("In signal, channel")


def test_an_axis_of_gates_ends_where_they_may_lie():
    assert [highest(np.array([0.3]), 0.5 * gain, gain) for gain in (1, 2)] == [1, 2]
    assert highest(np.array([0.3]), 1, 4) == 2
    assert highest(np.array([2.5]), 1, 4) == 2.75
    assert highest(np.array([3.9]), 1, 4) == 4


def test_a_class_without_images():
    seen = view(torch.rand(4, 6))
    statistics = BlockStatistics(seen, CLASSES)
    statistics.add(seen, torch.tensor([0, 0, 1, 1]))
    torch.testing.assert_close(statistics.class_means[2], statistics.mean)
    assert statistics.class_residual_shares == [None] * 3
    assert 0 <= statistics.explained <= 1


def answers(predicted, labels, confidence):
    logits = torch.zeros(len(labels), 4)
    logits[range(len(labels)), predicted] = torch.tensor(confidence)
    return Gathered.of_logits(logits, torch.tensor(labels))


def test_chosen_images_are_sure_and_of_different_classes():
    #              right: 0 1 2 3 4          wrong: 5 6 7 8
    found = answers([0, 0, 1, 2, 3, 1, 1, 2, 0], [0, 0, 1, 2, 3, 0, 0, 3, 3], [9, 8, 7, 6, 5, 4, 3, 2, 1.0])
    assert choose_images(found, 2, 2) == [2, 3, 5, 7]  # the wrong ones choose their classes first
    assert choose_images(found, 0, 3) == [5, 7, 6]
    assert choose_images(found, 9, 9) == [2, 3, 0, 1, 4, 5, 7, 6, 8]


def test_confused_pairs():
    found = answers([1, 1, 0, 0, 2], [0, 0, 3, 0, 0], [1, 2, 3, 4, 5.0])
    assert [(pair.true, pair.predicted, pair.images) for pair in confused_pairs(found)] == [
        (0, 1, (1, 0)),
        (0, 2, (4,)),
        (3, 0, (2,)),
    ]
    assert confused_pairs(answers([1, 2], [1, 2], [1, 1.0])) == []


def test_chosen_blocks_are_the_most_varied_of_each_width():
    blocks = []
    for number, (channels, spread) in enumerate([(8, 0.1), (8, 0.3), (16, 0.2), (16, 0.1), (8, 0.1)]):
        gate = 0.5 + spread * (torch.rand(20, channels) - 0.5)
        blocks.append(BlockStatistics(view(gate, name=str(number)), 1))
        blocks[-1].add(view(gate), torch.zeros(20, dtype=torch.int64))
    assert choose_blocks(blocks) == ["1", "2", "4"]
    still = [torch.linspace(0.5 - spread, 0.5, 8).expand(20, 8) for spread in (0, 0.2, 0.1)]
    constant = [BlockStatistics(view(gate, name=str(number), kind="static"), 1) for number, gate in enumerate(still)]
    for block, gate in zip(constant, still, strict=True):
        block.add(view(gate), torch.zeros(20, dtype=torch.int64))
    assert choose_blocks(constant) == ["1"]  # of which the channels differ most
    many = [BlockStatistics(view(torch.rand(2, channels), name=str(channels)), 1) for channels in range(10, 20)]
    for block in many:
        block.add(view(torch.rand(2, block.channels)), torch.zeros(2, dtype=torch.int64))
    assert choose_blocks(many) == ["10", "13", "16", "19"]


def test_named_blocks():
    assert named_blocks("c, a", ["a", "b", "c"]) == ["a", "c"]
    with pytest.raises(UserError, match="'d'; there are a, b"):
        named_blocks("d", ["a", "b"])
    with pytest.raises(UserError, match="empty"):
        named_blocks(",", ["a", "b"])


def test_a_pass_in_batches_keeps_three_numbers_of_an_image():
    network, images = PreActResNet(11, view="folded_3x3", num_classes=7).eval(), torch.randn(11, 3, 16, 16)
    labels = torch.arange(11) % 7
    tested = gather(network, zip(images.split(4), labels.split(4), strict=True), 7)
    with torch.no_grad():
        probabilities = network(images).softmax(1)
    assert tested.predicted.tolist() == probabilities.argmax(1).tolist()
    torch.testing.assert_close(tested.confidence, probabilities.amax(1))
    assert tested.labels.tolist() == labels.tolist()
    kept = [part for block in tested.blocks for part in block._shares]
    assert sum(part.numel() for part in kept) == 11 * len(tested.blocks)
    sizes = [value.numel() for value in vars(tested).values() if isinstance(value, torch.Tensor)]
    assert sizes == [11, 11, 11]
