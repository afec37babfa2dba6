"""Sphinx roles in docstrings, such as ``:func:`cmpe_se.convert```, as code: mkdocstrings does not know them."""

import re

from griffe import Extension, Object

_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`~?([^`]+)`")


class Roles(Extension):
    """Rewrites each docstring as it is loaded."""

    def on_instance(self, *, obj: Object, **_) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = _ROLE.sub(r"`\1`", obj.docstring.value)
