"""Competitive inner-imaging squeeze-and-excitation (CMPE-SE).

Hu, Wen, Luo, Dai, Ma, Yu: "Competitive Inner-Imaging Squeeze and Excitation for Residual Network", arXiv 1807.08920.

A residual block computes ``y = s + u``: s the identity (or its projection), u the residual. Squeeze-and-excitation
rescales the channels of u by looking at u alone. Here both flows compete for the gate, which reads their squeezes off a
small picture of the network's inside::

    r, i = squeeze(u), squeeze(s)       # (N, C) each: means over height and width
    a = gate(r, i)                      # (N, C) in (0, 1), one of many views
    y = s + a * u                       # (N, C, H, W)

``docs/method.md`` derives all of this; the facts numbered there are the ones that comments here refer to.
"""

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from cmpe_se.layers.averaged_maps import averaged_maps, can_average
from cmpe_se.layers.folding import default_columns, fold, picture_size
from cmpe_se.layers.gated_addition import add_gated, squeeze
from cmpe_se.layers.map_gates import create_map_gate, zero_map_gate
from cmpe_se.layers.precision import without_autocast
from cmpe_se.layers.views import STARTS, TABLE, VIEWS, listed


class CompetitiveSE(nn.Module):
    """Residual addition with a gate, ``identity + gate * residual``; the default is the paper's competitive one.

    Args:
        channels: channels C of residual and identity.
        view: what the gate reads and how, one of :data:`VIEWS`; :data:`cmpe_se.layers.views.TABLE` describes them.
            ``se`` is Hu et al.'s SE (residual only).
        start: value that gates begin at: ``half`` (the paper: a logistic of numbers around 0) or ``one`` (twice that,
            so that a fresh network computes nearly what the plain one does, and exactly that where the last layer is
            zero, fact 4). Gates then lie between 0 and 2 (0 and 4 for ``timm_cbam``, which multiplies two).
        reduction: C divided by the width of the hidden layer (rounded down).
        min_hidden: least units of the hidden layer. With few channels the reduction alone leaves one unit, whose ReLU
            may be off for every image.
        bias: biases in the linear maps. The paper's code has none; the last one is the gate's static part. timm's gates
            and ``aff`` have their own rule, and ``static`` is nothing but this bias.
        mask: probability with which each squeezed channel of each image is hidden from the gate in training, the
            others scaled up to keep the mean. Our reading of the authors' follow-up of 2020, of which only the
            abstract could be had.
        columns: width of the folded picture. Default: the most nearly square picture, see
            :func:`cmpe_se.layers.folding.default_columns`. Views without a fold ignore it, so that a comparison of
            views changes one word.
        maps: number m of maps of the picture's convolution. Default: C / 64, at least 1 (the paper's bottleneck rule).
            Views without a picture ignore it.
        device, dtype: of the parameters, as everywhere in PyTorch.

    Shapes:
        residual and identity (N, C, H, W) to (N, C, H, W); memory format and dtype of the inputs are kept.

    Raises:
        ValueError: unknown view or start; channels, reduction, min_hidden, columns, maps or mask out of range; channels
            that do not fold; in ``forward``, inputs whose shapes differ or whose channels are not C.
    """

    map_gate: nn.Module  # these are there as the view asks for them
    map_conv: nn.Conv2d
    map_norm: nn.BatchNorm2d
    fc1: nn.Linear
    fc_residual: nn.Linear
    fc_identity: nn.Linear
    fc2: "nn.Linear | _Constant"

    def __init__(
        self,
        channels: int,
        *,
        view: str = "folded_3x3",
        start: str = "half",
        reduction: int = 16,
        min_hidden: int = 1,
        bias: bool = False,
        mask: float = 0.0,
        columns: int | None = None,
        maps: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _check_settings(channels, view, start, mask)
        sizes = {"reduction": reduction, "min_hidden": min_hidden, "columns": columns, "maps": maps}
        _check_sizes(**sizes, channels=channels)
        kind = TABLE[view]
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden = max(min_hidden, channels // reduction)
        self.channels, self.view, self.start, self.hidden, self.mask = channels, view, start, hidden, mask
        self.gain = 1 / kind.half if start == "one" else 1.0

        self.picture_size: tuple[int, int] | None = None  # height and width; None for the views without a picture
        if view == "folded_3x3":
            self.picture_size = picture_size(channels, columns or default_columns(channels))
        elif kind.form == "picture":
            self.picture_size = (channels, 2)

        if kind.form == "maps":
            self.map_gate = create_map_gate(view, channels, hidden, **factory)
            return  # which initialises itself
        if kind.form == "constant":
            self.fc2 = _Constant(channels, **factory)
        elif view == "double_fc":
            self.fc_residual = nn.Linear(channels, hidden, bias=bias, **factory)
            self.fc_identity = nn.Linear(channels, hidden, bias=bias, **factory)
            self.fc2 = nn.Linear(2 * hidden, channels, bias=bias, **factory)
        else:
            reads = channels
            if self.picture_size is not None and kind.kernel is not None:
                maps = maps or max(1, channels // 64)
                height, width = (side - step + 1 for side, step in zip(self.picture_size, kind.kernel, strict=True))
                reads = height * width
                self.map_conv = nn.Conv2d(1, maps, kind.kernel, bias=False, **factory)
                self.map_norm = nn.BatchNorm2d(maps, **factory)
            self.fc1 = nn.Linear(reads, hidden, bias=bias, **factory)
            self.fc2 = nn.Linear(hidden, channels, bias=bias, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise anew: PyTorch's default for the linear maps, He's (fan out) for the picture's convolution."""
        for module in self.modules():
            if module is not self and callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        if hasattr(self, "map_conv"):
            nn.init.kaiming_normal_(self.map_conv.weight, mode="fan_out", nonlinearity="relu")

    @torch.no_grad()
    def zero_last_layer(self) -> None:
        """Make every gate the same for every input, 1/2 or 1 as ``start`` says (fact 4); it learns from its first step.

        The last layer learns only from hidden units that are awake, and the layers before it not at all while it is
        zero. With few units all of them may sleep for every image; of a unit and its mirror image one is awake.
        """
        if hasattr(self, "map_gate"):
            zero_map_gate(self.map_gate)
            return
        for parameter in self.fc2.parameters():
            parameter.zero_()
        half = self.hidden // 2
        for name in ("fc1", "fc_residual", "fc_identity"):
            for parameter in getattr(self, name).parameters() if hasattr(self, name) else ():
                parameter[half : 2 * half] = -parameter[:half]

    @property
    def competitive(self) -> bool:
        """Whether the gate looks at the identity at all."""
        return TABLE[self.view].competitive

    @property
    def takes_squeezes(self) -> bool:
        """Whether the gate is made of the two squeezes, so that :meth:`gate` takes them; else it needs the maps."""
        return TABLE[self.view].takes_squeezes

    def forward(self, residual: Tensor, identity: Tensor) -> Tensor:
        """Add the gated residual to the identity: (N, C, H, W) and (N, C, H, W) to (N, C, H, W)."""
        self._check_shapes(residual, identity, dimensions=(4,))
        if self.view == "aff":
            total = self.map_gate(residual, identity)
            return total if self.gain == 1 else self.gain * total
        if hasattr(self, "map_gate"):
            return torch.add(identity, self.map_gate(residual), alpha=self.gain)
        return add_gated(identity, self.gate(residual, identity), residual)

    def gate(self, residual: Tensor, identity: Tensor) -> Tensor:
        """Gate a of each channel, (N, C) in (0, 1) or (0, 2), from feature maps (N, C, H, W) or their squeezes (N, C).

        Raises:
            ValueError: shapes that do not fit; a view whose gate is inside a module of its own, and may differ from
                position to position.
        """
        if hasattr(self, "map_gate"):
            raise ValueError(
                f"view '{self.view}' rescales feature maps by itself: it has not one gate for each channel"
            )
        residual, identity = self._squeezes(residual, identity)
        with without_autocast(residual.device.type):
            # The gate is tiny and steers everything behind it, so autocast does not round it.
            weight_dtype = next(self.fc2.parameters()).dtype
            return self._excite(residual.to(weight_dtype), identity.to(weight_dtype))

    def picture(self, residual: Tensor, identity: Tensor) -> Tensor:
        """Picture (N, 1, height, width) that the map convolution reads, from feature maps or from their squeezes.

        Raises:
            ValueError: the view reads no picture.
        """
        if self.picture_size is None:
            raise ValueError(f"view '{self.view}' draws no picture; these views do: {listed('picture')}")
        return self._draw(*self._squeezes(residual, identity))

    def _squeezes(self, residual: Tensor, identity: Tensor) -> tuple[Tensor, Tensor]:
        self._check_shapes(residual, identity, dimensions=(2, 4))
        if residual.ndim == 2:
            return residual, identity
        # Nothing is read that the gate does not look at: these tensors are large.
        reads = TABLE[self.view].reads
        if not reads:
            nothing = residual[:, :, 0, 0]
            return nothing, nothing
        squeezes = {flow: squeeze(x) for flow, x in (("residual", residual), ("identity", identity)) if flow in reads}
        known = squeezes[reads[0]]
        return squeezes.get("residual", known), squeezes.get("identity", known)

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
        if self.view == "folded_3x3" and self.picture_size is not None:
            return fold(residual, identity, self.picture_size[1])
        return torch.stack((residual, identity), dim=-1).unsqueeze(1)  # (N, 1, C, 2)

    def _excite(self, residual: Tensor, identity: Tensor) -> Tensor:
        if self.mask and self.training:
            residual, identity = (nn.functional.dropout(flow, self.mask) for flow in (residual, identity))
        gate = self.fc2(self._hidden(residual, identity)).sigmoid()  # (N, C)
        return gate if self.gain == 1 else gate * self.gain

    def _hidden(self, residual: Tensor, identity: Tensor) -> Tensor:
        """What the last layer reads, (N, hidden); for a constant gate anything of N rows."""
        if self.view == "static":
            return residual
        if self.view == "double_fc":
            return torch.cat((self.fc_residual(residual).relu(), self.fc_identity(identity).relu()), dim=1)
        if self.view == "se":
            reads = residual
        elif self.view == "se_identity":
            reads = identity
        elif self.view == "se_sum":
            reads = residual + identity
        else:
            reads = self._averaged_maps(self._draw(residual, identity))
        return self.fc1(reads).relu()

    def _averaged_maps(self, picture: Tensor) -> Tensor:
        if can_average(self.map_conv, self.map_norm, picture):  # the same, in training, without the maps
            return averaged_maps(self.map_conv, self.map_norm, picture)
        maps = self.map_norm(self.map_conv(picture))  # (N, m, h', w'); no ReLU here
        return maps.mean(dim=1).flatten(1)

    def extra_repr(self) -> str:
        """Channels, view and what differs from the paper, for ``print(model)``."""
        size = f", picture={self.picture_size[0]}x{self.picture_size[1]}" if self.picture_size else ""
        hidden = "" if self.view in ("static", "timm_eca") else f", hidden={self.hidden}"
        start = f", start='{self.start}'" if self.start != "half" else ""
        mask = f", mask={self.mask:g}" if self.mask else ""
        return f"{self.channels}, view='{self.view}'{hidden}{size}{start}{mask}"


class _Constant(nn.Module):
    """The last layer of a gate that reads nothing: a bias alone.

    Args:
        channels: C.
        device, dtype: of the bias.
    """

    def __init__(self, channels: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.out_features = channels
        self.bias = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """All gates at their start."""
        nn.init.zeros_(self.bias)

    def forward(self, rows: Tensor) -> Tensor:
        """(N, anything) to (N, C)."""
        # Not a view: PyTorch's module tracker cannot follow one of a parameter. Not len(): to torch.export that is a
        # number, and the batch held to it.
        return self.bias.repeat(rows.shape[0], 1)


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


def is_pointwise(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether a layer is one linear map of the channels at each position: a 1x1 convolution, perhaps with a stride."""
    if not isinstance(module, nn.Conv2d) or type(module).forward is not nn.Conv2d.forward:
        return False
    return module.kernel_size == (1, 1) and module.groups == 1 and module.padding in ((0, 0), "valid", "same")


def _check_settings(channels: int, view: str, start: str, mask: float) -> None:
    for name, value, known in (("view", view, VIEWS), ("start", start, STARTS)):
        if value not in known:
            raise ValueError(f"unknown {name} '{value}'; choose one of {', '.join(known)}")
    if not isinstance(mask, (int, float)) or not 0 <= mask < 1:
        raise ValueError(f"mask must be a probability of at least 0 and below 1, got {mask!r}")
    if mask and not TABLE[view].takes_squeezes:
        raise ValueError(f"mask hides squeezes, and view '{view}' reads none; these views do: {_MASKABLE}")


_MASKABLE = ", ".join(name for name, view in TABLE.items() if view.takes_squeezes)


def _check_sizes(**sizes: int | None) -> None:
    for name, value in sizes.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
