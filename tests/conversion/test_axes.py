"""What axes hold, followed through operations: channels (c), positions (p), or not known (.)."""

import pytest
import torch
from timm.layers import LayerNorm2d, create_attn
from torch import nn
from torch.nn import functional

from cmpe_se.conversion.axes import AxisTracker, Layout, joined

C = 12
WORDS = {"c": "channels", "p": "positions", ".": None}
IMAGE, SIGNAL, UNKNOWN = (1, C, 8, 6), (1, C, 8), (1, 8, C)


def attention(x):
    """Self-attention over the positions of an image, as in BoTNet."""
    q, k, v = torch.cat([x, x, x], 1).flatten(2).chunk(3, 1)
    q, k, v = (flow.unflatten(1, (3, 4)) for flow in (q, k, v))  # (N, heads, d, P)
    weights = (q.transpose(-2, -1) @ k).softmax(-1)
    return (v @ weights.transpose(-2, -1)).reshape(x.shape)


def shuffled(x):
    return x.unflatten(1, (3, 4)).transpose(1, 2).reshape(x.shape)


STEPS = {
    "convolution": (nn.Conv2d(C, 5, 3), IMAGE, ".cpp"),
    "transposed convolution": (nn.ConvTranspose1d(C, 5, 3), SIGNAL, ".cp"),
    "norm and activation": (nn.Sequential(nn.BatchNorm1d(C), nn.ReLU(inplace=True)), SIGNAL, ".cp"),
    "group norm": (nn.GroupNorm(3, C), SIGNAL, ".cp"),
    "instance norm": (nn.InstanceNorm1d(C), SIGNAL, ".cp"),
    "dropout": (nn.Dropout1d(), SIGNAL, ".cp"),
    "pool of signals": (nn.MaxPool1d(2), SIGNAL, ".cp"),
    "pool of images": (nn.AdaptiveAvgPool2d(2), IMAGE, ".cpp"),
    "interpolation": (nn.Upsample(scale_factor=2), SIGNAL, ".cp"),
    "padding": (lambda x: functional.pad(x, (1, 1, 0, 4)), SIGNAL, ".cp"),
    "padding with zeros": (lambda x: torch.cat([x, torch.zeros_like(x)], 1), SIGNAL, ".cp"),
    "strided": (lambda x: x[:, :, ::2, ::2], IMAGE, ".cpp"),
    "last channels": (lambda x: x.permute(0, 2, 3, 1).contiguous(), IMAGE, ".ppc"),
    "layer norm of images": (LayerNorm2d(C), IMAGE, ".cpp"),
    "tokens": (lambda x: x.flatten(2).transpose(1, 2), IMAGE, ".pc"),
    "patches": (lambda x: x.unflatten(3, (3, 2)).unflatten(2, (4, 2)), IMAGE, ".cpppp"),
    "tokens and back": (lambda x: x.flatten(2).mT.mT.unflatten(2, (8, 6)), IMAGE, ".cpp"),
    "shuffled channels": (shuffled, IMAGE, ".cpp"),
    "channels and positions in one": (lambda x: x.flatten(1), IMAGE, ".."),
    "squeezed": (lambda x: x.mean((2, 3)), IMAGE, ".c"),
    "largest": (lambda x: x.max(2).values, IMAGE, ".cp"),
    "one row": (lambda x: x[:, :, 0], IMAGE, ".cp"),
    "one channel": (lambda x: x.unbind(1)[0], IMAGE, ".pp"),
    "batch of one removed": (lambda x: x.unbind()[0], IMAGE, "cpp"),
    "new axis": (lambda x: x.mean((2, 3)).unsqueeze(1), IMAGE, "..c"),
    "channels convolved": (lambda x: functional.conv1d(x.mean((2, 3)).unsqueeze(1), torch.ones(1, 1, 3)), IMAGE, ".cc"),
    "gate of channels": (create_attn("eca", C), IMAGE, ".cpp"),
    "gate of positions": (lambda x: x * x.mean(1, keepdim=True).sigmoid(), IMAGE, ".cpp"),
    "attention": (attention, IMAGE, ".cpp"),
    "linear map": (nn.Linear(C, 7), UNKNOWN, "..c"),
    "linear map without bias": (nn.Linear(C, 7, bias=False), UNKNOWN, "..c"),
    "layer norm": (nn.LayerNorm(C), UNKNOWN, "..c"),
    "transformer": (nn.TransformerEncoderLayer(C, 2, 8, batch_first=True), UNKNOWN, "..c"),
    "stacked": (lambda x: torch.stack([x, x], 1), SIGNAL, "...."),
    "norm of unknown": (nn.BatchNorm1d(8), UNKNOWN, ".c."),
    "convolution of unknown": (nn.Conv1d(8, 8, 1), UNKNOWN, ".cp"),
}


@pytest.mark.parametrize(("step", "size", "expected"), STEPS.values(), ids=STEPS)
def test_followed(step, size, expected):
    step = step.to("meta").eval() if isinstance(step, nn.Module) else step
    with torch.device("meta"), torch.no_grad(), AxisTracker() as tracker:
        x = torch.zeros(size)
        found = tracker.layout(step(x if size == UNKNOWN else tracker.mark_maps(x)))
    assert found.axes == tuple(WORDS[letter] for letter in expected)


def test_numbers_are_the_same():
    """Following changes nothing."""
    model, x = (
        nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(24, 2)),
        torch.randn(2, 3, 8),
    )
    with torch.no_grad(), AxisTracker():
        followed = model.eval()(x)
    assert torch.equal(followed, model(x))


@pytest.mark.parametrize(
    ("axes", "reason"),
    [
        (".cpp", None),
        ("....", "which of their axes holds the channels cannot be found"),
        (".c..", None),
        (".cp", None),
        (".c.", None),
        (".cppp", None),
        ("...", "which of their axes holds the channels cannot be found"),
        (".....", "which of their axes holds the channels cannot be found"),
        (".pc", "their channels are not the second axis alone"),
        (".ppc", "their channels are not the second axis alone"),
        ("...c", "their channels are not the second axis alone"),
        (".cc", "their channels are not the second axis alone"),
        (".p..", "their channels are not the second axis alone"),
        (".c", "they have no positions"),
    ],
)
def test_what_feature_maps_are(axes, reason):
    assert Layout((2,) * len(axes), tuple(WORDS[letter] for letter in axes)).why_not_maps == reason


def test_two_tensors_tell_more_than_one():
    assert joined((None, "channels", None), ("positions", "positions", "positions")) == (
        "positions",
        "channels",
        "positions",
    )
