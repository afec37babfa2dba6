"""The one table of gates: every word that ``view=`` takes, what that gate reads, and how it is made.

A gate is added here, by a row, and nowhere else: every other place asks the table. A row names its layers, of a class
in ``gate_layers.py`` (from squeezes), ``picture_layers.py`` (from a picture of them) or ``map_gates.py`` (from whole
feature maps). ``docs/gates.md`` says what each gate costs and what it controls for, and how a new one is added.
"""

from dataclasses import dataclass

from cmpe_se.errors import UserError
from cmpe_se.layers.gate_layers import FORMS, ConstantLayers, DoubleLayers, GateLayers, SqueezeLayers
from cmpe_se.layers.map_gates import AttentionalFeatureFusion, MapLayers, gather_excite, timm_attention
from cmpe_se.layers.picture_layers import PictureLayers

GATE_SETTINGS = ("start", "reduction", "min_hidden", "bias", "mask")
"""What can be set of a gate besides its view, the same words everywhere."""


@dataclass(frozen=True)
class View:
    """A kind of gate.

    Args:
        reads: flows that the gate looks at: ``residual``, ``identity``, both in this order, or none of them.
        layers: how it is made of layers, run and merged.
        source: who described it.
        summary: what it computes, in a few words.
        half: value of the gate where all its logits are 0.
        by_position: whether the gate differs from position to position.
        settings: gate settings that make a difference to it.

    Raises:
        ValueError: flows, settings or a form that there are not.
    """

    reads: tuple[str, ...]
    layers: GateLayers
    source: str
    summary: str
    half: float = 0.5
    by_position: bool = False
    settings: tuple[str, ...] = GATE_SETTINGS

    def __post_init__(self) -> None:
        if self.reads not in ((), ("residual",), ("identity",), ("residual", "identity")):
            raise ValueError(f"a view reads ('residual',), ('identity',), both in this order, or (), not {self.reads}")
        if unknown := [name for name in self.settings if name not in GATE_SETTINGS]:
            raise ValueError(f"'{unknown[0]}' is no setting of a gate; these are: {', '.join(GATE_SETTINGS)}")
        if self.form not in FORMS:
            raise ValueError(f"unknown form '{self.form}' of {type(self.layers).__name__}; one of {', '.join(FORMS)}")

    @property
    def form(self) -> str:
        """``squeezes`` (linear maps of the squeezes), ``picture`` (a convolution over a picture of both squeezes),
        ``constant`` (one learned number a channel), or ``maps`` (a module of its own that takes feature maps).
        """
        return self.layers.form

    @property
    def competitive(self) -> bool:
        """Whether the gate looks at the identity at all."""
        return "identity" in self.reads

    @property
    def takes_squeezes(self) -> bool:
        """Whether the gate is a function of the two squeezes, so that these may come from anywhere."""
        return self.form in ("squeezes", "picture")

    @property
    def mixed(self) -> bool:
        """Whether some flow that the gate reads cannot be told from what its layers are given, as in a sum."""
        return self.layers.mixed(self.reads)

    @property
    def merges(self) -> bool:
        """Whether the gate has a merged form, two linear maps (fact 1 of ``docs/method.md``)."""
        return self.layers.merges


_RESIDUAL, _IDENTITY, _BOTH = ("residual",), ("identity",), ("residual", "identity")
_PAPER, _OURS = "arXiv 1807.08920", "control"
_HIDDEN = ("start", "reduction", "min_hidden")  # of gates with their authors' biases, and without squeezes to mask

TABLE: dict[str, View] = {
    "se": View(_RESIDUAL, SqueezeLayers(), "arXiv 1709.01507", "squeeze-and-excitation of the residual"),
    "double_fc": View(_BOTH, DoubleLayers(), _PAPER, "one hidden layer for each squeeze"),
    "pair_view_2x1": View(_BOTH, PictureLayers((1, 2)), _PAPER, "convolution over each pair of squeezes"),
    "pair_view_1x1": View(_BOTH, PictureLayers((1, 1)), _PAPER, "1x1 convolution over the pairs"),
    "folded_3x3": View(_BOTH, PictureLayers((3, 3), folded=True), _PAPER, "3x3 convolution over the folded picture"),
    "static": View(
        (),
        ConstantLayers(),
        "arXiv 2304.06345",
        "one learned number a channel, the same for all images",
        settings=("start",),
    ),
    "se_identity": View(_IDENTITY, SqueezeLayers(), _OURS, "SE that reads the identity only"),
    "se_sum": View(_BOTH, SqueezeLayers(), _OURS, "SE that reads the squeeze of residual + identity"),
    "timm_se": View(
        _RESIDUAL,
        MapLayers(timm_attention("se"), last=("fc2",), takes="positions"),
        "arXiv 1709.01507",
        "timm's SEModule",
        settings=_HIDDEN,
    ),
    "timm_eca": View(
        _RESIDUAL,
        MapLayers(timm_attention("eca"), last=("conv",), takes="positions"),
        "arXiv 1910.03151",
        "timm's EcaModule: convolution over neighbouring channels",
        settings=("start",),
    ),
    "timm_ge": View(
        _RESIDUAL,
        MapLayers(gather_excite, last=("mlp.fc2",), takes="positions"),
        "arXiv 1810.12348",
        "timm's GatherExcite, global extent: timm_se's function",
        settings=_HIDDEN,
    ),
    "timm_gc": View(
        _RESIDUAL,
        MapLayers(timm_attention("gc"), last=("mlp_scale.fc2",), takes="positions"),
        "arXiv 1904.11492",
        "timm's GlobalContext: squeeze weighted by attention",
        settings=_HIDDEN,
    ),
    "timm_cbam": View(
        _RESIDUAL,
        MapLayers(timm_attention("cbam"), last=("channel.fc2", "spatial.conv.bn")),  # spatial logits come from a norm
        "arXiv 1807.06521",
        "timm's CbamModule: channels, then positions",
        half=0.25,
        by_position=True,
        settings=_HIDDEN,
    ),
    "aff": View(
        _BOTH,
        MapLayers(
            AttentionalFeatureFusion,
            last=("local_context.4", "global_context.4"),
            scales_identity=True,
            takes="positions",
        ),
        "arXiv 2009.14082",
        "w residual + (1 - w) identity, w from context of their sum",
        by_position=True,
        settings=_HIDDEN,
    ),
}
"""Views by name."""

VIEWS = tuple(TABLE)
"""Names of the views that come with the package; the first five are the paper's. Choices are checked by the table."""

PAPER_VIEWS = VIEWS[:5]
"""Plain SE, two separate squeezes, and the three that read a picture of both."""

STARTS = ("half", "one")
"""Where gates begin: at the logistic's 1/2, as in the paper, or at 1 by a fixed factor of 2 (fact 4)."""


def listed(form: str) -> str:
    """Names of the views of a form, with commas between."""
    return ", ".join(name for name, view in TABLE.items() if view.form == form)


def check_dimensions(name: str, axes: int) -> None:
    """Refuse a view of images for other feature maps.

    Args:
        name: of the view.
        axes: number of axes of a channel's positions: 1 of signals, 2 of images, 3 of volumes; 0 of squeezes.

    Raises:
        UserError: the view takes images alone. The message names the views that take these maps.
    """
    if axes not in (0, 2) and TABLE[name].layers.images_alone:
        others = ", ".join(other for other, view in TABLE.items() if not view.layers.images_alone)
        raise UserError(
            f"view '{name}' is one of images (N, C, H, W), and these feature maps have {axes} "
            f"{'axis' if axes == 1 else 'axes'} of positions; these views take any number: {others}"
        )


def find_view(name: str) -> View:
    """The view of a name.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(name, str) or name not in TABLE:
        raise ValueError(f"unknown view '{name}'; choose one of {', '.join(TABLE)}")
    return TABLE[name]
