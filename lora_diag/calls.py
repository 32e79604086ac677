"""Calls from Python: errors name parameters instead of options, and a list is not replaced by one
path or word.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from functools import cache, wraps
from inspect import signature
from numbers import Integral, Real
from typing import Any

from lora_diag.errors import LoradiagError, UsageError
from lora_diag.running.options import Option

# An option in a message; in a command that the message suggests, options stay.
_OPTIONS = re.compile(r"loradiag [^;,)]*|(?<![\w-])(?:--[a-z][a-z-]*|-o)\b")

# A parameter that takes a list, and the type of its entries.
_LIST = re.compile(r"(?:collections\.abc\.)?(?:Sequence|Iterable)\[(.*)\](?: \| None)?")

# Type of an entry or a value -> the values that it accepts, their name, and an example.
_NUMBERS: dict[str, tuple[type, str, str]] = {
    "int": (Integral, "whole number", "8"),
    "float": (Real, "number", "0.5"),
}


@cache
def for_python(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a public function as Python calls it; a class is returned unchanged.

    Arguments that must be lists or numbers are checked before the call, and a ``LoradiagError``
    names parameters, where the command line names options.

    Args:
        function: A public function; its options are known if it is under ``show_options``.
    """
    if isinstance(function, type):
        return function
    options: Mapping[str, tuple[Any, Option]] = getattr(function, "options", {})
    names = {
        flag: name
        for name, (_, option) in options.items()
        for flag in option.flags or (option.flag(name),)
    }

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            _check_arguments(function, args, kwargs)
            return function(*args, **kwargs)
        except LoradiagError as error:
            error.args = (name_parameters(str(error), names),)
            raise

    return call


def name_parameters(message: str, names: Mapping[str, str]) -> str:
    """Return a message with parameters of Python in place of the options of a command.

    Args:
        message: The message.
        names: Parameter by option, where its name is not that of the option.

    Example:
        >>> name_parameters(
        ...     "--eval x.txt: is empty; give it text, or add --max-sequences",
        ...     {"--eval": "evaluate"},
        ... )
        'evaluate=x.txt: is empty; give it text, or add max_sequences'
        >>> name_parameters("give a file with -o; loradiag plan base --ranks 4", {})
        'give a file with output; loradiag plan base --ranks 4'
    """
    names = {"-o": "output", **names}

    def name(match: re.Match[str]) -> str:
        word = match[0]
        return (
            word
            if word.startswith("loradiag")
            else names.get(word, word.lstrip("-").replace("-", "_"))
        )

    return _OPTIONS.sub(name, re.sub(r"^(--[a-z][a-z-]*|-o) (?=[^:;]+: )", r"\1=", message))


def _check_arguments(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Refuse one path or word in place of a list, and what is no number in place of numbers.

    Raises:
        UsageError: An argument is not of the declared type.
    """
    declared = signature(function)
    try:
        given = declared.bind(*args, **kwargs).arguments
    except TypeError:  # the function's own error is more precise
        return
    for name, value in given.items():
        annotation = declared.parameters[name].annotation
        kind = annotation.__name__ if isinstance(annotation, type) else str(annotation)
        if (match := _LIST.fullmatch(kind)) is None:
            accepted, noun, example = _NUMBERS.get(kind.removesuffix(" | None"), (object, "", ""))
            if not isinstance(value, accepted | None if kind.endswith("None") else accepted):
                raise UsageError(f"{name}={value!r}: must be a {noun}, such as {example}")
        elif match[1] in _NUMBERS:
            accepted, noun, example = _NUMBERS[match[1]]
            if value is not None and not all(isinstance(entry, accepted) for entry in value):
                raise UsageError(
                    f"{name}={value!r}: must be a list of {noun}s, such as [{example}]"
                )
        elif isinstance(value, str | os.PathLike):
            raise UsageError(f"{name}={str(value)!r}: must be a list; give [{str(value)!r}]")
