"""The oracle: METHOD.md's equations written out one by one, no squeeze flows; and random numbers for its norms.

A new view of squeezes has its equations written out in ``naive_gate``; the tests over all views find it by the table.
"""

import torch
from torch import Tensor, nn

from cmpe_se import CompetitiveSE, PreActResNet, WideResNet
from cmpe_se.layers.views import TABLE
from cmpe_se.networks.blocks import PreActBottleneck

KERNELS = {"pair_view_2x1": (1, 2), "pair_view_1x1": (1, 1), "folded_3x3": (3, 3)}
SQUEEZE_VIEWS = tuple(name for name, view in TABLE.items() if view.takes_squeezes)
"""Views that are functions of the two squeezes."""
COMPETING_VIEWS = tuple(name for name in SQUEEZE_VIEWS if "identity" in TABLE[name].reads)
"""Those of them that look at the identity."""
MERGING_VIEWS = tuple(name for name in SQUEEZE_VIEWS if TABLE[name].merges)
"""Those of them that have a merged form."""
SMALL_NETWORKS = {
    "bottleneck": lambda **settings: PreActResNet(11, **settings),
    "basic": lambda **settings: PreActResNet(8, block="basic", **settings),
    "wide": lambda **settings: WideResNet(10, 2, **settings),
}


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0):
    """Draw all norms' parameters and statistics, and gate weights that spread the gates out; returns the module."""
    generator = torch.Generator().manual_seed(seed)
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.running_mean.normal_(0, 0.5, generator=generator)
            child.running_var.uniform_(0.5, 2, generator=generator)
            if child.affine:
                child.weight.uniform_(0.5, 1.5, generator=generator)
                child.bias.normal_(0, 0.5, generator=generator)
        elif isinstance(child, CompetitiveSE):
            for linear in child.children():
                if isinstance(linear, nn.Linear):
                    linear.weight.normal_(0, 2 / linear.in_features**0.5, generator=generator)
                if child.view == "static" or (isinstance(linear, nn.Linear) and linear.bias is not None):
                    linear.bias.normal_(0, 1, generator=generator)
    return module


def naive_picture(r: Tensor, i: Tensor, view: str, columns: int | None) -> Tensor:
    """(N, C) and (N, C) to (N, height, width), pixel by pixel."""
    batch, channels = r.shape
    if view != "folded_3x3":
        return torch.stack((r, i), dim=2)  # column 0 residual, column 1 identity
    picture = r.new_zeros(batch, 2 * channels // columns, columns)
    for c in range(channels):
        picture[:, 2 * (c // columns), c % columns] = r[:, c]
        picture[:, 2 * (c // columns) + 1, c % columns] = i[:, c]
    return picture


def naive_gate(attention: CompetitiveSE, r: Tensor, i: Tensor) -> Tensor:
    """The gate a from the squeezes, (N, C) each, before its gain; in training it moves the running statistics too."""
    if attention.view == "static":
        return 1 / (1 + torch.exp(-attention.fc2.bias)) * torch.ones_like(r)
    reads = {"se": r, "se_identity": i, "se_sum": r + i}
    if attention.view in reads:
        hidden = _affine(attention.fc1, reads[attention.view]).relu()
    elif attention.view == "double_fc":
        hidden = torch.cat((_affine(attention.fc_residual, r).relu(), _affine(attention.fc_identity, i).relu()), dim=1)
    else:
        assert attention.view in KERNELS, f"the equations of view '{attention.view}' are to be written out here"
        columns = attention.picture_size[1]
        picture = naive_picture(r, i, attention.view, columns)
        height, width = KERNELS[attention.view]
        out_height, out_width = picture.shape[1] - height + 1, picture.shape[2] - width + 1
        normalised = []
        for m, weight in enumerate(attention.map_conv.weight[:, 0]):
            convolved = sum(
                weight[y, x] * picture[:, y : y + out_height, x : x + out_width]
                for y in range(height)
                for x in range(width)
            )
            normalised.append(_naive_norm(attention.map_norm, m, convolved))
        hidden = _affine(attention.fc1, (sum(normalised) / len(normalised)).flatten(1)).relu()
    return 1 / (1 + torch.exp(-_affine(attention.fc2, hidden)))


def _affine(layer: nn.Linear, x: Tensor) -> Tensor:
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def _naive_norm(norm: nn.BatchNorm2d, index: int, values: Tensor) -> Tensor:
    mean, variance = norm.running_mean[index], norm.running_var[index]
    if norm.training:
        mean, variance = values.mean(), values.var(correction=0)
        with torch.no_grad():
            unbiased = variance * values.numel() / (values.numel() - 1)
            norm.running_mean[index] = 0.9 * norm.running_mean[index] + 0.1 * mean
            norm.running_var[index] = 0.9 * norm.running_var[index] + 0.1 * unbiased
            norm.num_batches_tracked += index == 0
    return (values - mean) / (variance + 1e-5).sqrt() * norm.weight[index] + norm.bias[index]


def naive_flows(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Residual u and shortcut s of one block, without dropout."""
    h = torch.relu(block.bn1(x))
    shortcut = x if block.shortcut is None else block.shortcut(h)
    if isinstance(block, PreActBottleneck):
        h = block.conv2(torch.relu(block.bn2(block.conv1(h))))
        return block.conv3(torch.relu(block.bn3(h))), shortcut
    return block.conv2(torch.relu(block.bn2(block.conv1(h)))), shortcut


def naive_block(block: nn.Module, x: Tensor) -> Tensor:
    """``y = s + a u``, the squeezes taken from u and s themselves."""
    residual, shortcut = naive_flows(block, x)
    if block.attention is None:
        return shortcut + residual
    gate = block.attention.gain * naive_gate(block.attention, residual.mean((2, 3)), shortcut.mean((2, 3)))
    return shortcut + gate[:, :, None, None] * residual


def naive_network(model: nn.Module, x: Tensor) -> Tensor:
    """Logits of a whole network."""
    x = model.stem.conv(model.stem.input_norm(x))
    if isinstance(model, WideResNet):
        x = model.stem.norm(x)
    for stage in model.stages:
        for block in stage.blocks:
            x = naive_block(block, x)
    return torch.relu(model.norm(x)).mean((2, 3)) @ model.head.fc.weight.T + model.head.fc.bias
