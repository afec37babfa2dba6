"""Optional packages: the error for those that are missing, and silence from those that log at length."""

import importlib
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from cmpe_se.errors import MissingPackageError, UserError
from cmpe_se.utils.text import in_one_line, split_names

_TRAIN = {
    "accelerate": "accelerate",
    "docstring_parser": "docstring-parser",
    "jsonargparse": "jsonargparse",
    "matplotlib": "matplotlib",
    "rich": "rich",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "torchmetrics": "torchmetrics",
}
"""What the extra ``train`` installs, without what PyTorch and timm bring too: module to its name on PyPI."""


EXTRAS = {"report": "report", "prune": "prune", "explore": "explore", "export": "export"}
"""Extra of the package that a command needs, where it is not ``train``; each includes ``train``."""


def require(packages: tuple[str, ...], purpose: str, *, extra: str) -> None:
    """Raise MissingPackageError where a package that ``extra`` installs cannot be imported.

    Args:
        packages: names of modules.
        purpose: begins the sentence, such as "cmpe-se report".
        extra: of this package.
    """
    try:
        for package in packages:
            importlib.import_module(package)
    except ImportError:
        raise _missing(packages, purpose, extra) from None


def require_train(purpose: str, *, command: str | None = None) -> None:
    """Raise MissingPackageError where a package of the extra ``train``, which all commands need, is not installed.

    They are looked up and not imported, which would take seconds for some that the purpose may never use.

    Args:
        purpose: begins the sentence, such as "cmpe-se train" or "cmpe_se.evaluate".
        command: that the purpose is; the message names its extra.
    """
    if missing := [name for module, name in _TRAIN.items() if not is_installed(module)]:
        raise _missing(missing, purpose, EXTRAS.get(command or "", "train"))


def is_installed(module: str) -> bool:
    """Whether a module at the top level can be found."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # ValueError: a module that was made by hand, without a specification
        return module in sys.modules


def has_train() -> bool:
    """Whether the packages of the extra ``train`` are installed."""
    return all(map(is_installed, _TRAIN))


def _missing(packages: Sequence[str], purpose: str, extra: str) -> MissingPackageError:
    *others, last = packages
    names = f"{', '.join(others)} and {last}" if others else last
    return MissingPackageError(f"{purpose} needs {names}; pip install 'cmpe-se[{extra}]'")


def import_asked_for() -> None:
    """Import the modules that the environment's ``CMPE_SE_IMPORT`` names, such as one that adds a gate to the table.

    Commands do so at their start, and so do the runs of a comparison, which inherit the environment.

    Raises:
        UserError: one cannot be imported.
    """
    for name in split_names(os.environ.get("CMPE_SE_IMPORT", "")):
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever the module does
            raise UserError(
                f"CMPE_SE_IMPORT names {name}, which cannot be imported: {in_one_line(error)}; put the folder that it "
                "is in into PYTHONPATH"
            ) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Neither warnings nor log messages, whose readers are the authors of exporters."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
