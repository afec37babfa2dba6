"""Gates that read whole feature maps: timm's attention modules, and attentional feature fusion."""

from typing import Any

import torch
from timm.layers import create_attn
from timm.layers.mlp import ConvMlp
from torch import Tensor, nn


def create_map_gate(view: str, channels: int, hidden: int, **factory: Any) -> nn.Module:
    """The module of a view whose form is ``maps``.

    Args:
        view: its name, see :data:`cmpe_se.layers.views.TABLE`.
        channels: C of residual and identity.
        hidden: width of its hidden layer; ``timm_eca`` has none.
        factory: device and dtype.
    """
    if view == "aff":
        return AttentionalFeatureFusion(channels, hidden, **factory)
    name = view.removeprefix("timm_")
    if name == "ge":
        # timm 1.0.31 cannot make this one itself: it passes names of arguments where their values belong.
        gather_excite = create_attn("ge", channels, use_mlp=False)
        gather_excite.mlp = ConvMlp(channels, hidden, **factory)
        return gather_excite
    width = {} if name == "eca" else {"rd_channels": hidden}
    return create_attn(name, channels, **width, **factory)


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


@torch.no_grad()
def zero_map_gate(module: nn.Module) -> None:
    """Zero what makes the logits, so that each gate is one number for every input; what is zeroed still learns."""
    if isinstance(module, AttentionalFeatureFusion):
        last = [module.local_context[-1], module.global_context[-1]]
    elif hasattr(module, "spatial"):  # CBAM: its spatial logits come from a norm
        last = [module.get_submodule("channel.fc2"), module.get_submodule("spatial.conv.bn")]
    elif hasattr(module, "mlp_scale"):  # global context
        last = [module.get_submodule("mlp_scale.fc2")]
    elif hasattr(module, "mlp"):  # gather-excite
        last = [module.get_submodule("mlp.fc2")]
    elif hasattr(module, "fc2"):
        last = [module.get_submodule("fc2")]
    else:  # ECA
        last = [module.get_submodule("conv")]
    for layer in last:
        for parameter in layer.parameters():
            parameter.zero_()
