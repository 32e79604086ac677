"""Write a project file from what a folder holds."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lora_diag.adapters.source import CONFIG
from lora_diag.cli.project import FILE
from lora_diag.errors import DONE, InputError, LoradiagError, UsageError, safe
from lora_diag.files import write_whole
from lora_diag.linting.configs import read_settings
from lora_diag.linting.values import Values
from lora_diag.records import is_results_file

if TYPE_CHECKING:
    from lora_diag.cli.options import OutputChoice

# Keys of a base model in the configurations of trainers and of PEFT.
BASE_KEYS = ("base_model", "model_name_or_path", "base_model_name_or_path")

# Most entries of a folder that are looked at.
MAX_ENTRIES = 1000


class Found(NamedTuple):
    """A name or a default, and what it was found in."""

    name: str
    value: str | int
    source: str


def run_init(shown: OutputChoice, folder: str | None) -> int:
    """Write the project file of a folder and print it; return the exit code.

    Raises:
        UsageError: The folder has a project file, or nothing that could be named.
        InputError: There is no such folder.
    """
    place = Path(folder or ".")
    if not place.is_dir():
        raise InputError(f"{place}: is not a folder; give the folder of a project")
    path = place / FILE
    if path.exists() or path.is_symlink():
        raise UsageError(f"{path}: exists; edit it, or remove it first")
    by_value = {(found.name, found.value): found for found in reversed(list(_find_names(place)))}
    names = list(reversed(by_value.values()))
    if not names:
        raise UsageError(
            f"{place}: holds no training configuration, adapter, model, run or text; write {path} "
            'by hand: [names], base = "PATH"'
        )
    text = _format(names, list(_find_defaults(place)))
    write_whole(path, text)
    if not shown.quiet:
        shown.print(f"{path}:\n\n{text}\nUse a name as @{names[0].name} in any command.")
    return DONE


def _format(names: list[Found], defaults: list[Found]) -> str:
    """Return the text of a project file, in which a further value of a name is a comment."""
    lines = ["[names]"]
    taken: set[str] = set()
    for name, value, source in names:
        hidden = "# " if name in taken else ""
        text = json.dumps(value, ensure_ascii=False)
        lines.append(f"{hidden}{name} = {text}  # {safe(source)}")
        taken.add(name)
    lines += ["", "[defaults]"]
    lines += [f"{name} = {value}  # {safe(source)}" for name, value, source in defaults[:1]]
    return "\n".join(lines) + "\n"


def _find_names(folder: Path) -> Iterator[Found]:
    """Yield what can be named: the model of a configuration or an adapter before one that lies in
    the folder, then runs, then texts.
    """
    entries = sorted(folder.iterdir())[:MAX_ENTRIES]
    configs = [*_list_configs(folder), *(entry / CONFIG for entry in entries)]
    for path in configs:
        if path.is_file() and (values := _read(path)):
            for key in BASE_KEYS:
                if isinstance(base := values.get(key), str) and base.isprintable():
                    yield Found("base", base, f"{key} of {path.relative_to(folder)}")
    for entry in entries:
        if (entry / "config.json").is_file() and not (entry / CONFIG).exists():
            yield Found("base" if "base" in entry.name else _name(entry), entry.name, "a model")
    for entry in (folder, *entries):
        if next(entry.glob("checkpoint-*/trainer_state.json"), None):
            yield Found("run", f"{entry.relative_to(folder)}/", "checkpoints of a Trainer")
    for entry in entries:
        if entry.suffix in {".txt", ".jsonl"} and entry.is_file() and not is_results_file(entry):
            yield Found(_name(entry), entry.name, "a text")


def _name(entry: Path) -> str:
    """Return a name for a path: its letters and digits."""
    return re.sub(r"\W+", "_", entry.stem, flags=re.ASCII).strip("_0123456789") or "path"


def _find_defaults(folder: Path) -> Iterator[Found]:
    """Yield the sequence length of each training configuration that gives one."""
    for path in _list_configs(folder):
        try:
            length = read_settings(path).length
        except LoradiagError:  # another program's configuration
            continue
        if length:
            yield Found("length", length, path.name)


def _list_configs(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])[:MAX_ENTRIES]


def _read(path: Path) -> Values | None:
    """Return the values of a file; None if it is no configuration."""
    try:
        return Values.read(path)
    except LoradiagError:
        return None
