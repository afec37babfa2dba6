"""The optional packages of exporting, and silence from all that speak at length."""

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from cmpe_se.errors import UserError


def require(packages: tuple[str, ...], purpose: str, *, extra: str = "export") -> None:
    """Raise UserError where a package that ``extra`` installs cannot be imported; ``purpose`` begins the sentence."""
    try:
        for package in packages:
            importlib.import_module(package)
    except ImportError:
        *others, last = packages
        names = f"{', '.join(others)} and {last}" if others else last
        raise UserError(f"{purpose} needs {names}; pip install 'cmpe-se[{extra}]'") from None


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
