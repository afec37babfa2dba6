"""Pre-activation residual blocks in which the squeezes flow along with the feature maps.

A block computes ``h = relu(bn1(x))``, a residual u of h, and a shortcut s: x itself or, where the shape changes, a 1x1
convolution of h. Then ``y = s + u``, or ``y = s + a * u`` with competitive attention, and nothing after the addition.

Two facts make the attention's squeezes nearly free (``docs/method.md``):

- In a bottleneck the residual squeeze is taken before the last convolution, which a mean commutes with (fact 2).
- The mean of the sum is the sum of the means: ``squeeze(y) = squeeze(s) + a * squeeze(u)``. So a block hands its own
  output's squeeze to the next one, and no identity is ever read a second time (fact 3).
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from timm.layers import DropPath
from timm.models import checkpoint
from torch import Tensor, nn
from torch.nn.functional import relu

from cmpe_se.layers.attention import CompetitiveSE, is_pointwise, squeeze_through
from cmpe_se.layers.gated_addition import add_gated, add_gated_pointwise, squeeze, with_squeeze
from cmpe_se.layers.hooks import is_symbolic, is_watched, known_layer, raise_not_scriptable
from cmpe_se.layers.merged_gate import MergedGate

Attention = Callable[..., CompetitiveSE] | None
"""What makes the gate of a block, from its channels, device and dtype; None for a plain block."""


class PreActBlock(nn.Module):
    """What bottleneck and basic block share: pre-activation, shortcut, and the gated addition.

    Subclasses define ``branch``, the residual branch up to its last convolution, and name that one ``last_conv``.
    """

    expansion: int
    reads_ahead: bool
    """Whether the residual squeeze is taken before the last convolution (fact 2): less to read, where that widens."""
    normed_convolutions: tuple[tuple[str, str], ...]
    """Convolutions and the batch norms behind them, for :func:`cmpe_se.merge`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int,
        drop_path: float,
        attention: Attention,
        **factory: Any,
    ):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels, **factory)
        self.shortcut = None
        if in_channels != out_channels or stride != 1:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False, **factory)
        self.attention: CompetitiveSE | None = attention(out_channels, **factory) if attention else None
        self.drop_path = DropPath(drop_path)

    def branch(self, h: Tensor) -> Tensor:
        """Residual branch up to the input of its last convolution."""
        raise NotImplementedError

    @property
    def last_conv(self) -> nn.Conv2d:
        """Last convolution of the residual branch."""
        raise NotImplementedError

    def forward(self, x: Tensor, identity_squeeze: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """One block.

        Args:
            x: input (N, C_in, H, W).
            identity_squeeze: squeeze of x, (N, C_in), where the block before knew it.

        Returns:
            Output y (N, C, H', W') and its squeeze (N, C), or None where no gate asks for it.
        """
        h = relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(h)
        last, conv, attention = self.branch(h), self.last_conv, self.attention
        if attention is None:
            return shortcut + self.drop_path(conv(last)), None
        if (
            not attention.takes_squeezes or is_symbolic(x) or _to_be_called(attention)
        ):  # nothing flows, and nothing is read ahead
            y = attention(conv(last), shortcut)
            drops = self.training and isinstance(self.drop_path, DropPath) and self.drop_path.drop_prob
            return shortcut + self.drop_path(y - shortcut) if drops else y, None

        residual = None
        if self.reads_ahead and is_pointwise(conv):
            if isinstance(attention, MergedGate) and attention.runs_bare(last):
                i = self._identity_squeeze(x, h, shortcut, identity_squeeze)
                gate, r = attention.step(conv, last, i)
                return add_gated(shortcut, self.drop_path(gate), conv(last)), torch.addcmul(i, gate, r)
            r = squeeze_through(conv, last)  # (N, C)
        else:
            residual, r = with_squeeze(conv(last))
        if not attention.competitive:
            gate = self.drop_path(attention.gate(r, r))
            return self._add(shortcut, gate, residual, last), None

        i = self._identity_squeeze(x, h, shortcut, identity_squeeze)
        # Dropping a sample's whole residual is a factor on its gates: one number a channel, not a pass over the maps.
        gate = self.drop_path(attention.gate(r, i))
        return self._add(shortcut, gate, residual, last), torch.addcmul(i, gate, r)

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` asks each module for."""
        raise_not_scriptable(self)

    def _identity_squeeze(self, x: Tensor, h: Tensor, shortcut: Tensor, known: Tensor | None) -> Tensor:
        if self.shortcut is not None:
            return squeeze_through(self.shortcut, h) if is_pointwise(self.shortcut) else squeeze(shortcut)  # (N, C)
        return squeeze(x) if known is None else known

    def _add(self, shortcut: Tensor, gate: Tensor, residual: Tensor | None, last: Tensor) -> Tensor:
        if residual is None:
            return add_gated_pointwise(shortcut, gate, self.last_conv, last)
        return add_gated(shortcut, gate, residual)


@known_layer
class PreActBottleneck(PreActBlock):
    """1x1 convolution, 3x3 (with the stride), 1x1 to four times the planes; each after its batch norm and ReLU.

    Of ``dilations`` the 3x3 convolution has the first: a block that would halve the maps reads them as they come in.
    """

    expansion = 4
    reads_ahead = True
    normed_convolutions = (("conv1", "bn2"), ("conv2", "bn3"))

    def __init__(
        self,
        in_channels: int,
        planes: int,
        *,
        stride: int,
        dilations: tuple[int, int] = (1, 1),
        drop_rate: float,
        drop_path: float,
        attention: Attention,
        **factory: Any,
    ):
        out_channels = planes * self.expansion
        super().__init__(in_channels, out_channels, stride=stride, drop_path=drop_path, attention=attention, **factory)
        self.conv1 = nn.Conv2d(in_channels, planes, 1, bias=False, **factory)
        self.bn2 = nn.BatchNorm2d(planes, **factory)
        dilation = dilations[0]
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=dilation, dilation=dilation, bias=False, **factory)
        self.bn3 = nn.BatchNorm2d(planes, **factory)
        self.dropout = nn.Dropout(drop_rate)
        self.conv3 = nn.Conv2d(planes, out_channels, 1, bias=False, **factory)

    def branch(self, h: Tensor) -> Tensor:
        """(N, C_in, H, W) to the input of ``conv3``, (N, planes, H', W')."""
        h = self.conv2(relu(self.bn2(self.conv1(h))))
        return self.dropout(relu(self.bn3(h)))

    @property
    def last_conv(self) -> nn.Conv2d:
        """The widening 1x1 convolution."""
        return self.conv3


@known_layer
class PreActBasic(PreActBlock):
    """3x3 convolution (with the stride), 3x3; each after its batch norm and ReLU, with dropout between the two.

    ``dilations`` are of the two convolutions.
    """

    expansion = 1
    reads_ahead = False
    normed_convolutions = (("conv1", "bn2"),)

    def __init__(
        self,
        in_channels: int,
        planes: int,
        *,
        stride: int,
        dilations: tuple[int, int] = (1, 1),
        drop_rate: float,
        drop_path: float,
        attention: Attention,
        **factory: Any,
    ):
        super().__init__(in_channels, planes, stride=stride, drop_path=drop_path, attention=attention, **factory)
        first, second = dilations
        self.conv1 = nn.Conv2d(in_channels, planes, 3, stride, padding=first, dilation=first, bias=False, **factory)
        self.bn2 = nn.BatchNorm2d(planes, **factory)
        self.dropout = nn.Dropout(drop_rate)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=second, dilation=second, bias=False, **factory)

    def branch(self, h: Tensor) -> Tensor:
        """(N, C_in, H, W) to the input of ``conv2``, (N, planes, H', W')."""
        return self.dropout(relu(self.bn2(self.conv1(h))))

    @property
    def last_conv(self) -> nn.Conv2d:
        """The second 3x3 convolution."""
        return self.conv2


class RemovedBlock(nn.Module):
    """What is left of a block that has been pruned: its input, and that input's squeeze, handed on."""

    def forward(self, x: Tensor, identity_squeeze: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(N, C, H, W) and its squeeze (N, C), where that is known, as they come."""
        return x, identity_squeeze


def _to_be_called(gate: nn.Module) -> bool:
    """Whether a gate has to be called as a module: for its hooks, or for a forward of its own."""
    own = "forward" in vars(gate) or type(gate).forward not in (CompetitiveSE.forward, MergedGate.forward)
    return own or is_watched(gate)


class Stage(nn.Module):
    """Blocks of one resolution. The squeezes flow from block to block within it; its projection starts them afresh."""

    def __init__(self, blocks: list[PreActBlock]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) to (N, C, H', W')."""
        identity_squeeze = None
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x, identity_squeeze = _checkpointed(block, x, identity_squeeze)
            else:
                x, identity_squeeze = block(x, identity_squeeze)
        return x


def _checkpointed(block: nn.Module, x: Tensor, identity_squeeze: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if torch.compiler.is_compiling():  # a compiled backward pass recomputes values only, and takes no contexts
        return checkpoint(block, x, identity_squeeze)
    return checkpoint(block, x, identity_squeeze, context_fn=lambda: (nullcontext(), _FrozenStatistics(block)))


class _FrozenStatistics:
    """Context of a checkpointed block's recomputation, which must not update the running statistics a second time.

    One object may be entered again and again: a graph that is kept runs its backward pass more than once.
    """

    def __init__(self, block: nn.Module):
        # _BatchNorm rather than BatchNorm2d: torch.nn.SyncBatchNorm, its other child, takes the latter's place.
        norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.momenta = {norm: norm.momentum for norm in norms if norm.track_running_stats}

    def __enter__(self) -> None:
        for norm in self.momenta:
            norm.momentum = 0.0

    def __exit__(self, *_: object) -> None:
        for norm, momentum in self.momenta.items():
            norm.momentum = momentum
            if norm.training and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.sub_(1)
