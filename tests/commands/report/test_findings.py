"""What a report calls a finding: no rounding noise, nothing that chance would give, no difference of equal numbers."""

import pytest
import torch

from cmpe_se.commands.report.facts import facts_of
from cmpe_se.commands.report.report import _gates
from cmpe_se.data import load_data
from cmpe_se.exhibits.depth import channel_rows, gates_over_depth, shares_over_depth
from cmpe_se.exhibits.photos import confusion
from cmpe_se.inspecting import BlockView
from cmpe_se.inspecting.gathering import Gathered
from cmpe_se.inspecting.statistics import BlockStatistics
from cmpe_se.training.run_folder import RunFolder
from cmpe_se.utils.text import data_name

CLASSES = 10


def block(gate, labels, *, name="block", gain=1.0, energies=(None, None)) -> BlockStatistics:
    view = BlockView(name, "se", gain, gate, gate, None, None, gate, None, *energies)
    statistics = BlockStatistics(view, CLASSES)
    statistics.add(view, labels)
    return statistics


def section(*gates, labels, gain=1.0):
    blocks = [block(gate, labels, name=f"layer{place}", gain=gain) for place, gate in enumerate(gates)]
    tested = Gathered.of_logits(torch.eye(CLASSES)[labels], labels, blocks)
    return _gates(tested, load_data("digits").classes, None if any(each.varies for each in blocks) else "still")


@pytest.fixture
def labels():
    return torch.arange(200) % CLASSES


@pytest.mark.parametrize("gain", [1.0, 2.0])
@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-4])
def test_gates_at_their_start_are_one_sentence(labels, gain, noise):
    gate = gain / 2 + noise * gain * torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    made = section(gate, gate, labels=labels, gain=gain)
    assert made.exhibits == []
    assert made.finding == "still"
    still = block(gate, labels, gain=gain)
    assert not still.telling
    assert {row[-1] for row in channel_rows([still])} == {""}  # no channel is dead before training


def test_gates_that_ignore_the_class_have_no_classes_to_show(labels):
    gate = torch.rand(200, 16, generator=torch.Generator().manual_seed(0))
    made = section(gate, labels=labels)
    assert [exhibit.name for exhibit in made.exhibits] == ["gates-over-depth"]
    assert made.finding == "The gates do not differ between classes by more than twice what chance would make them."


def test_one_image_of_each_class_tells_nothing_of_classes():
    gate = torch.rand(CLASSES, 16, generator=torch.Generator().manual_seed(0))
    statistics = block(gate, torch.arange(CLASSES))
    assert statistics.explained == pytest.approx(1)
    assert not statistics.telling


def test_one_class_has_nothing_to_differ_from():
    gate = torch.rand(50, 16, generator=torch.Generator().manual_seed(0))
    assert not block(gate, torch.zeros(50, dtype=torch.int64)).telling


def test_gates_that_follow_the_class_are_shown(labels):
    gate = 0.3 + 0.04 * labels[:, None] + 0.1 * torch.rand(200, 16, generator=torch.Generator().manual_seed(0))
    made = section(gate, labels=labels)
    assert [exhibit.name for exhibit in made.exhibits] == ["gates-over-depth", "class-differences", "telling-channels"]
    assert made.finding == ""


def test_equal_numbers_are_called_equal(labels):
    gate = 0.3 + 0.04 * labels[:, None].expand(200, 16)
    energies = (torch.full((200, 16), 0.25), torch.full((200, 16), 0.75))
    blocks = [block(gate, labels, name=name, energies=energies) for name in ("a", "b")]
    assert gates_over_depth(blocks).title.startswith("Gates range alike in every block (middle 90 % from 0.30 to 0.66)")
    assert shares_over_depth(blocks).title.endswith("of the energy in every block")
    alone = gates_over_depth(blocks[:1]).title
    assert alone.startswith("Gates range alike in a (")
    perfect = torch.diag(torch.full((3,), 7))
    assert confusion(perfect, ["x", "y", "z"]).title == "All classes are as hard: 100.0 % correct"


def test_chance_is_that_of_the_most_frequent_class(folded):
    labels = torch.tensor([0, 0, 0, 1])
    facts = dict(facts_of(RunFolder(folded), 75.0, ["cat", "dog"], labels))
    assert facts["Chance level"] == "75.00 %, the most frequent of 2 classes"
    assert facts["Data"] == "digits, 1,437 training and 360 test images"


@pytest.mark.parametrize(
    ("data", "data_dir", "name"),
    [
        ("digits", None, "digits"),
        ("cifar10", "/data/torchvision", "cifar10"),
        ("folder", "/data/flowers", "flowers"),
        ("folder", "/data/flowers/", "flowers"),
        ("folder", "/", "folder"),
        ("imagenet", "/data/imagenette2", "imagenette2"),
        ("hfds/user/flowers", "/cache", "hfds/user/flowers"),
        ("hfds//data/flowers", None, "flowers"),
        ("wds/flowers", None, "wds/flowers"),
        ("wds/flowers", "/data/shards", "shards"),
    ],
)
def test_data_have_the_name_that_people_gave_them(data, data_dir, name):
    assert data_name(data, data_dir) == name
