"""A training configuration as a table of values, from JSON, YAML or a Trainer's
``training_args.bin``.

The files are from other people. Nothing in them is run, and their size, depth and repetitions are
limited before their values are built, so that reading takes seconds. A setting is read with the
type that it must have: another one is an error that names its key.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lora_diag.adapters.source import is_number
from lora_diag.errors import InputError, damaged, quote
from lora_diag.files import open_regular
from lora_diag.storage.documents import read_object
from lora_diag.storage.file_bytes import FileBytes
from lora_diag.storage.inert import PickledObject
from lora_diag.storage.parts import Archive

# Bytes of a configuration in JSON or training_args.bin, which has about 6 kB: a rank for each layer
# takes some 100 kB.
MAX_BYTES = 1_000_000
# Bytes of YAML, of which published recipes have at most 21 kB: PyYAML without libyaml takes 3 s for
# as many.
MAX_YAML_BYTES = 100_000
# Tables and lists in each other, and aliases: 8 make a file at most 18 times as large.
MAX_DEPTH, MAX_ALIASES = 32, 8

# Longest text that is the name of something, and largest whole number of steps or tokens.
MAX_TEXT, MAX_WHOLE = 200, 2**31
# Longest list of a pickle, whose lists can be shared.
MAX_LIST = 1_000

# What PyYAML raises for a value that is not of its tag, such as ``!!bool maybe``.
_INVALID = (ValueError, LookupError, AttributeError, OverflowError, TypeError)


@dataclass(frozen=True)
class Values:
    """The settings in a file; a setting of a nested table has the key ``outer.inner``.

    Args:
        path: The file, for messages.
        table: The settings.
    """

    path: Path
    table: Mapping[str, Any]

    @staticmethod
    def read(path: Path) -> Values:
        """Return the settings in a file."""
        if path.suffix == ".bin":
            values = _read_arguments(path)
        elif path.suffix == ".json":
            values = read_object(path, "training configuration", MAX_BYTES)
        else:
            values = _read_yaml(path)
        table = {key: value for key, value in values.items() if isinstance(key, str)}
        inner_tables = {key: value for key, value in table.items() if isinstance(value, dict)}
        for key, inner_table in inner_tables.items():
            table |= {
                f"{key}.{inner}": value
                for inner, value in inner_table.items()
                if isinstance(inner, str)
            }
        return Values(path, table)

    def get(self, key: str) -> Any:
        """Return a value of any type; None without one."""
        return self.table.get(key)

    def number(
        self, key: str, least: float = -float("inf"), most: float = float("inf")
    ) -> float | None:
        """Return a number, also one that YAML reads as text (``2e-5``); None if it is left open.

        Raises:
            InputError: It is no finite number in the range.
        """
        value = number = self.get(key)
        if _is_open(value):
            return None
        if isinstance(value, str):
            try:
                number = float(value)
            except ValueError:
                number = None
        if not is_number(number) or not least <= number <= most:
            allowed = (
                f"a number from {least:g} to {most:g}" if abs(most) < float("inf") else "a number"
            )
            raise self._invalid(key, allowed)
        return number

    def whole(self, key: str) -> int | None:
        """Return a whole number; None as in ``number``.

        Raises:
            InputError: It is no whole number of at most ``MAX_WHOLE``.
        """
        number = self.number(key)
        if number is None:
            return None
        if number != int(number) or abs(number) > MAX_WHOLE:
            raise self._invalid(key, "a whole number of at most 2^31")
        return int(number)

    def text(self, key: str, default: str | None = None) -> str | None:
        """Return a text, the default if it is null, empty or ``false``; None for a reference.

        Raises:
            InputError: It is no text, or longer than ``MAX_TEXT``.
        """
        value = self.get(key)
        if value in (None, "", False):
            return default
        if _is_reference(value):
            return None
        if not isinstance(value, str) or len(value) > MAX_TEXT:
            raise self._invalid(key, f"a text of at most {MAX_TEXT} characters")
        return value

    def flag(self, key: str) -> bool | None:
        """Return whether a setting is on, also one that is given as text; None if it is left open.

        Raises:
            InputError: It is neither true nor false, nor 1 nor 0.
        """
        value = self.get(key)
        if _is_open(value):
            return None
        word = value.lower() if isinstance(value, str) else value
        if word in ("true", "false"):
            return bool(word == "true")
        if word not in (False, True):
            raise self._invalid(key, "true or false")
        return bool(word)

    def names(self, key: str) -> list[str] | str | None:
        """Return a list of names, or the text that stands for it; None for null.

        Raises:
            InputError: It is neither a text nor a list of texts.
        """
        value = self.get(key)
        if value is None or isinstance(value, str):
            return value
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._invalid(key, "a name or a list of names")
        return value

    def has(self, *keys: str) -> bool:
        """Return whether one of these settings is given and not off, whatever its type."""
        return any(self.get(key) for key in keys)

    def _invalid(self, key: str, allowed: str) -> InputError:
        return damaged(
            self.path, f"{key} must be {allowed}, not {quote(self.get(key))}", "correct it"
        )


def _is_open(value: Any) -> bool:
    """Return whether a value does not say what the setting is: null, ``auto`` or a reference."""
    return value is None or value == "auto" or _is_reference(value)


def _is_reference(value: Any) -> bool:
    """Return whether a value stands for that of another key, as torchtune's configurations have
    them.
    """
    return isinstance(value, str) and value.startswith("${")


def _read_arguments(path: Path) -> dict[Any, Any]:
    """Return a Trainer's arguments; for a value that is not plain, its type.

    A word of an enum is a record with one argument. Lists of a pickle can share their items, so
    that one of 600 bytes has 10⁹ leaves: only short lists of plain values are kept.

    Raises:
        InputError: The file cannot be read, is too large, or holds something else.
    """
    file = FileBytes(path)
    if file.size > MAX_BYTES:
        raise _too_large(path, MAX_BYTES)
    content = Archive(file).value
    state = content.state if isinstance(content, PickledObject) else content
    if not isinstance(state, dict):
        raise damaged(path, "holds no arguments of a Trainer", "remove it, or copy it again")
    arguments = {}
    for key, value in state.items():
        plain = value.args[0] if isinstance(value, PickledObject) and value.args else value
        arguments[key] = plain if _is_plain(plain) or _is_plain_list(plain) else type(plain)
    return arguments


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def _is_plain_list(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MAX_LIST and all(map(_is_plain, value))


def _too_large(path: Path, limit: int) -> InputError:
    return damaged(
        path, f"is larger than {limit:,} bytes, too large for a configuration", "check the path"
    )


def _read_yaml(path: Path) -> dict[Any, Any]:
    """Return the table in a YAML file, by the safe loader.

    Raises:
        InputError: The file cannot be read, is too large, repeats a key, or holds no table.
    """
    try:
        with open_regular(path) as file:
            text = file.read(MAX_YAML_BYTES + 1)
        if len(text) > MAX_YAML_BYTES:
            raise _too_large(path, MAX_YAML_BYTES)
        loader = _make_loader()
        _check_structure(yaml.parse(text, loader))
        values = yaml.load(text, loader)
    except OSError as error:
        problem = (
            "no such file"
            if isinstance(error, FileNotFoundError)
            else f"cannot be read: {error.strerror}"
        )
        raise damaged(path, problem, "check the path") from error
    except (yaml.YAMLError, *_INVALID) as error:
        reason = (
            " ".join(str(error).replace(' in "<byte string>", ', " at ").split())
            or type(error).__name__
        )
        raise damaged(path, f"is not readable YAML ({reason[:300]})", "correct it") from error
    if not isinstance(values, dict):
        held = (
            "is empty"
            if values is None
            else f"holds a {type(values).__name__}, not a table of settings"
        )
        raise damaged(path, held, "give a configuration")
    return values


@dataclass
class _Collection:
    """A list or table of YAML whose end is not read; the keys of a table alternate with
    its values.
    """

    is_table: bool
    keys: set[str] = field(default_factory=set)
    at_key: bool = True


def _check_structure(events: Iterable[Any]) -> None:
    """Check the depth, the number of aliases and the keys of a document, before its values are
    built.

    Raises:
        YAMLError: It is nested too deeply, has too many aliases, or repeats a key; or the file is
            not YAML.
    """
    aliases = 0
    anchored: dict[str, str] = {}
    outer: list[_Collection] = []
    for event in events:
        if isinstance(event, yaml.CollectionEndEvent):
            outer.pop()
        if not isinstance(event, yaml.NodeEvent):
            continue
        text = None
        if isinstance(event, yaml.ScalarEvent):
            text = event.value
            anchored[event.anchor] = text
        elif isinstance(event, yaml.AliasEvent):
            text = anchored.get(event.anchor)
            aliases += 1
        if outer and outer[-1].is_table:
            table = outer[-1]
            if table.at_key and text in table.keys:
                problem = f"the key {quote(text)} is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
            if table.at_key and text not in (None, "<<"):
                table.keys.add(text)
            table.at_key = not table.at_key
        if isinstance(event, yaml.CollectionStartEvent):
            outer.append(_Collection(isinstance(event, yaml.MappingStartEvent)))
        if aliases > MAX_ALIASES:
            raise yaml.YAMLError(
                f"more than {MAX_ALIASES} aliases, which can multiply its values without limit"
            )
        if len(outer) > MAX_DEPTH:
            raise yaml.YAMLError(f"more than {MAX_DEPTH} tables and lists in each other")


def _make_loader() -> Any:
    """Return PyYAML's safe loader, by libyaml if it is there, for which an invalid value is a
    ``YAMLError``.

    Numbers of base 60 (``1:30``), which YAML 1.2 does not have and which take quadratic time, stay
    text.
    """
    safe_loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(safe_loader):  # type: ignore[misc]
        def construct_object(self, node: Any, deep: bool = False) -> Any:
            try:
                return super().construct_object(node, deep)
            except _INVALID as error:
                problem = f"{quote(node.value)} is no {node.tag.rpartition(':')[2]}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from error

        def construct_number(self, node: Any) -> Any:
            if ":" in node.value:
                return self.construct_scalar(node)
            read = (
                self.construct_yaml_int if node.tag.endswith(":int") else self.construct_yaml_float
            )
            return read(node)

    for tag in ("int", "float"):
        Loader.add_constructor(f"tag:yaml.org,2002:{tag}", Loader.construct_number)
    return Loader
