"""A gate in its deploy form: two linear maps, whatever the view (fact 1 of ``docs/method.md``)."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from cmpe_se.layers.gate_layers import Gate
from cmpe_se.layers.gated_addition import Convolution, add_gated, squeeze
from cmpe_se.layers.hooks import GateModule, is_recorded, known_layer, says_what_it_does, will_always_do_so
from cmpe_se.layers.precision import autocasts, without_autocast


@known_layer
class MergedGate(GateModule):
    """``identity + gain * sigmoid(W2 relu(A r + B i + b) + c) * residual``: what a gate computes in eval mode, exactly.

    Made by :func:`cmpe_se.merge` and :meth:`cmpe_se.CompetitiveSE.fuse`. Its weights stay float32 (or wider) whatever
    the network is converted to, as the squeezes do: they are few, and a rounded gate rounds everything behind it.

    Args:
        residual: A, (hidden, C_r): reads the squeeze of the residual, or of what a pointwise convolution makes it from;
            None for a gate that does not look at it (``se_identity``).
        identity: B, (hidden, C_i), the same of the identity; None for a gate that does not look at it (``se``).
        bias: b, (hidden,).
        excite: W2, (C, hidden).
        excite_bias: c, (C,), or None.
        gain: fixed factor on the gate.
        view: the view that was merged, for people.
    """

    takes_squeezes = True

    def __init__(
        self,
        residual: Tensor | None,
        identity: Tensor | None,
        bias: Tensor,
        excite: Tensor,
        excite_bias: Tensor | None = None,
        *,
        gain: float,
        view: str,
    ):
        super().__init__()
        self.view, self.gain = view, gain
        self.reads_residual, self.competitive = residual is not None, identity is not None
        self.read = _linear(torch.cat([matrix for matrix in (residual, identity) if matrix is not None], dim=1), bias)
        self.excite = _linear(excite, excite_bias)

    def forward(
        self,
        residual: Tensor,
        identity: Tensor,
        residual_squeeze: Tensor | None = None,
        identity_squeeze: Tensor | None = None,
    ) -> Tensor:
        """Add the gated residual to the identity, (N, C, ...) each.

        Args:
            residual: u.
            identity: s.
            residual_squeeze: what A reads, (N, C_r), where it is known already; the squeeze of u if left out.
            identity_squeeze: what B reads, (N, C_i), where it is known already; the squeeze of s if left out.
        """
        r = squeeze(residual) if residual_squeeze is None and self.reads_residual else residual_squeeze
        i = squeeze(identity) if identity_squeeze is None and self.competitive else identity_squeeze
        return add_gated(identity, self.gate(r, i), residual)

    def gate(self, residual: Tensor | None, identity: Tensor | None) -> Tensor:
        """Gate a of each channel, (N, C), from the squeezes (N, C_r) and (N, C_i); one it does not read may be None."""
        r, i = cast(Tensor, residual), cast(Tensor, identity)  # what is read is there
        single = i if self.competitive else r
        read = torch.cat((r, i), dim=1) if self.competitive and self.reads_residual else single
        with without_autocast(read.device.type):
            gate = _applied(self.excite, _applied(self.read, read).relu()).sigmoid()
        return gate if self.gain == 1 else gate * self.gain

    def step(self, conv: nn.Conv2d, x: Tensor, identity: Tensor) -> tuple[Tensor, Tensor]:
        """Gate and squeeze of ``conv(x)``, in as few operations as eager PyTorch can do it.

        With small maps or few images a network's time is what starting its operations takes, and a gate has many. This
        is :meth:`gate` of the squeeze of a pointwise convolution, for where :meth:`runs_bare` says that it may be.

        Args:
            conv: pointwise, of stride 1.
            x: its input, (N, C_in, H, W).
            identity: squeeze of the identity, (N, C).

        Returns:
            The gate and the squeeze of ``conv(x)``, (N, C) each.
        """
        read, excite = self.read, self.excite
        r = linear(x.mean((2, 3)), conv.weight.flatten(1), conv.bias)
        hidden = linear(torch.cat((r, identity), 1), read.weight, read.bias).relu_()
        gate = linear(hidden, excite.weight, excite.bias).sigmoid_()
        return gate if self.gain == 1 else gate.mul_(self.gain), r

    def runs_bare(self, x: Tensor) -> bool:
        """Whether nothing but numbers is asked for: eager, in float32, without gradients, hooks or autocast."""
        if torch.is_grad_enabled() or x.dtype != torch.float32 or not (self.competitive and self.reads_residual):
            return False
        read, excite = self.read, self.excite
        if is_recorded() or not says_what_it_does(read) or not says_what_it_does(excite):
            return False
        return read.weight.dtype == torch.float32 and not autocasts(x.device.type)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MergedGate":
        def keeping_precision(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            narrowed = new.is_floating_point() and torch.finfo(new.dtype).bits < 32
            return tensor.to(new.device) if narrowed else new

        return super()._apply(keeping_precision, recurse)

    def extra_repr(self) -> str:
        """View and gain, for ``print(model)``."""
        return f"view='{self.view}', gain={self.gain:g}"


def layers_say_what_it_does(attention: nn.Module) -> bool:
    """Whether a gate computes what its layers' parameters say, so that another form may stand for it."""
    return all(will_always_do_so(part) for part in attention.modules())


@torch.no_grad()
def merge_gate(
    attention: Gate,
    residual_conv: Convolution | None = None,
    identity_conv: Convolution | None = None,
) -> MergedGate:
    """The deploy form of a gate, in the dtype of its weights.

    Args:
        attention: of a view with a merged form (``View.merges``); its norm's running statistics are used.
        residual_conv: pointwise convolution that makes the residual; the gate then reads the squeeze of its input
            (fact 2), and is as wide as that.
        identity_conv: the same of the identity.

    Raises:
        ValueError: a view that has no such form.
        UserError: a norm without running statistics.
    """
    if not attention.kind.merges:
        raise ValueError(
            f"view '{attention.view}' has no merged form; {type(attention.kind.layers).__name__}.affine would be one"
        )
    hidden = attention.kind.layers.affine(attention)
    assert hidden is not None  # as the kind merges
    residual, identity, bias = hidden
    if residual_conv is not None and residual is not None:
        residual, bias = _pulled_back(residual, bias, residual_conv)
    if identity_conv is not None and identity is not None:
        identity, bias = _pulled_back(identity, bias, identity_conv)
    last = cast(nn.Linear, attention.fc2)
    excite = last.weight.detach()
    return MergedGate(
        None if residual is None else residual.to(excite.dtype),
        None if identity is None else identity.to(excite.dtype),
        bias.to(excite.dtype),
        excite,
        None if last.bias is None else last.bias.detach(),
        gain=attention.gain,
        view=attention.view,
    ).eval()


def _pulled_back(reads: Tensor, bias: Tensor, conv: Convolution) -> tuple[Tensor, Tensor]:
    """Maps of a convolution's output's squeeze as maps of its input's."""
    if conv.bias is not None:
        bias = bias + linear(conv.bias.double(), reads)
    return reads @ conv.weight.double().flatten(1), bias


def _applied(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer's output; where nobody watches it, without the call of a module, which costs more than the map."""
    if not says_what_it_does(layer):
        return layer(x.to(layer.weight.dtype))
    weight = layer.weight
    return linear(x if x.dtype == weight.dtype else x.to(weight.dtype), weight, layer.bias)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=weight.dtype)
    layer.weight.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)
    return layer.requires_grad_(False)
