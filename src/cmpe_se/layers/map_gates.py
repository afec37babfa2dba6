"""Gates that read whole feature maps: timm's attention modules, and attentional feature fusion."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from timm.layers import create_attn
from timm.layers.mlp import ConvMlp
from torch import Tensor, nn

from cmpe_se.layers.gate_layers import Gate, GateLayers, GateSizes

_TAKES = ("images", "positions", "all")


@dataclass(frozen=True)
class MapLayers(GateLayers):
    """A module of its own, ``map_gate``, which rescales the residual.

    It takes residual and identity (N, C, H, W) each, or the residual alone for a view that does not read the identity,
    and gives (N, C, H, W). What is called ``gate`` inside it puts out its factors, as far as
    :func:`cmpe_se.inspect` is to see them: (N, C, 1, 1), (N, 1, H, W), (N, C, H, W) or (N, 1, C). For the feature maps
    of signals and volumes see ``takes``.

    Args:
        module: makes the module from channels, hidden units, device and dtype; it initialises itself.
        last: names inside it of the layers that make the logits: with their parameters at 0, these are 0.
        scales_identity: whether it gives the whole sum, ``w * residual + (1 - w) * identity``.
        takes: feature maps that it is made for: ``images`` (N, C, H, W) alone; ``positions``, whose order makes no
            difference to it, so that signals and volumes are handed over as images of one column, (N, C, P, 1); or
            ``all``, (N, C, ...) as they are.

    Raises:
        ValueError: another word for ``takes``.
    """

    module: Callable[..., nn.Module]
    last: tuple[str, ...]
    scales_identity: bool = False
    takes: str = "images"

    form: ClassVar[str] = "maps"

    def __post_init__(self) -> None:
        if self.takes not in _TAKES:
            raise ValueError(f"a module of feature maps takes {', '.join(_TAKES)}, not '{self.takes}'")

    @property
    def images_alone(self) -> bool:
        """Whether it looks at how the positions lie in a plane."""
        return self.takes == "images"

    def create(self, sizes: GateSizes, **factory: Any) -> dict[str, nn.Module]:
        """``map_gate``."""
        return {"map_gate": self.module(sizes.channels, sizes.hidden, **factory)}

    def add(self, gate: Gate, residual: Tensor, identity: Tensor) -> Tensor:
        """The whole gated addition, (N, C, ...) and (N, C, ...) to (N, C, ...)."""
        if self.scales_identity:
            total = self._module_of(gate, residual, identity)
            return total if gate.gain == 1 else gate.gain * total
        flows = (residual, identity) if gate.kind.competitive else (residual,)
        return torch.add(identity, self._module_of(gate, *flows), alpha=gate.gain)

    def _module_of(self, gate: Gate, *flows: Tensor) -> Tensor:
        sizes = flows[0].shape[2:]
        if len(sizes) == 2 or self.takes != "positions":
            return gate.map_gate(*flows)
        return gate.map_gate(*(flow.flatten(2).unsqueeze(3) for flow in flows)).squeeze(3).unflatten(2, sizes)

    def zero(self, gate: Gate) -> None:
        """Zero what makes the logits, so that each gate is one number for every input; what is zeroed still learns."""
        for name in self.last:
            for parameter in gate.map_gate.get_submodule(name).parameters():
                parameter.zero_()


def timm_attention(name: str) -> Callable[..., nn.Module]:
    """What makes timm's attention module of that name from channels, hidden units, device and dtype."""

    def create(channels: int, hidden: int, **factory: Any) -> nn.Module:
        width = {} if name == "eca" else {"rd_channels": hidden}
        return create_attn(name, channels, **width, **factory)

    return create


def gather_excite(channels: int, hidden: int, **factory: Any) -> nn.Module:
    """timm's GatherExcite, which timm 1.0.31 cannot make itself: it passes names of arguments where values belong."""
    module = create_attn("ge", channels, use_mlp=False)
    module.mlp = ConvMlp(channels, hidden, **factory)
    return module


class AttentionalFeatureFusion(nn.Module):
    """``w * residual + (1 - w) * identity`` (Dai et al., "Attentional Feature Fusion", arXiv 2009.14082).

    ``w = sigmoid(L(x) + G(x))`` of the sum x of both flows. L and G are 1x1 convolution, batch norm, ReLU, 1x1
    convolution and batch norm; G reads the global average.

    Args:
        channels: C.
        hidden: channels between the two convolutions; the paper takes C / 4.
        device, dtype: of the parameters.
    """

    def __init__(
        self, channels: int, hidden: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.local_context = _context(channels, hidden, **factory)
        self.global_context = _context(channels, hidden, **factory)
        self.gate = nn.Sigmoid()  # a module, so that others can see what it puts out

    def forward(self, residual: Tensor, identity: Tensor) -> Tensor:
        """(N, C, H, W) and (N, C, H, W) to (N, C, H, W)."""
        total = residual + identity
        pooled = total.mean((2, 3), keepdim=True)  # (N, C, 1, 1)
        weight = self.gate(self.local_context(total) + self.global_context(pooled))
        return weight * residual + (1 - weight) * identity


def _context(channels: int, hidden: int, **factory: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, hidden, 1, **factory),
        nn.BatchNorm2d(hidden, **factory),
        nn.ReLU(),
        nn.Conv2d(hidden, channels, 1, **factory),
        nn.BatchNorm2d(channels, **factory),
    )
