"""The gates of a network as a file of their own, so that several sets of gates share one backbone.

A safetensors file of the gates' parameters and running statistics under their names in the network. Its header says how
each gate is made, so that a network without gates can be given them.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, cast

from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cmpe_se.conversion.convert import convert
from cmpe_se.conversion.shapes import tensor_like
from cmpe_se.errors import UserError
from cmpe_se.finetuning.gates import gates_of, own_name, scale_of, some_gates_of
from cmpe_se.finetuning.stripping import strip_gates
from cmpe_se.layers.attention import CompetitiveSE
from cmpe_se.networks.base import ResidualNetwork
from cmpe_se.networks.blocks import PreActBlock
from cmpe_se.utils.escaping import visible
from cmpe_se.utils.files import refuse_other_encodings, replaced, whole_path
from cmpe_se.utils.records import check_shape, parse_json
from cmpe_se.utils.tensor_files import load_tensors, misfit, not_finite, save_tensors
from cmpe_se.utils.text import in_one_line
from cmpe_se.utils.wrappers import unwrapped

_HEADER = "cmpe_se_gates"
"""Key of the description of the gates among the texts of a file."""
_FORMAT = 1
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x04", b"\x80\x05")
"""How files begin that torch.save and pickle write."""


class GateRecord(TypedDict):
    """How a gate is made."""

    channels: int
    view: str
    start: str
    hidden: int
    bias: bool
    maps: int | None
    picture: list[int] | None
    mask: float
    gain: float


class GatesRecord(TypedDict):
    """What the header says of a set of gates."""

    format: int
    version: str
    network: str
    gates: dict[str, GateRecord]


class _Set(NamedTuple):
    """A file that was read: class of its network, its gates on the meta device, and its tensors."""

    network: str
    gates: dict[str, CompetitiveSE]
    tensors: dict[str, Tensor]


def save_gates(model: nn.Module, path: str | Path) -> None:
    """Write the gates of a network, and nothing else of it, to a safetensors file.

    That is their parameters and running statistics in their own dtype, and in the header how each gate is made, the
    network's class, the version of this package, and a SHA-256 of all that. The file is written whole or not at all.

    Args:
        model: network with gates, converted or of this package; of a wrapped one the network inside.
        path: of the file, such as ``gates.safetensors``.

    Raises:
        UserError: no gates, a merged network, values that are not finite or not there (meta device, sharded), a file
            that cannot be written.
    """
    network = unwrapped(model)
    gates = some_gates_of(network)
    tensors = {f"{name}.{key}": tensor for name, gate in gates.items() for key, tensor in gate.state_dict().items()}
    _refuse_no_values(tensors)
    if name := not_finite(tensors):
        raise UserError(f"{visible(name)} holds values that are not finite; gates are saved when they are sound")
    from cmpe_se import __version__  # the package imports this module

    header: GatesRecord = {
        "format": _FORMAT,
        "version": __version__,
        "network": f"{type(network).__module__}.{type(network).__qualname__}",
        "gates": {name: _describe(gate) for name, gate in gates.items()},
    }
    file = whole_path(path)
    refuse_other_encodings(file)
    with replaced(file) as unfinished:
        try:
            save_tensors(tensors, unfinished, {_HEADER: json.dumps(header)})
        except SafetensorError as error:
            raise UserError(f"cannot write {file}: {in_one_line(error)}") from None


def load_gates(model: nn.Module, path: str | Path) -> nn.Module:
    """Give a network the gates of a file that :func:`save_gates` wrote.

    A network that has gates gets the numbers of the file in the place of its own; its parameters stay the same objects,
    so that an optimizer goes on with them. A network without gates gets gates at the places that the file names, in
    place, as :func:`convert` puts them there. (One that ``convert`` needs help with is converted first.) Either way the
    gates have the device and the dtype of the network. All is checked before anything changes.

    The file says nothing of the backbone's weights: load gates where the weights are those that they were trained with.

    Args:
        model: the network; of a wrapped one the network inside.
        path: of the file.

    Returns:
        The model that was given.

    Raises:
        UserError: no such file, a damaged one, or none of gates; gates of other places, views, sizes or channels than
            the network's; a merged network; a network that holds no values (meta device, sharded).
    """
    network = unwrapped(model)
    present = gates_of(network)
    file = whole_path(path)
    saved = _read(file)
    try:
        if present:
            _exchange(present, saved)
        else:
            _put_in(network, saved)
    except _Unfit as error:
        raise UserError(f"{file} does not fit {type(network).__name__}: {error}") from None
    return model


class _Unfit(Exception):
    """In what a set of gates does not fit a network."""


def _describe(gate: CompetitiveSE) -> GateRecord:
    return {
        "channels": gate.channels,
        "view": gate.view,
        "start": gate.start,
        "hidden": gate.hidden,
        "bias": gate.sizes.bias,
        "maps": gate.sizes.maps,
        "picture": list(gate.picture_size) if gate.picture_size else None,
        "mask": float(gate.mask),
        "gain": gate.gain,
    }


def _build(record: GateRecord, **factory: Any) -> CompetitiveSE:
    """The gate of a description.

    Raises:
        ValueError: there is no such gate.
    """
    picture = record["picture"]
    gate = CompetitiveSE(
        record["channels"],
        view=record["view"],
        start=record["start"],
        reduction=max(1, record["channels"]),  # leaves one unit, so that the other number decides
        min_hidden=record["hidden"],
        bias=record["bias"],
        mask=record["mask"],
        columns=picture[1] if picture else None,
        maps=record["maps"],
        **factory,
    )
    gate.gain = float(record["gain"])
    if any(record.get(key) != value for key, value in _describe(gate).items()):
        raise ValueError(f"no gate is {record}")
    return gate


def _read(path: Path) -> _Set:
    try:
        with path.open("rb") as file:
            if file.read(4).startswith(_PICKLES):
                raise UserError(f"{path} is a pickle or of torch.save; give a file that cmpe_se.save_gates wrote")
        tensors, texts = load_tensors(path)
        if _HEADER not in texts:
            raise UserError(f"{path} holds tensors, but no set of gates; give a file that cmpe_se.save_gates wrote")
        header = parse_json(texts[_HEADER])
        if isinstance(header, dict) and isinstance(version := header.get("format"), int) and version > _FORMAT:
            raise UserError(f"{path} is of a later version of cmpe-se ({header.get('version')}); update to read it")
        record: GatesRecord = check_shape(header, GatesRecord)
        gates = {name: _build(gate, device="meta") for name, gate in record["gates"].items()}
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RuntimeError) as error:  # the last one for sizes that no tensor has
        raise UserError(f"{path} cannot be read as a set of gates: {in_one_line(error)}") from None
    like: dict[str, Tensor] = {}
    for name, gate in gates.items():
        like |= {f"{name}.{key}": tensor for key, tensor in gate.state_dict().items()}
    # Shapes alone: gates of a network in half precision are saved in it.
    if reason := misfit(
        tensors, {key: tensor.to(tensors[key].dtype) if key in tensors else tensor for key, tensor in like.items()}
    ):
        raise UserError(f"{path} cannot be read as a set of gates: {visible(reason)}")
    if bad := not_finite(tensors):
        raise UserError(f"{path}: {visible(bad)} holds values that are not finite")
    return _Set(record["network"], gates, tensors)


def _exchange(present: dict[str, CompetitiveSE], saved: _Set) -> None:
    """Put the numbers of a set in the place of those that a network's gates have."""
    if missing := [name for name in saved.gates if name not in present]:
        raise _Unfit(f"the file has a gate {visible(missing[0])}, the network has none there")
    if left := [name for name in present if name not in saved.gates]:
        raise _Unfit(f"the network has a gate {left[0]}, the file has none for it")
    for name, gate in present.items():
        theirs, own = (cast(dict[str, Any], _describe(one)) for one in (saved.gates[name], gate))
        for key, value in own.items():
            if key != "mask" and theirs[key] != value:  # which acts in training alone
                raise _Unfit(
                    f"gate {name} has {key} {value}, the file's has {key} {theirs[key]}; cmpe_se.strip_gates takes the "
                    "network's own gates out first"
                )
    _copy(saved, present)


def _put_in(network: nn.Module, saved: _Set) -> None:
    """Give a network without gates those of a set, or leave it as it is."""
    blocks = {own_name(name): block for name, block in network.named_modules(remove_duplicate=False)}
    made: dict[str, CompetitiveSE] = {}
    ours: dict[str, nn.Module] = {}
    others: dict[str, nn.Module] = {}
    for name, gate in saved.gates.items():
        place, _, child = name.rpartition(".")
        if (block := blocks.get(place)) is None:
            raise _Unfit(f"it has no block {visible(place)} (the gates are of a {visible(saved.network)})")
        (ours if isinstance(block, PreActBlock) and child == "attention" else others)[name] = block
        like = tensor_like(block)
        made[name] = _build(_describe(gate), device=like.device, dtype=like.dtype).train(block.training)
    _copy(saved, made)
    for name, block in ours.items():
        _check_channels(name, saved.gates[name], cast(PreActBlock, block).last_conv.out_channels)
    if others:
        _convert(network, others, saved)
    for name, gate in made.items():
        setattr((ours | others)[name], name.rpartition(".")[2], gate)
    for block in ours.values():  # children in the order of a block that is made with a gate, as optimizers number them
        names = list(block._modules)
        for behind in names[names.index("drop_path") : -1]:
            block._modules[behind] = block._modules.pop(behind)
    if ours and isinstance(network, ResidualNetwork):
        network.view = next(iter(made.values())).view


def _convert(network: nn.Module, blocks: dict[str, nn.Module], saved: _Set) -> None:
    """Convert the blocks of some gates, and put the network back as it was where it then has others than the set's."""
    wanted = {id(block) for block in blocks.values()}
    try:
        # The view does not matter, since the set's gates take the place of these; this one takes any channels.
        convert(network, view="static", where=lambda _, block: id(block) in wanted, inplace=True)
    except UserError as error:
        raise _Unfit(f"{error} (convert the network first, then load the gates)") from None
    try:
        present = gates_of(network)
        for name in blocks:
            theirs, gate = saved.gates[name], present.get(name)
            if gate is None:
                raise _Unfit(f"convert puts no gate at {visible(name)}; convert the network first, then load the gates")
            _check_channels(name, theirs, gate.channels)
            if (there := scale_of(theirs)) != (here := scale_of(gate)):
                raise _Unfit(f"{name} is for a residual scaled by {there:g}, its block scales by {here:g}")
        if left := [name for name in present if name not in blocks]:
            raise _Unfit(f"{left[0]} would be a gate too, and the file has none for it")
    except _Unfit:
        strip_gates(network, inplace=True)
        raise


def _check_channels(name: str, gate: CompetitiveSE, channels: int) -> None:
    if gate.channels != channels:
        raise _Unfit(f"{visible(name)} is of {gate.channels} channels, its block has {channels}")


def _copy(saved: _Set, gates: dict[str, CompetitiveSE]) -> None:
    """Copy a set's numbers to gates like its own, in the device and dtype of those."""
    states = {f"{name}.{key}": tensor for name, gate in gates.items() for key, tensor in gate.state_dict().items()}
    _refuse_no_values(states)
    fitting = {name: saved.tensors[name].to(tensor.device, tensor.dtype) for name, tensor in states.items()}
    if name := not_finite(fitting):
        raise _Unfit(f"{visible(name)} is not finite in {str(fitting[name].dtype).removeprefix('torch.')}")
    for name, tensor in states.items():
        tensor.copy_(fitting[name])


def _refuse_no_values(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise UserError(f"{visible(name)} is on the meta device, where a tensor has no values")
        if isinstance(tensor, DTensor):
            raise UserError(f"{visible(name)} is sharded over processes; take the network before it is sharded")
