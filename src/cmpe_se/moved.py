"""Old names, which lead to the new ones with a warning: module paths of 0.1.0, and parameters of functions.

``from cmpe_se.views import TABLE`` gives the objects of ``cmpe_se.layers.views``, not copies of them.
"""

import functools
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar, cast

_Function = TypeVar("_Function", bound=Callable[..., Any])

MOVED = {
    "addition": "layers.gated_addition",
    "attention": "layers.attention",
    "benchmarking": "commands.benchmark",
    "checkpoint": "training.checkpoint",
    "comparing": "commands.compare",
    "config": "training.config",
    "corruptions": "data.corruptions",
    "cost": "utils.cost",
    "evaluation": "commands.evaluate",
    "explorer": "commands.explore",
    "exporting": "commands.export",
    "folding": "layers.folding",
    "listing": "commands.models",
    "maps": "layers.averaged_maps",
    "prediction": "commands.predict",
    "reference": "networks.reference",
    "reporting": "commands.report",
    "robustness": "training.robustness",
    "run_folder": "training.run_folder",
    "sharing": "commands.push",
    "views": "layers.views",
}
"""Old module path to the new one, both below ``cmpe_se``; what lies below an old one follows it."""


class _MovedFinder:
    """Import hook for the paths in :data:`MOVED`, and for nothing else."""

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, rest = name.partition(".")
        old, *below = rest.split(".")
        if package != "cmpe_se" or old not in MOVED:
            return None
        return ModuleSpec(name, cast(Loader, cls), origin=".".join([package, MOVED[old], *below]))

    @staticmethod
    def create_module(spec: ModuleSpec) -> None:
        """Leave the empty module to Python: it is replaced by the real one."""

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        old, new = module.__name__, str(cast(ModuleSpec, module.__spec__).origin)
        warnings.warn(f"{old} is {new} now", DeprecationWarning, stacklevel=2)
        sys.modules[old] = import_module(new)


def install() -> None:
    """Put the hook before Python's own finders, which would import what lies below an old path a second time."""
    if _MovedFinder not in sys.meta_path:
        sys.meta_path.insert(0, _MovedFinder)


def renamed_parameters(**names: str) -> Callable[[_Function], _Function]:
    """Let a function take parameters under their old names as well, ``old="new"``, with a DeprecationWarning.

    A function of the command line takes the old flags too: :mod:`cmpe_se.cli` reads ``renamed`` from it.
    """

    def decorate(function: _Function) -> _Function:
        @functools.wraps(function)
        def with_old_names(*args: Any, **settings: Any) -> Any:
            for old in settings.keys() & names.keys():
                new = names[old]
                if new in settings:
                    raise TypeError(f"{function.__name__}() got {old} and {new}; {old} is {new} now")
                warnings.warn(f"{old} is {new} now", DeprecationWarning, stacklevel=2)
                settings[new] = settings.pop(old)
            return function(*args, **settings)

        setattr(with_old_names, "renamed", names)  # noqa: B010 (a function has no such attribute to mypy)
        return cast(_Function, with_old_names)

    return decorate


def renamed(function: Callable[..., Any]) -> dict[str, str]:
    """Old names of a function's parameters, to the new ones."""
    return getattr(function, "renamed", {})
