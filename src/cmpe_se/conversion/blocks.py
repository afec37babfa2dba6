"""A block with another forward: of the same class as before for isinstance, deep-copied and pickled like any other."""

import importlib
import linecache
from types import ModuleType
from typing import Any, SupportsIndex

from torch import fx, nn

from cmpe_se.conversion.calls import own_forward_again, why_block_stays
from cmpe_se.errors import UserError

_made: dict[tuple[type[nn.Module], str], list[tuple[dict[str, Any], type[nn.Module]]]] = {}
"""Classes by the original class and the text of their forward, with the names that the text uses."""


def replace_forward(block: nn.Module, graph: fx.Graph) -> None:
    """Give one block the forward that a graph describes, and leave its class, children and attributes as they are.

    Raises:
        UserError: calling the block would not run that forward. The block is left as it was.
    """
    if reason := why_block_stays(block):
        raise UserError(f"the forward of a {type(block).__name__} cannot be exchanged: {reason}")
    if isinstance(block, fx.GraphModule):
        block.graph = graph
        return
    own_forward_again(block)
    block.__class__ = with_forward(block, graph)


def with_forward(block: nn.Module, graph: fx.Graph) -> type[nn.Module]:
    """The class that a block takes to have the forward of a graph."""
    code = graph.python_code("self")
    return _converted_class(vars(type(block)).get("_unconverted", type(block)), code.src, code.globals)


def _converted_class(original: type[nn.Module], source: str, names: dict[str, Any]) -> type[nn.Module]:
    """A subclass of the block's class, with the same name and the forward of ``source``; one for all copies."""
    made = _made.setdefault((original, source), [])
    for known, converted in made:
        if known.keys() == names.keys() and all(_same(value, names[name]) for name, value in known.items()):
            return converted
    number = sum(map(len, _made.values())) + 1
    file = f"<converted {original.__name__} {number}>"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)  # for stack traces and debuggers
    namespace = dict(names)
    exec(compile(source, file, "exec"), namespace)

    def __reduce_ex__(self: nn.Module, protocol: SupportsIndex) -> tuple[Any, ...]:
        # The class is not to be found by name, neither by pickle nor by copy: build it again from the same text.
        known = {
            name: _Module(value.__name__) if isinstance(value, ModuleType) else value for name, value in names.items()
        }
        return _rebuild, (original, source, known), self.__getstate__()

    converted = type(
        original.__name__,
        (original,),
        {
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "__reduce_ex__": __reduce_ex__,
            "_unconverted": original,
            "forward": namespace["forward"],
        },
    )
    made.append((names, converted))
    return converted


def _same(one: Any, other: Any) -> bool:
    return one is other or one == other or (one != one and other != other)  # torch.fx gives every forward the name nan


class _Module(str):
    """The name of a module, which itself cannot be copied."""


def _rebuild(original: type[nn.Module], source: str, known: dict[str, Any]) -> nn.Module:
    names = {
        name: importlib.import_module(value) if isinstance(value, _Module) else value for name, value in known.items()
    }
    converted = _converted_class(original, source, names)
    return converted.__new__(converted)
