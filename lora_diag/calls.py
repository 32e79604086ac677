"""Calls from Python: errors name parameters instead of flags, and a list is not replaced by one
path or word.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, wraps
from inspect import signature
from numbers import Integral, Real
from types import UnionType
from typing import Any, get_args, get_origin

from lora_diag.errors import Given, LoradiagError, UsageError

# Type of a value, or of the entries of a list -> the values that it accepts, their name, and an
# example.
_NUMBERS: dict[Any, tuple[type, str, str]] = {
    int: (Integral, "whole number", "8"),
    float: (Real, "number", "0.5"),
}


@cache
def for_python(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a public function as Python calls it; a class is returned unchanged.

    Arguments that must be lists or numbers are checked before the call, and a ``LoradiagError``
    names parameters, where the command line names flags.
    """
    if isinstance(function, type):
        return function

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            _check_arguments(function, args, kwargs)
            return function(*args, **kwargs)
        except LoradiagError as error:
            error.in_python = True
            raise

    return call


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
        if value is not None:
            _check_argument(Given(name, value), _find_type(function, name))


def _find_type(function: Callable[..., Any], name: str) -> Any:
    """Return the type of a parameter, without None; None for a type that only checkers import."""
    annotation = signature(function).parameters[name].annotation
    if isinstance(annotation, str):
        try:
            annotation = eval(annotation, function.__globals__)
        except NameError:
            return None
    if not isinstance(annotation, UnionType):
        return annotation
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
    return kinds[0] if len(kinds) == 1 else None


def _check_argument(given: Given, kind: Any) -> None:
    """Refuse a value that is not of a type: a list, a list of numbers, or a number."""
    value = given.value
    if kind in _NUMBERS:
        accepted, noun, example = _NUMBERS[kind]
        if not isinstance(value, accepted):
            raise UsageError(given, f"must be a {noun}", f"give one such as {example}")
    elif get_origin(kind) in (Sequence, Iterable):
        (entry,) = get_args(kind)
        if entry not in _NUMBERS:
            if isinstance(value, str | os.PathLike):
                raise UsageError(given, "must be a list", f"give [{str(value)!r}]")
            return
        accepted, noun, example = _NUMBERS[entry]
        if not all(isinstance(each, accepted) for each in value):
            raise UsageError(given, f"must be a list of {noun}s", f"give one such as [{example}]")
