"""A block with another forward: of the same class as before for isinstance, deep-copied and pickled like any other."""

import importlib
import linecache
from types import ModuleType
from typing import Any, SupportsIndex

from torch import fx, nn

_count = 0


def replace_forward(block: nn.Module, graph: fx.Graph) -> None:
    """Give one block the forward that a graph describes, and leave its class, children and attributes as they are."""
    code = graph.python_code("self")
    block.__class__ = _converted_class(getattr(block, "_unconverted", type(block)), code.src, code.globals)


def _converted_class(original: type[nn.Module], source: str, names: dict[str, Any]) -> type[nn.Module]:
    """A subclass of the block's class, with the same name and the forward of ``source``."""
    global _count
    _count += 1
    file = f"<converted {original.__name__} {_count}>"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)  # for stack traces and debuggers
    namespace = dict(names)
    exec(compile(source, file, "exec"), namespace)

    def __reduce_ex__(self: nn.Module, protocol: SupportsIndex) -> tuple[Any, ...]:
        # The class is not to be found by name, neither by pickle nor by copy: build it again from the same text.
        known = {
            name: _Module(value.__name__) if isinstance(value, ModuleType) else value for name, value in names.items()
        }
        return _rebuild, (original, source, known), self.__dict__

    return type(
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


class _Module(str):
    """The name of a module, which itself cannot be copied."""


def _rebuild(original: type[nn.Module], source: str, known: dict[str, Any]) -> nn.Module:
    names = {
        name: importlib.import_module(value) if isinstance(value, _Module) else value for name, value in known.items()
    }
    converted = _converted_class(original, source, names)
    return converted.__new__(converted)
