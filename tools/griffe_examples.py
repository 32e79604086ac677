"""An extension of Griffe that completes docstrings and signatures of the API page.

The section ``Example:`` is read as ``Examples:``, so that it is shown as code. The options that a
docstring describes, of a function with ``**options: Unpack[...]``, get their types and defaults.
"""

from __future__ import annotations

import re
from importlib import import_module
from inspect import Parameter, formatannotation, signature
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Complete every docstring, and the signatures of functions with groups of options."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """Rename the section in the docstring of an object."""
        if obj.docstring:
            obj.docstring.value = re.sub(
                r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE
            )

    def on_function(self, *, func: Any, **_: Any) -> None:
        """Add the options that the docstring describes to the parameters, as they are when the
        function is called.
        """
        if not (func.parent.is_module and func.docstring and "**options: " in func.docstring.value):
            return
        described = re.findall(r"^    (\w+): ", func.docstring.value, flags=re.MULTILINE)
        real = signature(getattr(import_module(func.parent.path), func.name)).parameters
        *own, rest = func.parameters
        kept = {each.name for each in own}
        added = [option(real[name]) for name in described if name in real and name not in kept]
        func.parameters = griffe.Parameters(*own, *added, rest)
        func.docstring.value = re.sub(
            r"^ *\*\*options: .*\n", "", func.docstring.value, flags=re.MULTILINE
        )


def option(real: Parameter) -> griffe.Parameter:
    """Return an option as a keyword, its type without the names of modules."""
    kind = (
        real.annotation if isinstance(real.annotation, str) else formatannotation(real.annotation)
    )
    short = re.sub(r"\b(?:\w+\.)+(?=\w)", "", kind)
    default = None if real.default is Parameter.empty else repr(real.default)
    return griffe.Parameter(
        real.name,
        annotation=short,
        kind=griffe.ParameterKind.keyword_only,
        default=default,
        docstring=None,
    )
