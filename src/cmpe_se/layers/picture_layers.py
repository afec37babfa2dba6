"""Gates that read a picture of both squeezes: the paper's inner-imaging."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import conv_transpose2d

from cmpe_se.errors import UserError
from cmpe_se.layers.averaged_maps import averaged_maps, can_average
from cmpe_se.layers.folding import default_columns, fold, picture_size, unfold
from cmpe_se.layers.gate_layers import Affine, Gate, GateLayers, GateSizes, in_double


@dataclass(frozen=True)
class PictureLayers(GateLayers):
    """A convolution over a picture of both squeezes, a batch norm, the mean over the maps, and one hidden layer.

    Args:
        kernel: height and width of the convolution's kernel.
        folded: whether the picture is folded (:mod:`cmpe_se.layers.folding`), or one pair of squeezes a row.
    """

    kernel: tuple[int, int]
    folded: bool = False

    form: ClassVar[str] = "picture"
    hidden_layers: ClassVar[tuple[str, ...]] = ("fc1",)

    def picture_size(self, channels: int, columns: int | None) -> tuple[int, int]:
        """(2C/k, k) where it is folded to k columns, else (C, 2)."""
        size = picture_size(channels, columns or default_columns(channels)) if self.folded else (channels, 2)
        if any(side < step for side, step in zip(size, self.kernel, strict=True)):
            raise ValueError(
                f"a {self.kernel[0]}x{self.kernel[1]} convolution cannot read the {size[0]}x{size[1]} picture of "
                f"{channels} channels; take more channels, or other columns"
            )
        return size

    def create(self, sizes: GateSizes, **factory: Any) -> dict[str, nn.Module]:
        """``map_conv`` and ``map_norm``, ``fc1`` from the maps' mean to the hidden units, ``fc2`` to the logits."""
        maps = sizes.maps or max(1, sizes.channels // 64)
        assert sizes.picture is not None  # of these layers' own picture_size
        height, width = _map_size(sizes.picture, self.kernel)
        return {
            "map_conv": nn.Conv2d(1, maps, self.kernel, bias=False, **factory),
            "map_norm": nn.BatchNorm2d(maps, **factory),
            "fc1": nn.Linear(height * width, sizes.hidden, bias=sizes.bias, **factory),
            "fc2": nn.Linear(sizes.hidden, sizes.channels, bias=sizes.bias, **factory),
        }

    def draw(self, gate: Gate, residual: Tensor, identity: Tensor) -> Tensor:
        """The picture (N, 1, height, width) of two vectors (N, C)."""
        if self.folded:
            return fold(residual, identity, _picture_of(gate)[1])
        return torch.stack((residual, identity), dim=-1).unsqueeze(1)  # (N, 1, C, 2)

    def undraw(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        """The two vectors that a picture shows: the inverse of :meth:`draw`."""
        residual, identity = unfold(picture) if self.folded else picture[:, 0].unbind(-1)
        return residual, identity

    def hidden(self, gate: Gate, residual: Tensor, identity: Tensor) -> Tensor:
        """(N, C) and (N, C) to (N, hidden)."""
        picture = self.draw(gate, residual, identity)
        if can_average(gate.map_conv, gate.map_norm, picture):  # the same, in training, without the maps
            averaged = averaged_maps(gate.map_conv, gate.map_norm, picture)
        else:
            maps = gate.map_norm(gate.map_conv(picture))  # (N, m, h', w'); no ReLU here
            averaged = maps.mean(dim=1).flatten(1)
        return gate.fc1(averaged).relu()

    def affine(self, gate: Gate) -> Affine:
        """Convolution, norm with running statistics, mean over the maps and W1, which are affine one after the other.

        A and B are W1 pulled back through the convolution, which is what a transposed convolution does.
        """
        reads, bias = in_double(gate.fc1)  # (hidden, what W1 reads) and (hidden,)
        kernels, norm = gate.map_conv.weight.detach().double(), gate.map_norm  # (m, 1, height, width)
        if norm.running_var is None or norm.running_mean is None:
            raise UserError("a gate whose norm keeps no running statistics uses each batch's own, and cannot be merged")
        scale = (norm.running_var.double() + norm.eps).rsqrt()  # (m,)
        scale = scale if norm.weight is None else scale * norm.weight.double()
        shift = -norm.running_mean.double() * scale  # (m,)
        shift = shift if norm.bias is None else shift + norm.bias.double()
        kernel = (scale[:, None, None, None] * kernels).mean(0, keepdim=True)  # (1, 1, height, width)
        pictures = conv_transpose2d(reads.view(-1, 1, *map_size(gate)), kernel)  # (hidden, 1, picture height, width)
        return Affine(*self.undraw(pictures), bias + shift.mean() * reads.sum(1))

    def mixed(self, reads: Sequence[str]) -> bool:
        """The picture shows both."""
        return False

    def told(self, reads: Sequence[str], inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What the picture shows."""
        return self.undraw(inputs["map_conv"])


def map_size(gate: Gate) -> tuple[int, int]:
    """Height and width of the maps that a picture's convolution makes."""
    return _map_size(_picture_of(gate), gate.map_conv.kernel_size)


def _map_size(picture: tuple[int, int], kernel: tuple[int, ...]) -> tuple[int, int]:
    height, width = (side - step + 1 for side, step in zip(picture, kernel, strict=True))
    return height, width


def _picture_of(gate: Gate) -> tuple[int, int]:
    assert gate.picture_size is not None  # of these layers' own picture_size
    return gate.picture_size
