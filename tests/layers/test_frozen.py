"""What a seed gives stays what it was: names, initial weights, random draws and outputs of each view."""

import math
from hashlib import sha256

import pytest
import torch
from torch import Tensor, nn

from cmpe_se import CompetitiveSE, PreActResNet

SETTINGS = {"start": "one", "reduction": 4, "min_hidden": 3, "bias": True, "dtype": torch.float64}

# Of the gate alone and of a network: names, weights, the next random number, and outputs in training mode.
FROZEN = {
    "se": (
        ("c79cded8", -0.252968723645, 0.286304950714, 381.710556948),
        ("2eba8423", 624.511551626, 0.0760416984558, -2.50496101335),
    ),
    "double_fc": (
        ("1a5554c1", -7.29925704856, 0.278153598309, 374.24260118),
        ("37ee1229", 631.025780793, 0.427610218525, -1.58565794135),
    ),
    "pair_view_2x1": (
        ("b3f11e74", 4.1598927045, 0.424574494362, 367.438126892),
        ("65596b3c", 600.864589936, 0.175266265869, -2.37841724397),
    ),
    "pair_view_1x1": (
        ("cb4a47a2", -2.06335025011, 0.377640545368, 382.295337412),
        ("deb2bf8b", 627.603455169, 0.69516146183, 0.454226311553),
    ),
    "folded_3x3": (
        ("938de803", 2.39372885547, 0.985546648502, 385.909293934),
        ("0d99d98a", 601.61820519, 0.351687908173, -2.10662154028),
    ),
    "static": (
        ("77a6931c", 0, 0.00426352024078, 371.35729932),
        ("9ba35b71", 677.877245209, 0.146537601948, -0.473250259581),
    ),
    "se_identity": (
        ("c79cded8", -0.252968723645, 0.286304950714, 376.404015521),
        ("2eba8423", 624.511551626, 0.0760416984558, -2.53488927487),
    ),
    "se_sum": (
        ("c79cded8", -0.252968723645, 0.286304950714, 377.377321594),
        ("2eba8423", 624.511551626, 0.0760416984558, -2.56132267327),
    ),
    "timm_se": (
        ("d35d082a", -3.3265349091, 0.264741420746, 360.342447151),
        ("ac68c42d", 632.628580425, 0.326417565346, -3.40021538368),
    ),
    "timm_eca": (
        ("ab3bce55", -0.582867464182, 0.771865844727, 193.528147103),
        ("cedb58b1", 660.373020449, 0.597983777523, -0.757681915063),
    ),
    "timm_ge": (
        ("8b911ffb", -3.3265349091, 0.264741420746, 360.342447151),
        ("2f049c60", 632.628580425, 0.326417565346, -3.40021538368),
    ),
    "timm_gc": (
        ("d2a92371", 5.59521293323, 0.877292990685, 334.305630448),
        ("088dedf5", 679.303292129, 0.235979259014, -3.06691643237),
    ),
    "timm_cbam": (
        ("8666f2dd", -3.20248829198, 0.576249480247, 720.062136416),
        ("8f0d3a8a", 595.426835659, 0.540736913681, -3.62640158567),
    ),
    "aff": (
        ("5269ce15", 87.731632476, 0.286304950714, 331.595105216),
        ("c7d9be90", 1961.36647621, 0.0760416984558, -2.22108213105),
    ),
}


def number(tensors: list[Tensor]) -> float:
    """One number that changes with every element, and with their order."""
    x = torch.cat([tensor.detach().double().flatten() for tensor in tensors])
    return (x * torch.linspace(0.5, 1.5, len(x), dtype=torch.float64).cos()).sum().item()


def names(module: nn.Module) -> str:
    """A checksum of the names and shapes in a state dict, in order."""
    return sha256(str([(name, tuple(x.shape)) for name, x in module.state_dict().items()]).encode()).hexdigest()[:8]


def measured(view: str) -> list[tuple]:
    rows = []
    for make, sizes in (
        (lambda: CompetitiveSE(48, view=view, columns=8, maps=2, **SETTINGS), [(4, 48, 3, 5)] * 2),
        (lambda: PreActResNet(11, view=view, **SETTINGS), [(4, 3, 12, 12)]),
    ):
        torch.manual_seed(3)
        module = make()
        weights, draw = number(list(module.state_dict().values())), torch.rand(()).item()
        inputs = [torch.linspace(-3, 3, math.prod(size), dtype=torch.float64).sin().view(size) for size in sizes]
        rows.append((names(module), weights, draw, number([module(*(x**n for n, x in enumerate(inputs, 1)))])))
    return rows


@pytest.mark.parametrize("view", FROZEN)
def test_a_seed_gives_what_it_gave(view):
    for (structure, *numbers), (frozen_structure, *frozen) in zip(measured(view), FROZEN[view], strict=True):
        assert structure == frozen_structure
        assert numbers == pytest.approx(frozen, rel=1e-9, abs=1e-9)
