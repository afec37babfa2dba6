"""The one table of gates: every word that ``view=`` takes, what that gate reads, and where it comes from.

``docs/gates.md`` says what each one costs and what it controls for. To add a gate, add its row here and its layers in
``attention.py`` (from squeezes) or ``map_gates.py`` (from whole feature maps).
"""

from dataclasses import dataclass

GATE_SETTINGS = ("start", "reduction", "min_hidden", "bias", "mask")
"""What can be set of a gate besides its view, the same words everywhere."""


@dataclass(frozen=True)
class View:
    """A kind of gate.

    Args:
        reads: flows that the gate looks at: ``residual``, ``identity``, both, or none of them.
        form: ``squeezes`` (linear maps of the squeezes), ``picture`` (a convolution over a picture of both squeezes),
            ``constant`` (one learned number a channel), or ``maps`` (a module of its own that takes feature maps).
        source: who described it.
        summary: what it computes, in a few words.
        kernel: height and width of the picture's convolution, for ``picture``.
        half: value of the gate where all its logits are 0.
        mixed: whether the gate reads the sum of its flows and not each by itself.
        by_position: whether the gate differs from position to position.
        settings: gate settings that make a difference to it.
    """

    reads: tuple[str, ...]
    form: str
    source: str
    summary: str
    kernel: tuple[int, int] | None = None
    half: float = 0.5
    mixed: bool = False
    by_position: bool = False
    settings: tuple[str, ...] = GATE_SETTINGS

    @property
    def competitive(self) -> bool:
        """Whether the gate looks at the identity at all."""
        return "identity" in self.reads

    @property
    def takes_squeezes(self) -> bool:
        """Whether the gate is a function of the two squeezes, so that these may come from anywhere."""
        return self.form in ("squeezes", "picture")


_RESIDUAL, _IDENTITY, _BOTH = ("residual",), ("identity",), ("residual", "identity")
_PAPER, _OURS = "arXiv 1807.08920", "control"
_HIDDEN = ("start", "reduction", "min_hidden")  # of gates with their authors' biases, and without squeezes to mask

TABLE: dict[str, View] = {
    "se": View(_RESIDUAL, "squeezes", "arXiv 1709.01507", "squeeze-and-excitation of the residual"),
    "double_fc": View(_BOTH, "squeezes", _PAPER, "one hidden layer for each squeeze"),
    "pair_view_2x1": View(_BOTH, "picture", _PAPER, "convolution over each pair of squeezes", kernel=(1, 2)),
    "pair_view_1x1": View(_BOTH, "picture", _PAPER, "1x1 convolution over the pairs", kernel=(1, 1)),
    "folded_3x3": View(_BOTH, "picture", _PAPER, "3x3 convolution over the folded picture", kernel=(3, 3)),
    "static": View(
        (), "constant", "arXiv 2304.06345", "one learned number a channel, the same for all images", settings=("start",)
    ),
    "se_identity": View(_IDENTITY, "squeezes", _OURS, "SE that reads the identity only"),
    "se_sum": View(_BOTH, "squeezes", _OURS, "SE that reads the squeeze of residual + identity", mixed=True),
    "timm_se": View(_RESIDUAL, "maps", "arXiv 1709.01507", "timm's SEModule", settings=_HIDDEN),
    "timm_eca": View(
        _RESIDUAL,
        "maps",
        "arXiv 1910.03151",
        "timm's EcaModule: convolution over neighbouring channels",
        settings=("start",),
    ),
    "timm_ge": View(
        _RESIDUAL,
        "maps",
        "arXiv 1810.12348",
        "timm's GatherExcite, global extent: timm_se's function",
        settings=_HIDDEN,
    ),
    "timm_gc": View(
        _RESIDUAL, "maps", "arXiv 1904.11492", "timm's GlobalContext: squeeze weighted by attention", settings=_HIDDEN
    ),
    "timm_cbam": View(
        _RESIDUAL,
        "maps",
        "arXiv 1807.06521",
        "timm's CbamModule: channels, then positions",
        half=0.25,
        by_position=True,
        settings=_HIDDEN,
    ),
    "aff": View(
        _BOTH,
        "maps",
        "arXiv 2009.14082",
        "w residual + (1 - w) identity, w from context of their sum",
        by_position=True,
        settings=_HIDDEN,
    ),
}
"""Views by name."""

VIEWS = tuple(TABLE)
"""Names of the views; the first five are the paper's."""

PAPER_VIEWS = VIEWS[:5]
"""Plain SE, two separate squeezes, and the three that read a picture of both."""

STARTS = ("half", "one")
"""Where gates begin: at the logistic's 1/2, as in the paper, or at 1 by a fixed factor of 2 (fact 4)."""


def listed(form: str) -> str:
    """Names of the views of a form, with commas between."""
    return ", ".join(name for name, view in TABLE.items() if view.form == form)
