"""Competitive inner-imaging squeeze-and-excitation (CMPE-SE).

Hu, Wen, Luo, Dai, Ma, Yu: "Competitive Inner-Imaging Squeeze and Excitation for Residual Network", arXiv 1807.08920.

A residual block computes ``y = s + u``: s the identity (or its projection), u the residual. Squeeze-and-excitation
rescales the channels of u by looking at u alone. Here both flows compete for the gate, which reads their squeezes off a
small picture of the network's inside::

    r, i = squeeze(u), squeeze(s)       # (N, C) each: means over height and width
    a = gate(r, i)                      # (N, C) in (0, 1), one of five views
    y = s + a * u                       # (N, C, H, W)

``docs/method.md`` derives all of this; the facts numbered there are the ones that comments here refer to.
"""

import torch
from torch import Tensor, nn

from cmpe_se.addition import add_gated, squeeze
from cmpe_se.folding import default_columns, fold, picture_size
from cmpe_se.maps import averaged_maps, can_average
from cmpe_se.precision import without_autocast

VIEWS = ("se", "double_fc", "pair_view_2x1", "pair_view_1x1", "folded_3x3")
"""Names of the views: plain SE, two separate squeezes, and the three that read a picture of both."""

_MAP_KERNELS = {"pair_view_2x1": (1, 2), "pair_view_1x1": (1, 1), "folded_3x3": (3, 3)}


class CompetitiveSE(nn.Module):
    """Residual addition with a competitive gate: ``identity + a * residual``.

    Args:
        channels: channels C of residual and identity.
        view: how the gate reads the squeezes, one of :data:`VIEWS`. ``se`` is Hu et al.'s SE (residual only).
        reduction: C divided by the width of the hidden layer; the hidden layer has at least one unit.
        columns: width of the folded picture. Default: the most nearly square picture, see
            :func:`cmpe_se.folding.default_columns`. Views without a fold ignore it, so that a comparison of views
            changes one word.
        maps: number m of maps of the picture's convolution. Default: C / 64, at least 1 (the paper's bottleneck rule).
            Views without a picture ignore it.
        gain: fixed factor on the gate. With 2, and with the last layer at zero, every gate is exactly 1: the start that
            preserves a trained network's function (fact 4).
        device, dtype: of the parameters, as everywhere in PyTorch.

    Shapes:
        residual and identity (N, C, H, W) to (N, C, H, W); memory format and dtype of the inputs are kept.

    Raises:
        ValueError: unknown view; channels, reduction, columns or maps out of range; channels that do not fold; in
            ``forward``, inputs whose shapes differ or whose channels are not C.
    """

    def __init__(
        self,
        channels: int,
        *,
        view: str = "folded_3x3",
        reduction: int = 16,
        columns: int | None = None,
        maps: int | None = None,
        gain: float = 1.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        _check_settings(channels, view, reduction, columns, maps)
        factory = {"device": device, "dtype": dtype}
        hidden = max(1, channels // reduction)
        self.channels, self.view, self.hidden, self.gain = channels, view, hidden, gain

        self.picture_size: tuple[int, int] | None = None  # height and width; None for the views without a picture
        if view == "folded_3x3":
            self.picture_size = picture_size(channels, columns or default_columns(channels))
        elif view in _MAP_KERNELS:
            self.picture_size = (channels, 2)

        if view == "se":
            self.fc1 = nn.Linear(channels, hidden, bias=False, **factory)
        elif view == "double_fc":
            self.fc_residual = nn.Linear(channels, hidden, bias=False, **factory)
            self.fc_identity = nn.Linear(channels, hidden, bias=False, **factory)
        else:
            kernel = _MAP_KERNELS[view]
            maps = maps or max(1, channels // 64)
            pixels = (self.picture_size[0] - kernel[0] + 1) * (self.picture_size[1] - kernel[1] + 1)
            self.map_conv = nn.Conv2d(1, maps, kernel, bias=False, **factory)
            self.map_norm = nn.BatchNorm2d(maps, **factory)
            self.fc1 = nn.Linear(pixels, hidden, bias=False, **factory)
        self.fc2 = nn.Linear(2 * hidden if view == "double_fc" else hidden, channels, bias=False, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise anew: PyTorch's default for the linear maps, He's (fan out) for the picture's convolution."""
        for child in self.children():
            child.reset_parameters()
        if hasattr(self, "map_conv"):
            nn.init.kaiming_normal_(self.map_conv.weight, mode="fan_out", nonlinearity="relu")

    @property
    def competitive(self) -> bool:
        """Whether the gate looks at the identity at all (every view but ``se``)."""
        return self.view != "se"

    def forward(self, residual: Tensor, identity: Tensor) -> Tensor:
        """Add the gated residual to the identity: (N, C, H, W) and (N, C, H, W) to (N, C, H, W)."""
        self._check_shapes(residual, identity, dimensions=(4,))
        return add_gated(identity, self.gate(residual, identity), residual)

    def gate(self, residual: Tensor, identity: Tensor) -> Tensor:
        """Gate a of each channel, (N, C) in (0, gain), from feature maps (N, C, H, W) or from their squeezes (N, C)."""
        residual, identity = self._squeezes(residual, identity)
        with without_autocast(residual.device.type):
            # The gate is tiny and steers everything behind it, so autocast does not round it.
            weight_dtype = self.fc2.weight.dtype
            return self._excite(residual.to(weight_dtype), identity.to(weight_dtype))

    def picture(self, residual: Tensor, identity: Tensor) -> Tensor:
        """Picture (N, 1, height, width) that the map convolution reads, from feature maps or from their squeezes.

        Raises:
            ValueError: the view (``se``, ``double_fc``) reads the squeezes without a picture.
        """
        if self.picture_size is None:
            raise ValueError(f"view '{self.view}' draws no picture; these views do: {', '.join(_MAP_KERNELS)}")
        return self._draw(*self._squeezes(residual, identity))

    def _squeezes(self, residual: Tensor, identity: Tensor) -> tuple[Tensor, Tensor]:
        self._check_shapes(residual, identity, dimensions=(2, 4))
        if residual.ndim == 2:
            return residual, identity
        # SE does not look at the identity: do not read that large tensor for nothing.
        squeezed = squeeze(residual)
        return squeezed, squeeze(identity) if self.competitive else squeezed

    def _check_shapes(self, residual: Tensor, identity: Tensor, *, dimensions: tuple[int, ...]) -> None:
        fits = residual.ndim in dimensions and residual.shape[1] == self.channels
        if not fits or residual.shape != identity.shape:
            raise ValueError(
                f"CompetitiveSE({self.channels}) takes a residual and an identity of one shape (N, {self.channels}, "
                f"H, W); got {tuple(residual.shape)} and {tuple(identity.shape)}"
            )
        if 0 in residual.shape[2:]:
            raise ValueError(f"feature maps need H and W at least 1 to have a mean, got {tuple(residual.shape)}")

    def _draw(self, residual: Tensor, identity: Tensor) -> Tensor:
        if self.view == "folded_3x3":
            return fold(residual, identity, self.picture_size[1])
        return torch.stack((residual, identity), dim=-1).unsqueeze(1)  # (N, 1, C, 2)

    def _excite(self, residual: Tensor, identity: Tensor) -> Tensor:
        if self.view == "se":
            hidden = self.fc1(residual).relu()
        elif self.view == "double_fc":
            hidden = torch.cat((self.fc_residual(residual).relu(), self.fc_identity(identity).relu()), dim=1)
        else:
            hidden = self.fc1(self._averaged_maps(self._draw(residual, identity))).relu()  # (N, C/t)
        gate = self.fc2(hidden).sigmoid()  # (N, C)
        return gate if self.gain == 1 else gate * self.gain

    def _averaged_maps(self, picture: Tensor) -> Tensor:
        if can_average(self.map_conv, self.map_norm, picture):  # the same, in training, without the maps
            return averaged_maps(self.map_conv, self.map_norm, picture)
        maps = self.map_norm(self.map_conv(picture))  # (N, m, h', w'); no ReLU here
        return maps.mean(dim=1).flatten(1)

    def extra_repr(self) -> str:
        """Channels, view and the picture's size, for ``print(model)``."""
        size = f", picture={self.picture_size[0]}x{self.picture_size[1]}" if self.picture_size else ""
        gain = f", gain={self.gain:g}" if self.gain != 1 else ""
        return f"{self.channels}, view='{self.view}', hidden={self.hidden}{size}{gain}"


def squeeze_through(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Squeeze of ``conv(x)`` without the convolution: (N, C_in, H, W) to (N, C_out).

    A mean over positions commutes with the linear map at each of them (fact 2), so this reads the input instead of the
    output: in a bottleneck a quarter of the channels, and the gate is known before the convolution has run.

    Args:
        conv: pointwise convolution, see :func:`is_pointwise`; a stride skips pixels.
        x: its input, (N, C_in, H, W).
    """
    if conv.stride != (1, 1):  # a slice costs its backward pass a zeroed tensor, even one that skips nothing
        x = x[:, :, :: conv.stride[0], :: conv.stride[1]]
    squeezed = squeeze(x)  # (N, C_in)
    with without_autocast(x.device.type):
        bias = None if conv.bias is None else conv.bias.to(squeezed.dtype)
        return nn.functional.linear(squeezed, conv.weight.to(squeezed.dtype).flatten(1), bias)


def is_pointwise(module: nn.Module) -> bool:
    """Whether a layer is one linear map of the channels at each position: a 1x1 convolution, perhaps with a stride."""
    plain = isinstance(module, nn.Conv2d) and type(module).forward is nn.Conv2d.forward
    return plain and module.kernel_size == (1, 1) and module.groups == 1 and module.padding in ((0, 0), "valid", "same")


def _check_settings(channels: int, view: str, reduction: int, columns: int | None, maps: int | None) -> None:
    if view not in VIEWS:
        raise ValueError(f"unknown view '{view}'; choose one of {', '.join(VIEWS)}")
    for name, value in (("channels", channels), ("reduction", reduction), ("columns", columns), ("maps", maps)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
