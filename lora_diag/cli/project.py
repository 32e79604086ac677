"""The project file: names for paths, and defaults for options, so that neither is typed twice.

``loradiag.toml``, or ``[tool.loradiag]`` in ``pyproject.toml``; the first one in the current folder
or above it. ``[names]`` are written ``@NAME`` in any argument or option. ``[defaults]`` are options
by their names, for all commands that have them. The file only replaces what a user would type: it
cannot load a plugin, replace an output, or run anything, and ``gate`` takes nothing from it.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from lora_diag import catalog
from lora_diag.errors import UsageError, quote
from lora_diag.running.options import EXECUTION, INPUTS, OUTPUT, Option, list_options

FILE = "loradiag.toml"

# Largest file that is read, in bytes.
MAX_BYTES = 1_000_000

# Commands that take no defaults: what ``gate`` judges by stands on its command line, and ``lint``
# reads a training configuration.
WITHOUT_DEFAULTS = ("gate", "gate init", "lint")

# Options that belong to one run.
OF_ONE_RUN = {"resume", "verify", "dry_run", "yes", "plugins"}

# A word that stands for a named path, or for one in it; or the value of an option, or of NAME=PATH.
_NAMED = re.compile(r"((?:[^=@]*=)?)@([A-Za-z][\w-]*)(?:/(.*))?")

# What is not a path on this machine: an address, or the id of a model on the Hub.
_REMOTE = re.compile(r"[A-Za-z][\w+.-]*:/.*|[\w.-]+/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True)
class Project:
    """Names and defaults, of a project file or of earlier results.

    Args:
        path: The file; None without one.
        names: Paths by name, as they are typed in the current folder.
        defaults: Values of options, by command and option.
    """

    path: Path | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def find_project(folder: Path) -> Project | None:
    """Return the project file of a folder: in it, or in the nearest folder above that has one.

    None with ``LORADIAG_PROJECT=0``, as in CI: a file in a checkout must not change what is
    measured.

    Raises:
        UsageError: The file cannot be read, or names an unknown key, option or name.
    """
    if os.environ.get("LORADIAG_PROJECT") == "0":
        return None
    for place in (folder, *folder.parents):
        if (path := place / FILE).is_file():
            return _parse(path, _read_toml(path))
        path = place / "pyproject.toml"
        if path.is_file():
            tools = _read_toml(path).get("tool")
            if isinstance(tools, dict) and "loradiag" in tools:
                return _parse(path, tools["loradiag"])
    return None


def replace_names(words: Sequence[str], project: Project) -> list[str]:
    """Return words with paths in place of their names, ``@base`` or ``--eval=@task``.

    A word that is no name, such as ``./@base``, is unchanged, and so are those after ``--``.

    Raises:
        UsageError: A word names what the file does not.

    Example:
        >>> replace_names(
        ...     ["plan", "@base", "--data=@a"], Project(names={"base": "m", "a": "t.txt"})
        ... )
        ['plan', 'm', '--data=t.txt']
    """
    end = words.index("--") if "--" in words else len(words)
    named = [_replace_name(word, project.names, project.path) for word in words[:end]]
    return [*named, *words[end:]]


def _replace_name(word: str, names: Mapping[str, str], path: Path | None) -> str:
    match = _NAMED.fullmatch(word)
    if match is None:
        return word
    before, name, rest = match.groups()
    if name in names:
        return before + (str(Path(names[name], rest)) if rest else names[name])
    if path is None:
        raise UsageError(
            f"@{name}: no {FILE} in this folder or above it names it; write one with loradiag init"
        )
    raise UsageError(f"@{name}: {path} does not name it; {_list_known(name, names)}")


def follow_results(results: str, command: str, project: Project) -> Project:
    """Return the names of a project and of the inputs of earlier results, and the settings of the
    latter in place of the project's defaults.

    Only options that both commands have, with one meaning, are taken.

    Args:
        results: The results file.
        command: The command that takes them.
        project: The project.

    Raises:
        InputError: The file cannot be read, or contains no results.
    """
    run = catalog.read_results(results).run
    texts: dict[str, list[str]] = {}
    for each in run.inputs:
        texts.setdefault(each.role, []).append(each.path)
    taken = {}
    for name, option in find_shared_options(run.command, command.split()).items():
        if option.panel == EXECUTION:
            continue
        value = texts.get(name.rstrip("_"), run.settings.get(name))
        if isinstance(value, list) and "," in option.metavar:
            value = ",".join(map(str, value))
        if value not in (None, False, "", []):
            taken[name] = value
    names = {role: paths[0] for role, paths in texts.items()}
    return Project(Path(results), {**project.names, **names}, {command: taken})


def _list_known(name: str, known: Iterable[str]) -> str:
    """Return what to write in place of an unknown name: the nearest known one, or all."""
    known = list(known)
    if not known:
        return "add it"
    near = get_close_matches(name, known, n=1)
    return f"use {near[0]}" if near else f"use one of {', '.join(known)}"


def _read_toml(path: Path) -> dict[str, Any]:
    """Return the tables of a TOML file.

    Raises:
        UsageError: It is too long, cannot be read, or is not TOML.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UsageError(f"{path}: has more than {MAX_BYTES:,} bytes; shorten it")
        return tomllib.loads(content.decode("utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}; correct it") from error
    except (ValueError, RecursionError) as error:  # of tomllib, UTF-8, and too many digits
        raise UsageError(f"{path}: is not valid TOML: {error}; correct it") from error


def _parse(path: Path, tables: Any) -> Project:
    """Return a project from the tables of its file.

    Raises:
        UsageError: A table, a key or a value is invalid.
    """
    if not isinstance(tables, dict):
        raise UsageError(f"{path}: tool.loradiag must be a table; write [tool.loradiag.names]")
    for key, table in tables.items():
        if key not in {"names", "defaults"}:
            raise UsageError(
                f"{path}: {key}: is unknown; {_list_known(key, ['names', 'defaults'])}"
            )
        if not isinstance(table, dict):
            raise UsageError(f"{path}: {key}: must be a table; write [{key}]")
    names = {}
    for name, value in tables.get("names", {}).items():
        if not isinstance(value, str) or not value or not _NAMED.fullmatch(f"@{name}"):
            raise UsageError(
                f"{path}: names.{name}: must be a path under a name of letters, such as "
                f'base = "models/base", not {quote(value)}'
            )
        names[name] = _locate(value, path.parent)
    return Project(path, names, _list_defaults(path, tables.get("defaults", {}), names))


def _locate(value: str, folder: Path) -> str:
    """Return a path that is relative to a folder as it is typed in the current folder.

    An address stays as it is, and so does what may be the id of a model on the Hub, unless the
    folder has a file of that name.
    """
    ending = "/" if value.endswith("/") else ""
    local = folder / value
    if _REMOTE.fullmatch(value) and not local.exists():
        return value
    return os.path.relpath(local) + ending


def find_shared_options(command: str, words: Sequence[str]) -> dict[str, Option]:
    """Return the options that a command shares with the one that the words begin with, in one
    meaning, by name.
    """
    following = " ".join(words[:2])
    shared = {}
    for of_commands in _list_options().values():
        name, _, option = of_commands.get(following, of_commands.get(words[0], (None, None, None)))
        own = of_commands.get(command)
        if name and option and own and _meaning(own[2]) == _meaning(option):
            shared[name] = option
    return shared


def _list_defaults(
    path: Path, table: Mapping[str, Any], names: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Return the values of options by command.

    Raises:
        UsageError: An option is unknown, commands mean different things by it, or its value is of a
            wrong type.
    """
    options = _list_options()
    defaults: dict[str, dict[str, Any]] = {}
    for key, value in table.items():
        where = f"{path}: defaults.{key}"
        if key not in options:
            raise UsageError(f"{where}: no such option; {_list_known(key, options)}")
        if len({_meaning(option) for _, _, option in options[key].values()}) > 1:
            raise UsageError(
                f"{where}: means different things in {', '.join(options[key])}; give it on the "
                "command line"
            )
        for command, (name, kind, option) in options[key].items():
            typed = _type_value(value, kind, option, where, path, names)
            defaults.setdefault(command, {})[name] = typed
    return defaults


def _meaning(option: Option) -> tuple[str, str]:
    """Return what is equal for an option of several commands if they mean the same by it.

    Inputs of one kind may be described differently.
    """
    return option.metavar.split("]")[-1], "" if option.panel == INPUTS else option.help


@cache
def _list_options() -> dict[str, dict[str, tuple[str, Any, Option]]]:
    """Return, by an option's spelling and by command, each option that may have a default: its
    name, type and declaration.
    """
    options: dict[str, dict[str, tuple[str, Any, Option]]] = {}
    for command, feature, declared in catalog.commands():
        if command in WITHOUT_DEFAULTS:
            continue
        for group in declared.options:
            group = feature.load(group) if isinstance(group, str) else group
            for name, (kind, option) in list_options(group).items():
                if option.cli and option.panel != OUTPUT and name not in OF_ONE_RUN:
                    options.setdefault(name.rstrip("_"), {})[command] = (name, kind, option)
    return options


def _type_value(
    value: Any, kind: Any, option: Option, where: str, path: Path, names: Mapping[str, str]
) -> Any:
    """Return a value in the form in which the command line takes it.

    Raises:
        UsageError: It is of another type than the option.
    """
    described = str(kind)
    if "Sequence" in described:
        entries = value if isinstance(value, list) else [value]
        words = [_resolve(entry, described, path, names) for entry in entries]
        if any(isinstance(word, bool | dict | list) for word in words):
            raise UsageError(f"{where}: must be a list of single values, not {quote(value)}")
        return ",".join(map(str, words)) if "," in option.metavar else list(map(str, words))
    if option.metavar == "":
        if not isinstance(value, bool):
            raise UsageError(f"{where}: must be true or false, not {quote(value)}")
        return value
    if isinstance(value, bool | list | dict):
        raise UsageError(f"{where}: must be a single value, not {quote(value)}")
    if "str" not in described and isinstance(value, str):
        raise UsageError(f"{where}: must be a number, not {quote(value)}")
    if "str" not in described and "float" not in described and not isinstance(value, int):
        raise UsageError(f"{where}: must be a whole number, not {quote(value)}")
    try:
        option.checked(where.rpartition(".")[2], value)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    return _resolve(value, described, path, names)


def _resolve(value: Any, kind: str, path: Path, names: Mapping[str, str]) -> Any:
    """Return a value with the path of a name; a path is relative to the project file."""
    if not isinstance(value, str):
        return value
    if value.startswith("@"):
        return _replace_name(value, names, path)
    return _locate(value, path.parent) if "Path" in kind else value
