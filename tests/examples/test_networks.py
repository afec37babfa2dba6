"""The examples of a timm network, a torchvision network and a block of one's own do what they say."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

import cmpe_se

EXAMPLES = Path(__file__).parents[2] / "examples"


def names_of(example: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / f"{example}.py"))


@pytest.mark.slow
def test_timm_network_learns_and_merges():
    example = names_of("timm_network")
    original, converted = example["build"]()
    images = torch.randn(4, 1, 32, 32)
    assert example["largest_difference"](original, converted, images) == 0
    losses = example["train"](converted, steps=8)
    assert sum(losses[-2:]) < 0.9 * sum(losses[:2])
    assert any((block.gate - 1).abs().max() > 0.1 for block in cmpe_se.inspect(converted, images))
    assert example["largest_difference"](converted, cmpe_se.merge(converted), images) < 1e-4


@pytest.mark.long
def test_torchvision_network_is_exported_with_its_gates(tmp_path):
    example = names_of("torchvision_network")
    original, converted = example["build"]()
    converted_blocks = [gate.block for gate in cmpe_se.conversion_report(converted).gates]
    assert converted_blocks
    assert all(name.startswith(tuple(example["WHERE"])) for name in converted_blocks)
    images = torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        before = original(images)
        assert torch.equal(before, converted(images))
        example["open_gates_a_little"](converted)
        example["export"](converted, tmp_path / "network.pt2", torch.randn(2, 3, 64, 64))
        exported = torch.export.load(tmp_path / "network.pt2").module()(images)
        torch.testing.assert_close(exported, converted(images), atol=1e-5, rtol=1e-4)
        assert not torch.equal(exported, before)


@pytest.mark.parametrize("way", ["in the block", "converted"])
def test_own_block_learns_with_a_gate(way):
    example = names_of("own_block")
    if way == "in the block":
        model = example["build"](example["GatedBlock"])
    else:
        model = cmpe_se.convert(example["build"](example["PlainBlock"]))
    losses = example["train"](model, steps=25)
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])
    assert len(cmpe_se.inspect(model, torch.randn(2, 1, 8, 8))) == 3
