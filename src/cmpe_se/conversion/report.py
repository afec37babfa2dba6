"""Report of a conversion."""

from dataclasses import dataclass, field

from torch import nn

from cmpe_se.errors import UserError
from cmpe_se.layers.attention import CompetitiveSE
from cmpe_se.utils.cost import count_multiply_adds, count_parameters

_SKIPPED, _NOTES = "_cmpe_se_skipped", "_cmpe_se_notes"


@dataclass(frozen=True)
class Gate:
    """One converted addition.

    Args:
        block: name of the block.
        channels: of its residual and identity.
        view: how the gate reads the squeezes.
        picture: height and width of the picture, None for views without one.
        params: parameters added.
        macs: multiply-adds added, for one image.
    """

    block: str
    channels: int
    view: str
    picture: tuple[int, int] | None
    params: int
    macs: int


@dataclass(frozen=True)
class ConversionReport:
    """Blocks that have competition, and those that could have had it; ``print`` shows a table.

    Args:
        gates: what was converted.
        skipped: block to the reason why it was not.
        notes: block to what is unusual in how it was converted: another view, a changed source.
    """

    gates: tuple[Gate, ...]
    skipped: dict[str, str]
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def params(self) -> int:
        """Parameters added."""
        return sum(gate.params for gate in self.gates)

    @property
    def macs(self) -> int:
        """Multiply-adds added, for one image."""
        return sum(gate.macs for gate in self.gates)

    def __str__(self) -> str:
        width = max(len(gate.block) for gate in self.gates)
        lines = [f"{'block':{width}}  channels  view           picture  parameters  multiply-adds"]
        for gate in self.gates:
            picture = "x".join(map(str, gate.picture)) if gate.picture else "-"
            row = f"{gate.block:{width}}  {gate.channels:8}  {gate.view:13}  {picture:>7}"
            lines.append(f"{row}  {gate.params:10,}  {gate.macs:13,}")
        lines.append(f"{len(self.gates)} additions converted, {self.params:,} parameters, {self.macs:,} multiply-adds")
        lines += [f"note on {name or 'the network itself'}: {note}" for name, note in self.notes.items()]
        lines += [f"skipped {name or 'the network itself'}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def conversion_report(model: nn.Module) -> ConversionReport:
    """What :func:`cmpe_se.convert` converted in a network or in parts of it, and what it skipped and why.

    Raises:
        UserError: the network has not been converted.
    """
    gates = tuple(
        _describe(name.rpartition(".")[0], module)
        for name, module in model.named_modules()
        if isinstance(module, CompetitiveSE)
    )
    if not gates:
        raise UserError(f"{type(model).__name__} has no gates; cmpe_se.convert adds them")
    skipped, notes = (
        {
            f"{part}.{name}".strip("."): words
            for part, module in model.named_modules()
            for name, words in getattr(module, kept, {}).items()
        }
        for kept in (_SKIPPED, _NOTES)
    )
    return ConversionReport(gates, skipped, notes)


def remember(model: nn.Module, skipped: dict[str, str], notes: dict[str, str]) -> None:
    """Keep reasons and notes with the network, for its report."""
    setattr(model, _SKIPPED, skipped)
    setattr(model, _NOTES, notes)


def hand_on(converted: nn.Module, extractor: nn.Module) -> None:
    """Let what was made of a converted network's layers, such as a feature extractor, report on those it has."""
    if any(module is converted for module in extractor.modules()):
        return
    names = {id(module): name for name, module in extractor.named_modules()}
    for kept in (_SKIPPED, _NOTES):
        blocks = {id(converted.get_submodule(name)): words for name, words in getattr(converted, kept).items()}
        setattr(extractor, kept, {names[block]: words for block, words in blocks.items() if block in names})


def forget(model: nn.Module) -> None:
    """Forget what was kept for the report, wherever in the network it is."""
    for module in model.modules():
        for name in (_SKIPPED, _NOTES):
            vars(module).pop(name, None)


def _describe(block: str, gate: CompetitiveSE) -> Gate:
    one_pixel = (gate.channels, 1, 1)  # what the gate costs does not depend on the size of the maps
    macs = count_multiply_adds(gate, one_pixel, one_pixel)
    return Gate(block, gate.channels, gate.view, gate.picture_size, count_parameters(gate), macs)
