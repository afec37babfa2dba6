"""A block with another forward: of the same class as before for isinstance, deep-copied and pickled like any other."""

import importlib
import inspect
import linecache
from collections.abc import Mapping
from itertools import count
from types import ModuleType
from typing import Any, SupportsIndex

from torch import fx, nn

from cmpe_se.conversion.calls import original_class, own_forward_again, why_block_stays
from cmpe_se.conversion.source import compiled
from cmpe_se.errors import UserError

_made: dict[tuple[type[nn.Module], str], list[tuple[dict[str, Any], type[nn.Module]]]] = {}
"""Classes by the original class and the text of their forward, with the names that the text uses."""
_rewritten: dict[tuple[type[nn.Module], tuple[tuple[str, str], ...]], type[nn.Module]] = {}
"""Classes by the original class and the text of their methods."""
_number = count(1)


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
    return _converted_class(original_class(block), code.src, code.globals)


def replace_methods(block: nn.Module, methods: Mapping[str, str]) -> None:
    """Give one block methods of another source, and leave all else as it is.

    Raises:
        UserError: calling the block would not run them. The block is left as it was.
    """
    if reason := why_block_stays(block):
        raise UserError(f"the methods of a {type(block).__name__} cannot be exchanged: {reason}")
    own_forward_again(block)
    block.__class__ = with_methods(block, methods)


def with_methods(block: nn.Module, methods: Mapping[str, str]) -> type[nn.Module]:
    """The class that a block takes to have methods of another source."""
    return _rewritten_class(original_class(block), tuple(sorted(methods.items())))


def is_rewritten(block: nn.Module) -> bool:
    """Whether a block has methods of another source: what they do besides their output is no part of a graph."""
    return type(block) in _rewritten.values()


def _converted_class(original: type[nn.Module], source: str, names: dict[str, Any]) -> type[nn.Module]:
    """A subclass of the block's class, with the same name and the forward of ``source``; one for all copies."""
    made = _made.setdefault((original, source), [])
    for known, converted in made:
        if known.keys() == names.keys() and all(_same(value, names[name]) for name, value in known.items()):
            return converted
    file = _remember(original, source)
    namespace = dict(names)
    exec(compile(source, file, "exec"), namespace)

    def __reduce_ex__(self: nn.Module, protocol: SupportsIndex) -> tuple[Any, ...]:
        # The class is not to be found by name, neither by pickle nor by copy: build it again from the same text.
        known = {
            name: _Module(value.__name__) if isinstance(value, ModuleType) else value for name, value in names.items()
        }
        return _rebuild, (original, source, known), self.__getstate__()

    converted = _subclass(original, {"__reduce_ex__": __reduce_ex__, "forward": namespace["forward"]})
    made.append((names, converted))
    return converted


def _rewritten_class(original: type[nn.Module], methods: tuple[tuple[str, str], ...]) -> type[nn.Module]:
    """A subclass of the block's class, with the same name and methods of another source; one for all copies."""
    if converted := _rewritten.get((original, methods)):
        return converted

    def __reduce_ex__(self: nn.Module, protocol: SupportsIndex) -> tuple[Any, ...]:
        return _rebuild_rewritten, (original, methods), self.__getstate__()

    functions = {
        name: compiled(source, inspect.getattr_static(original, name), original, _remember(original, source))
        for name, source in methods
    }
    converted = _rewritten[original, methods] = _subclass(original, {"__reduce_ex__": __reduce_ex__, **functions})
    return converted


def _subclass(original: type[nn.Module], members: dict[str, Any]) -> type[nn.Module]:
    names = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(original.__name__, (original,), {**names, "_unconverted": original, **members})


def _remember(original: type[nn.Module], source: str) -> str:
    """Keep a source for stack traces and debuggers; returns the name of its file."""
    file = f"<converted {original.__name__} {next(_number)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    return file


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


def _rebuild_rewritten(original: type[nn.Module], methods: tuple[tuple[str, str], ...]) -> nn.Module:
    converted = _rewritten_class(original, methods)
    return converted.__new__(converted)
