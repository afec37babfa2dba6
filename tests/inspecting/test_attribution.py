"""Attributions against Grad-CAM by hand, with the gradient that goes through the next block's gate."""

import pytest
import torch

from cmpe_se.inspecting.attribution import attribute
from tests.networks.naive import SMALL_NETWORKS, SQUEEZE_VIEWS, naive_block, randomise


def grad_cam(model, x, target, place):
    """At the output of block ``place`` of all, the squeezes never handed on: (h, w)."""
    blocks = [block for stage in model.stages for block in stage.blocks]
    y = model.stem(x[None])
    for block in blocks[: place + 1]:
        y = naive_block(block, y)
    y = y.detach().requires_grad_()
    after = y
    for block in blocks[place + 1 :]:
        after = naive_block(block, after)
    logit = model.forward_head(torch.relu(model.norm(after)))[0, target]
    (gradient,) = torch.autograd.grad(logit, y)
    return (gradient.mean((2, 3), keepdim=True) * y).sum(1)[0].detach()


@pytest.mark.parametrize("view", SQUEEZE_VIEWS)
@pytest.mark.parametrize("kind", SMALL_NETWORKS)
def test_grad_cam_by_hand(kind, view):
    torch.manual_seed(0)
    model = randomise(SMALL_NETWORKS[kind](view=view, dtype=torch.float64)).eval()
    images, targets = torch.randn(2, 3, 12, 12, dtype=torch.float64), [3, 7]
    names = [f"stages.{stage}.blocks.0" for stage in range(3)]
    found = attribute(model, images, targets, names)
    for image, target, attribution in zip(images, targets, found, strict=True):
        assert attribution.target == target
        for place, name in enumerate(names):
            expected = grad_cam(model, image, target, place).float()
            torch.testing.assert_close(attribution.blocks[name], expected, rtol=1e-4, atol=1e-5 * expected.abs().max())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_pixels_add_up_to_the_logit():
    torch.manual_seed(0)
    model = SMALL_NETWORKS["basic"](view="folded_3x3").eval()
    for side in (12, 80):  # the larger one is summed over cells
        images = 0.3 * torch.randn(2, 3, side, side)
        with torch.no_grad():
            gained = (model(images) - model(torch.zeros_like(images)))[range(2), [1, 2]]
        maps = attribute(model, images, [1, 2], [])
        assert maps[0].pixels.shape == (min(side, 56),) * 2
        sums = torch.stack([attribution.pixels.sum() for attribution in maps])
        torch.testing.assert_close(sums, gained, rtol=0.1, atol=0.05)
