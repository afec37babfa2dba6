"""How a gate is made of layers, run, zeroed and merged: one class for each form, which the table of views names.

Objects of these classes hold no tensors. The layers are children of a :class:`cmpe_se.CompetitiveSE`, under the names
that :meth:`GateLayers.create` gives them, and every method is handed that gate. ``docs/gates.md`` shows a new one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from cmpe_se.layers.hooks import GateModule, known_layer

FORMS = ("squeezes", "picture", "constant", "maps")
"""Linear maps of squeezes, a convolution over a picture of both, a learned constant, a module that takes the maps."""


class Kind(Protocol):
    """What the layers of a gate see of its row in the table of views."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Flows that the gate looks at."""

    @property
    def competitive(self) -> bool:
        """Whether the identity is one of them."""

    @property
    def merges(self) -> bool:
        """Whether such gates have a merged form."""

    @property
    def layers(self) -> "GateLayers":
        """The layers themselves."""


class Gate(GateModule):
    """What the layers see of the gate that they belong to, a :class:`cmpe_se.CompetitiveSE`."""

    channels: int
    view: str
    hidden: int
    gain: float
    sizes: "GateSizes"
    picture_size: tuple[int, int] | None
    map_gate: nn.Module  # these are there as the view asks for them
    map_conv: nn.Conv2d
    map_norm: nn.BatchNorm2d
    fc1: nn.Linear
    fc_residual: nn.Linear
    fc_identity: nn.Linear
    fc2: "nn.Linear | Constant"

    @property
    def kind(self) -> Kind:
        """What the table says of the gate's view."""
        raise NotImplementedError


@dataclass(frozen=True)
class GateSizes:
    """What the layers of one gate are made for.

    Args:
        channels: C of residual and identity.
        hidden: units of the hidden layer.
        bias: whether linear maps have one.
        maps: number of maps of the picture's convolution; None for the paper's rule.
        picture: height and width of the picture; None without one.
    """

    channels: int
    hidden: int
    bias: bool
    maps: int | None
    picture: tuple[int, int] | None


class Affine(NamedTuple):
    """The hidden layer of a gate in eval mode before its ReLU, ``A r + B i + b``, in float64 (fact 1)."""

    residual: Tensor | None  # A, (hidden, C); None for a gate that does not look at the residual
    identity: Tensor | None  # B, likewise
    bias: Tensor  # b, (hidden,)


class GateLayers:
    """The layers of a gate that is a function of both squeezes, ``sigmoid(fc2(hidden(r, i)))``; subclasses say which.

    ``create`` and ``hidden`` are all that a new kind of gate has to define. The gate then runs everywhere;
    :func:`cmpe_se.merge` leaves it as it is until ``affine`` says how it merges.
    """

    form: ClassVar[str] = "squeezes"
    """One of :data:`FORMS`."""
    hidden_layers: ClassVar[tuple[str, ...]] = ()
    """Layers behind whose outputs a ReLU may sleep."""
    folded: bool = False
    """Whether the picture is folded; else it has two columns, one for each flow."""
    scales_identity: bool = False
    """Whether the identity is gated too, by what the gate leaves of 1."""

    def picture_size(self, channels: int, columns: int | None) -> tuple[int, int] | None:
        """Height and width of the picture; None without one.

        Raises:
            ValueError: channels that do not fold into such columns.
        """
        return None

    def create(self, sizes: GateSizes, **factory: Any) -> dict[str, nn.Module]:
        """Layers by the names that they take in the gate; ``fc2`` comes last, has parameters, and makes the logits.

        Args:
            sizes: of the gate.
            factory: device and dtype, for every layer.
        """
        raise NotImplementedError

    def add(self, gate: "Gate", residual: Tensor, identity: Tensor) -> Tensor:
        """The whole gated addition, (N, C, ...) and (N, C, ...) to (N, C, ...); for the form ``maps`` alone."""
        raise NotImplementedError

    def draw(self, gate: "Gate", residual: Tensor, identity: Tensor) -> Tensor:
        """The picture (N, 1, height, width) of two vectors (N, C); for the form ``picture`` alone."""
        raise NotImplementedError

    def hidden(self, gate: "Gate", residual: Tensor, identity: Tensor) -> Tensor:
        """What ``fc2`` reads, from the squeezes (N, C) each; one that the gate does not look at holds anything."""
        raise NotImplementedError

    def zero(self, gate: "Gate") -> None:
        """Make all logits 0, and of every two hidden units one the mirror image of the other."""
        for parameter in gate.fc2.parameters():
            parameter.zero_()
        half = gate.hidden // 2
        for name in self.hidden_layers:
            for parameter in gate.get_submodule(name).parameters():
                parameter[half : 2 * half] = -parameter[:half]

    def affine(self, gate: "Gate") -> Affine | None:
        """The gate's hidden layer as one affine map, for gates ``sigmoid(fc2(relu(A r + B i + b)))``; else None.

        Raises:
            UserError: a gate that has no fixed form in eval mode.
        """
        return None

    @property
    def images_alone(self) -> bool:
        """Whether gates of this kind take images (N, C, H, W) alone, no signals or volumes."""
        return False

    @property
    def merges(self) -> bool:
        """Whether gates of this kind have a merged form."""
        return type(self).affine is not GateLayers.affine

    def mixed(self, reads: Sequence[str]) -> bool:
        """Whether some flow that is read cannot be told from what the layers are given."""
        return True

    def told(self, reads: Sequence[str], inputs: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """r and i, (N, C) each, as far as the inputs of the layers, by their names, tell them."""
        return None, None


class SqueezeLayers(GateLayers):
    """One hidden layer, which reads the squeeze of the one flow that the view reads, or the sum of both squeezes."""

    hidden_layers = ("fc1",)

    def create(self, sizes: GateSizes, **factory: Any) -> dict[str, nn.Module]:
        """``fc1`` to the hidden units, ``fc2`` to the logits."""
        return {
            "fc1": nn.Linear(sizes.channels, sizes.hidden, bias=sizes.bias, **factory),
            "fc2": nn.Linear(sizes.hidden, sizes.channels, bias=sizes.bias, **factory),
        }

    def hidden(self, gate: "Gate", residual: Tensor, identity: Tensor) -> Tensor:
        """(N, C) and (N, C) to (N, hidden)."""
        reads = gate.kind.reads
        if len(reads) == 2:
            return gate.fc1(residual + identity).relu()
        return gate.fc1(residual if reads == ("residual",) else identity).relu()

    def affine(self, gate: "Gate") -> Affine:
        """W1 for each flow that is read."""
        weight, bias = in_double(gate.fc1)
        reads = gate.kind.reads
        return Affine(weight if "residual" in reads else None, weight if "identity" in reads else None, bias)

    def mixed(self, reads: Sequence[str]) -> bool:
        """Of a sum neither term can be told."""
        return len(reads) > 1

    def told(self, reads: Sequence[str], inputs: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """What ``fc1`` read, where that is one flow."""
        if self.mixed(reads):
            return None, None
        return (inputs["fc1"], None) if reads == ("residual",) else (None, inputs["fc1"])


class DoubleLayers(GateLayers):
    """A hidden layer for each squeeze, side by side."""

    hidden_layers = ("fc_residual", "fc_identity")

    def create(self, sizes: GateSizes, **factory: Any) -> dict[str, nn.Module]:
        """``fc_residual`` and ``fc_identity`` to hidden units each, ``fc2`` to the logits."""
        return {
            "fc_residual": nn.Linear(sizes.channels, sizes.hidden, bias=sizes.bias, **factory),
            "fc_identity": nn.Linear(sizes.channels, sizes.hidden, bias=sizes.bias, **factory),
            "fc2": nn.Linear(2 * sizes.hidden, sizes.channels, bias=sizes.bias, **factory),
        }

    def hidden(self, gate: "Gate", residual: Tensor, identity: Tensor) -> Tensor:
        """(N, C) and (N, C) to (N, 2 hidden), the residual's half first."""
        return torch.cat((gate.fc_residual(residual).relu(), gate.fc_identity(identity).relu()), dim=1)

    def affine(self, gate: "Gate") -> Affine:
        """Each flow's own rows, and zeros in the other's."""
        residual, identity = (in_double(layer) for layer in (gate.fc_residual, gate.fc_identity))
        nothing = torch.zeros_like(residual[0])
        return Affine(
            torch.cat((residual[0], nothing)),
            torch.cat((nothing, identity[0])),
            torch.cat((residual[1], identity[1])),
        )

    def mixed(self, reads: Sequence[str]) -> bool:
        """Each flow has a layer of its own."""
        return False

    def told(self, reads: Sequence[str], inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What the two layers read."""
        return inputs["fc_residual"], inputs["fc_identity"]


class ConstantLayers(GateLayers):
    """One learned number a channel, the same for every input."""

    form = "constant"

    def create(self, sizes: GateSizes, **factory: Any) -> dict[str, nn.Module]:
        """``fc2``, which is a bias alone."""
        return {"fc2": Constant(sizes.channels, **factory)}

    def hidden(self, gate: "Gate", residual: Tensor, identity: Tensor) -> Tensor:
        """Anything of N rows."""
        return residual


@known_layer
class Constant(nn.Module):
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


def in_double(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    """A linear map's weight (out, in) and bias (out,), zero where it has none, in float64."""
    weight = layer.weight.detach().double()
    return weight, weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().double()
