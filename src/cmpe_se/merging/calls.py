"""Which layers a network calls where: what may be folded is what is called once, and read in no other way."""

from collections import Counter, defaultdict
from typing import Any, NamedTuple, TypeGuard

from timm.layers import DropPath
from torch import Tensor, fx, nn
from torchvision.ops import StochasticDepth

from cmpe_se.conversion.recording import Recording
from cmpe_se.layers.hooks import is_unaltered, is_watched, says_what_it_does
from cmpe_se.networks.blocks import PreActBlock

_NOTHING_IN_EVAL = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, DropPath, StochasticDepth)


class _FlatTracer(fx.Tracer):
    """Traces one module with its children as leaves, but looks into sequences, and notes which."""

    proxy_buffer_attributes = True  # a buffer that a forward reads is to be seen in the graph

    def __init__(self) -> None:
        super().__init__()
        self.looked_into: set[int] = set()

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        if _has_own_call(module):
            raise TypeError(f"what {name} does around its forward would be traced into the one that calls it")
        if not is_sequence(module) or is_watched(module):
            return True
        self.looked_into.add(id(module))
        return False


def _has_own_call(module: nn.Module) -> bool:
    ancestors = type(module).__mro__
    return not is_unaltered(module) and any(
        "__call__" in vars(kind) for kind in ancestors[: ancestors.index(nn.Module)]
    )


def is_sequence(module: nn.Module) -> bool:
    """Whether a module hands its input from child to child, and does nothing else."""
    forward = getattr(type(module), "forward", None)  # TorchScript's classes have none
    return forward is nn.Sequential.forward and runs_its_class(module)


def runs_its_class(module: nn.Module) -> bool:
    """Whether a call runs the forward of the module's class, which is what torch.fx traces."""
    return vars(module).keys().isdisjoint(("forward", "_call_impl"))


def _trace(module: nn.Module) -> tuple[fx.Graph | None, set[int]]:
    """A module's forward, None where torch.fx cannot trace it, and the sequences inside it that were looked into."""
    tracer = _FlatTracer()
    if not runs_its_class(module):
        return None, set()
    try:
        return tracer.trace(module), tracer.looked_into
    except Exception:  # whatever a forward does with a proxy
        return None, set()


def _called_whole(sequence: nn.Module, recording: Recording) -> bool:
    """Whether a run called a sequence, and its layers as often as that: nothing else calls them."""
    calls = recording.count(sequence)
    return calls > 0 and all(recording.count(layer) == calls for layer in sequence.children())


class Call(NamedTuple):
    """One call of a layer, in the traced forward of a module."""

    block: nn.Module
    node: fx.Node


class Calls:
    """All calls of a network's layers that can be known, each module's forward traced once.

    A sequence that no traced forward calls may be walked through by its parent, which reads what each layer puts out.
    The forwards of our own blocks are known. Where a forward cannot be traced, a run on the meta device shows which
    layers it calls itself, and which sequences it calls whole.

    Args:
        model: network in eval mode. A child may later be replaced under its name by another that is called alike.
    """

    def __init__(self, model: nn.Module):
        self._names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
        self._calls: dict[int, list[Call]] = defaultdict(list)
        self._read: set[int] = set()  # tensors and modules that a forward reads by itself
        self._graphs: dict[int, fx.Graph | None] = {}
        self.normed: list[tuple[nn.Module, nn.Module]] = []
        """Convolutions and the norms that alone read what they put out."""
        looked_into: set[int] = set()
        uncalled = []
        for module in model.modules():  # parents come first
            if is_known_block(module):
                names = module.normed_convolutions
                self.normed += [(module.get_submodule(conv), module.get_submodule(norm)) for conv, norm in names]
                continue
            walked = is_sequence(module) and module is not model and id(module) not in self._calls
            single = is_unaltered(module) or not any(True for _ in module.children())
            if single or id(module) in looked_into:
                continue
            if walked:
                uncalled.append(module)
            else:
                looked_into |= self._look_at(module)
        if None in self._graphs.values():
            recording = Recording(model)
            for sequence in uncalled:
                if id(sequence) not in looked_into and _called_whole(sequence, recording):
                    looked_into |= self._look_at(sequence)
            self._look_at_run(recording)
        for calls in self._calls.values():
            self.normed += [pair for call in calls if (pair := self._normed(call))]

    def _look_at(self, module: nn.Module) -> set[int]:
        """Note the calls in a module's forward; the sequences inside it that were looked into."""
        graph, inside = _trace(module)
        self._graphs[id(module)] = graph
        for node in graph.nodes if graph else ():
            self._note(module, node)
        return inside

    def _note(self, block: nn.Module, node: fx.Node) -> None:
        if node.op == "call_module":
            self._calls[id(block.get_submodule(str(node.target)))].append(Call(block, node))
        elif node.op == "get_attr" and "." in str(node.target):  # what is not its own
            value: Any = block
            for name in str(node.target).split("."):
                value = getattr(value, name)
            self._read |= {id(part) for part in value.modules()} if isinstance(value, nn.Module) else {id(value)}

    def _look_at_run(self, recording: Recording) -> None:
        """Find the layers that are called from a forward which could not be traced: in a run they are called too often.

        Their tensors count as read by something else than the calls that are known.
        """
        for calls in self._calls.values():
            known = sum(recording.count(call.block) for call in calls)
            layer = calls[0].block.get_submodule(str(calls[0].node.target))
            if recording.count(layer) > known:
                self._read.add(id(layer))

    def _normed(self, call: Call) -> tuple[nn.Module, nn.Module] | None:
        """The layer that is called, and the one that alone reads what it puts out; None where there is none."""
        if len(call.node.users) != 1:
            return None
        reader = next(iter(call.node.users))
        if reader.op != "call_module" or reader.args != (call.node,) or reader.kwargs:
            return None
        layers = [call.block.get_submodule(str(node.target)) for node in (call.node, reader)]
        once = all(len(self._calls[id(layer)]) == 1 for layer in layers)
        return (layers[0], layers[1]) if once else None

    def graph(self, module: nn.Module) -> fx.Graph | None:
        """The module's forward in eval mode, its children as leaves; None where it could not be traced."""
        return self._graphs.get(id(module))

    def once(self, layer: nn.Module) -> bool:
        """Whether a layer has one call that is known, or one that is hidden in a forward that is not."""
        return len(self._calls.get(id(layer), ())) <= 1

    def is_own(self, layer: nn.Module) -> bool:
        """Whether a layer has one name and plain tensors, and no forward reads these except by calling the layer."""
        tensors = [*layer.parameters(), *layer.buffers()]
        plain = all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)
        read = not self._read.isdisjoint({id(layer), *map(id, tensors)})
        return plain and not read and self.has_one_name(layer)

    def is_read(self, tensor: Tensor) -> bool:
        """Whether a forward reads a tensor of another module, by that module's name."""
        return id(tensor) in self._read

    def has_one_name(self, module: nn.Module) -> bool:
        """Whether a module stands at one place of the network."""
        return self._names[id(module)] == 1


def is_known_block(module: nn.Module) -> TypeGuard[PreActBlock]:
    """Whether a module is a block of our own networks, with the forward that we wrote."""
    return isinstance(module, PreActBlock) and is_unaltered(module)


def passes_on(module: nn.Module) -> bool:
    """Whether a layer puts out its input."""
    return isinstance(module, _NOTHING_IN_EVAL) and says_what_it_does(module) and not module.training
