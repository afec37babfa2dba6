"""Templates of pages, into which text from outside can be put as it is."""

from typing import TYPE_CHECKING, Any

from cmpe_se.utils.escaping import visible

if TYPE_CHECKING:
    from jinja2 import Environment


def html_environment() -> "Environment":
    """jinja's environment that escapes HTML in all text, and shows what is hidden in it, as :func:`visible` does."""
    from jinja2 import Environment  # a package of the extras report and explore

    return Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_finalize)


def _finalize(value: Any) -> Any:
    return visible(value) if type(value) is str else value  # not Markup, which is safe already
