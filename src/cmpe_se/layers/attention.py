"""Competitive inner-imaging squeeze-and-excitation (CMPE-SE).

Hu, Wen, Luo, Dai, Ma, Yu: "Competitive Inner-Imaging Squeeze and Excitation for Residual Network", arXiv 1807.08920.

A residual block computes ``y = s + u``: s the identity (or its projection), u the residual. Squeeze-and-excitation
rescales the channels of u by looking at u alone. Here both flows compete for the gate, which reads their squeezes off a
small picture of the network's inside::

    r, i = squeeze(u), squeeze(s)       # (N, C) each: means over all positions
    a = gate(r, i)                      # (N, C) in (0, 1), one of many views
    y = s + a * u                       # (N, C, H, W); as well (N, C, L) and (N, C, D, H, W)

``docs/method.md`` derives all of this; the facts numbered there are the ones that comments here refer to.
"""

from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn

from cmpe_se.layers.gate_layers import Gate, GateSizes
from cmpe_se.layers.gated_addition import Convolution, add_gated, squeeze
from cmpe_se.layers.hooks import known_layer, says_what_it_does
from cmpe_se.layers.merged_gate import layers_say_what_it_does, merge_gate
from cmpe_se.layers.precision import without_autocast
from cmpe_se.layers.views import STARTS, TABLE, View, check_dimensions, find_view, listed


@known_layer
class CompetitiveSE(Gate):
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
        residual and identity (N, C, ...) to (N, C, ...), one shape: signals (N, C, L), images (N, C, H, W), volumes and
        clips (N, C, D, H, W). One gate takes all of them (``timm_cbam`` images alone); memory format and dtype of the
        inputs are kept.

    Raises:
        ValueError: unknown view or start; channels, reduction, min_hidden, columns, maps or mask out of range; channels
            that do not fold; in ``forward``, inputs whose shapes differ or whose channels are not C.
        UserError: in ``forward``, a view that takes images alone, and other inputs.
    """

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
        kind, hidden = TABLE[view], max(min_hidden, channels // reduction)
        self.channels, self.view, self.start, self.hidden, self.mask = channels, view, start, hidden, mask
        self.reduction, self.min_hidden = reduction, min_hidden
        self.gain = 1 / kind.half if start == "one" else 1.0
        # Height and width; None for the views without a picture.
        self.picture_size: tuple[int, int] | None = kind.layers.picture_size(channels, columns)
        self.sizes = made_for = GateSizes(channels, hidden, bias, maps, self.picture_size)
        for name, layer in kind.layers.create(made_for, device=device, dtype=dtype).items():
            self.add_module(name, layer)
        if not hasattr(self, "map_gate"):  # which initialises itself
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Re-initialise: PyTorch's default for the linear maps, He's (fan out) for the picture's convolution."""
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
        self.kind.layers.zero(self)

    @property
    def kind(self) -> View:
        """What the table says of the gate's view."""
        return find_view(self.view)

    @property
    def competitive(self) -> bool:
        """Whether the gate looks at the identity at all."""
        return self.kind.competitive

    @property
    def takes_squeezes(self) -> bool:
        """Whether the gate is made of the two squeezes, so that :meth:`gate` takes them; else it needs the maps."""
        return self.kind.takes_squeezes

    def forward(self, residual: Tensor, identity: Tensor) -> Tensor:
        """Add the gated residual to the identity: (N, C, ...) and (N, C, ...) to (N, C, ...)."""
        self._check_shapes(residual, identity, least=3)
        if hasattr(self, "map_gate"):
            return self.kind.layers.add(self, residual, identity)
        return add_gated(identity, self.gate(residual, identity), residual)

    def gate(self, residual: Tensor, identity: Tensor) -> Tensor:
        """Gate a of each channel, (N, C) in (0, 1) or (0, 2), from feature maps (N, C, ...) or their squeezes (N, C).

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
        return self.kind.layers.draw(self, *self._squeezes(residual, identity))

    def fuse(self) -> nn.Module:
        """The gate in its merged form, which :func:`timm.utils.reparameterize_model` puts in its place.

        That is what the gate computes in eval mode, exactly, from two linear maps without gradients. As with timm's
        own layers, the gate may be in either mode: running statistics are used, and no squeeze is masked. This is the
        gates' part alone; :func:`cmpe_se.merge` also folds norms into convolutions and static gates into the layer
        before them, and reads smaller tensors.

        Returns:
            A :class:`cmpe_se.merging.MergedGate`, or the gate itself if its view has no merged form, or if its
            parameters do not say what it computes (hooks, a layer of another class, a forward of its own).

        Raises:
            UserError: a norm that keeps no running statistics.
        """
        return merge_gate(self) if self.kind.merges and layers_say_what_it_does(self) else self

    def _squeezes(self, residual: Tensor, identity: Tensor) -> tuple[Tensor, Tensor]:
        self._check_shapes(residual, identity, least=2)
        if residual.ndim == 2:
            return residual, identity
        # Nothing is read that the gate does not look at: these tensors are large.
        reads = self.kind.reads
        if not reads:
            first: tuple[Any, ...] = (..., *[0] * (residual.ndim - 2))
            nothing = residual[first]
            return nothing, nothing
        squeezes = {flow: squeeze(x) for flow, x in (("residual", residual), ("identity", identity)) if flow in reads}
        known = squeezes[reads[0]]
        return squeezes.get("residual", known), squeezes.get("identity", known)

    def _check_shapes(self, residual: Tensor, identity: Tensor, *, least: int) -> None:
        fits = residual.ndim >= least and residual.shape[1] == self.channels
        if not fits or residual.shape != identity.shape:
            shapes = ", ".join(f"(N, {self.channels}, {sizes})" for sizes in ("L", "H, W", "D, H, W"))
            raise ValueError(
                f"CompetitiveSE({self.channels}) takes a residual and an identity of one shape, such as {shapes}; "
                f"got {tuple(residual.shape)} and {tuple(identity.shape)}"
            )
        if 0 in residual.shape[2:]:
            raise ValueError(f"feature maps need at least one position to have a mean, got {tuple(residual.shape)}")
        check_dimensions(self.view, residual.ndim - 2)

    def _excite(self, residual: Tensor, identity: Tensor) -> Tensor:
        if self.mask and self.training:
            residual, identity = (nn.functional.dropout(flow, self.mask) for flow in (residual, identity))
        gate = self.fc2(self._hidden(residual, identity)).sigmoid()  # (N, C)
        return gate if self.gain == 1 else gate * self.gain

    def _hidden(self, residual: Tensor, identity: Tensor) -> Tensor:
        """What the last layer reads, (N, hidden); for a constant gate anything of N rows."""
        return self.kind.layers.hidden(self, residual, identity)

    def extra_repr(self) -> str:
        """Channels, view and what differs from the paper, for ``print(model)``."""
        size = f", picture={self.picture_size[0]}x{self.picture_size[1]}" if self.picture_size else ""
        hidden = f", hidden={self.hidden}" if "reduction" in self.kind.settings else ""
        start = f", start='{self.start}'" if self.start != "half" else ""
        mask = f", mask={self.mask:g}" if self.mask else ""
        return f"{self.channels}, view='{self.view}'{hidden}{size}{start}{mask}"


def squeeze_through(conv: Convolution, x: Tensor) -> Tensor:
    """Squeeze of ``conv(x)`` without the convolution: (N, C_in, ...) to (N, C_out).

    A mean over positions commutes with the linear map at each of them (fact 2), so this reads the input instead of the
    output: in a bottleneck a quarter of the channels, and the gate is known before the convolution has run.

    Args:
        conv: pointwise convolution, see :func:`is_pointwise`; a stride skips positions.
        x: its input, (N, C_in, ...).
    """
    squeezed = squeeze(x if (kept := kept_by_stride(conv)) is None else x[kept])  # (N, C_in)
    weight, bias = conv.weight, conv.bias
    if weight.dtype != squeezed.dtype:
        weight, bias = weight.to(squeezed.dtype), None if bias is None else bias.to(squeezed.dtype)
    with without_autocast(x.device.type):
        return nn.functional.linear(squeezed, weight.flatten(1), bias)


def kept_by_stride(conv: Convolution) -> tuple[slice, ...] | None:
    """Index of the positions that a pointwise convolution reads; None where it reads all.

    A slice costs its backward pass a zeroed tensor, even one that skips nothing.
    """
    if all(step == 1 for step in conv.stride):
        return None
    return slice(None), slice(None), *(slice(None, None, step) for step in conv.stride)


def is_pointwise(module: nn.Module) -> TypeGuard[Convolution]:
    """Whether a layer is one linear map of the channels at each position.

    That is a convolution, of any dimension, whose kernel has side 1; perhaps with a stride.
    """
    if type(module) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return False
    conv = cast(Convolution, module)
    if {*conv.kernel_size} != {1} or conv.groups != 1 or not (isinstance(conv.padding, str) or not any(conv.padding)):
        return False
    return says_what_it_does(module)


def _check_settings(channels: int, view: str, start: str, mask: float) -> None:
    kind = find_view(view)
    if start not in STARTS:
        raise ValueError(f"unknown start '{start}'; choose one of {', '.join(STARTS)}")
    if not isinstance(mask, (int, float)) or not 0 <= mask < 1:
        raise ValueError(f"mask must be a probability of at least 0 and below 1, got {mask!r}")
    if mask and not kind.takes_squeezes:
        maskable = ", ".join(name for name, other in TABLE.items() if other.takes_squeezes)
        raise ValueError(f"mask hides squeezes, and view '{view}' reads none; these views do: {maskable}")


def _check_sizes(**sizes: int | None) -> None:
    for name, value in sizes.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
