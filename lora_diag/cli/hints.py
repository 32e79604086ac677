"""The next command that is suggested below results."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Mapping
from typing import Any

from lora_diag.cli import output as out
from lora_diag.cli.project import find_shared_options
from lora_diag.errors import flag
from lora_diag.feature import Command, Feature, Hint
from lora_diag.running.options import EXECUTION


def find_hint(
    feature: Feature,
    command: Command,
    result: Any,
    values: Mapping[str, Any],
    given: Collection[str],
) -> str | None:
    """Return what the feature suggests for these results, else the first hint that applies; None
    without records.

    Args:
        feature: The feature of the command.
        command: The command that was run.
        result: What it returned.
        values: Its arguments and options.
        given: Names of the options that the user gave.
    """
    if hasattr(result, "layers") and not (result.layers or getattr(result, "whole", ())):
        return None
    suggested = feature.load(command.suggest)(result, values) if command.suggest else None
    if isinstance(suggested, str):
        return suggested
    hints = command.hints if suggested is None else (suggested, *command.hints)
    given_values = {name: values[name] for name in given if name in values}
    for hint in hints:
        words = _fill_in(hint, values)
        if words is None:
            continue
        if hint.command.startswith("-"):
            return f"{out.rerun_command(*words)}   ({hint.purpose})"
        words += _carry_options(command.name or feature.name, words, given_values)
        return f"{shlex.join(['loradiag', *words])}   ({hint.purpose})"
    return None


def _fill_in(hint: Hint, values: Mapping[str, Any]) -> list[str] | None:
    """Return the words of a hint; None if it needs a value that is not given, or adds one that is.

    >>> hint = Hint("plan {base} --ranks {ranks}", "costs")
    >>> _fill_in(hint, {"base": "my base", "ranks": 8})
    ['plan', 'my base', '--ranks', '8']
    >>> _fill_in(Hint("inspect {output}", "this table"), {"output": None})
    """
    if hint.saved and not values["output"]:
        return None
    words: list[str] = []
    for word in shlex.split(hint.command):
        match = re.fullmatch(r"\{(\w+)\}", word)
        value = values.get(match[1]) if match else word
        if not value:
            return None
        words += map(str, value) if isinstance(value, list | tuple) else [str(value)]
    if not hint.command.startswith("-"):
        return words
    is_layer_table = "--by" in words and values["per"] == "layer"
    is_saved = "-o" in words and values["output"] is not None
    return None if is_layer_table or is_saved else words


def _carry_options(command: str, words: list[str], given: Mapping[str, Any]) -> list[str]:
    """Return the options that the user gave and that change what the next command measures, too,
    except those that it has already.
    """
    carried = []
    for name, option in find_shared_options(command, words).items():
        value = given.get(name)
        if flag(name) in words or option.panel == EXECUTION or value in (None, False, [], ()):
            continue
        if value is True:
            carried.append(flag(name))
        elif isinstance(value, list | tuple) and "," in option.metavar:
            carried += [flag(name), ",".join(map(str, value))]
        else:
            for each in value if isinstance(value, list | tuple) else [value]:
                carried += [flag(name), str(each)]
    return carried
