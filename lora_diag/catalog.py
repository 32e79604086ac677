"""The catalog of features: built-in ones and those of installed packages.

A feature is one entry of ``_FEATURES``, or an entry point in the group ``loradiag.features`` of an
installed package. All lists of commands, records, tables, figures, report sections and public
functions are derived from this catalog.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from html import escape
from importlib import import_module
from importlib.metadata import entry_points
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lora_diag.errors import InputError
from lora_diag.feature import Command, Feature, Figure, load

if TYPE_CHECKING:  # imports pydantic, which is not needed before records are read
    from lora_diag.records import LayerRecord, Record, Results

L = TypeVar("L", bound="LayerRecord")

_LOG = logging.getLogger(__name__)

GROUP = "loradiag.features"

# Packages with a ``FEATURE``, in the order of each group of ``loradiag --help``.
_FEATURES = (
    *("diagnostics.spectrum", "diagnostics.fleet", "diagnostics.residual", "diagnostics.overlap"),
    *("diagnostics.interference", "diagnostics.intruders", "diagnostics.geometry"),
    *("linting", "tuning", "decisions.allocate", "decisions.plan", "diagnostics.checkpoints"),
    *("decisions.plan_merge", "decisions.extract", "decisions.merge"),
    *("diagnostics.verify_merge", "diagnostics.portability"),
    *(
        "decisions.recover",
        "gating",
        "inspection",
        "environment",
        "project",
        "explanations",
        "plots",
        "reports",
    ),
    *(
        "probes.truncation",
        "probes.outputs",
        "probes.strength",
        "probes.activations",
        "probes.sweep",
    ),
    *("probes.gain", "probes.sensitivity", "probes.fisher", "probes.curvature", "probes.intrinsic"),
)

# The path from understanding an update over training to shipping an adapter: the next step that a
# command suggests is later on it, or another run of the same command.
PATH = (
    *("checkpoints", "fleet", "probe activations", "spectrum", "intruders", "geometry"),
    *("overlap", "interference"),
    *(
        "recover",
        "probe gain",
        "probe fisher",
        "probe curvature",
        "probe sensitivity",
        "probe truncation",
        "probe intrinsic",
    ),
    *(
        "lint",
        "probe sweep",
        "plan",
        "allocate",
        "tune",
        "extract",
        "residual",
        "probe strength",
        "plan-merge",
        "merge",
        "probe outputs",
    ),
    *("portability", "verify-merge", "gate init", "gate", "report"),
)


# Whether this process loads features of installed packages; ``loradiag gate`` does not unless it is
# asked to.
_uses_plugins = os.environ.get("LORADIAG_PLUGINS") != "0"


def disable_plugins() -> None:
    """Load no feature of installed packages in this process; to be called before the catalog is
    read.
    """
    global _uses_plugins
    _uses_plugins = False


@cache
def built_in() -> tuple[Feature, ...]:
    """Return loradiag's own features."""
    return tuple(import_module(f"lora_diag.{name}").FEATURE for name in _FEATURES)


@cache
def features() -> tuple[Feature, ...]:
    """Return all features: loradiag's own, then those of installed packages unless plugins are
    disabled.

    A package's feature is skipped if it fails to load, or if its name exists already.
    """
    if not _uses_plugins:
        return built_in()
    loaded_features = list(built_in())
    names = {feature.name for feature in loaded_features}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value)):
        try:
            plugin = entry.load()
            if not isinstance(plugin, Feature):
                raise TypeError(f"{entry.value} is not a lora_diag.feature.Feature")
            if plugin.name in names:
                raise ValueError(f"the command {plugin.name} already exists")
            for path in plugin.records:
                plugin.load(path)
        # A plugin can fail in any way, such as by sys.exit(0), and must not stop loradiag. Ctrl-C
        # during an import ends the command before it gets here (``__main__``).
        except BaseException as error:
            _LOG.warning(
                "plugin %s (%s) is skipped: %s: %s",
                entry.name,
                entry.value,
                type(error).__name__,
                error,
            )
            continue
        names.add(plugin.name)
        loaded_features.append(plugin)
    return tuple(loaded_features)


def feature_of(command: str) -> Feature | None:
    """Return the feature of a command's results; None if no feature has this name.

    Args:
        command: ``Run.command``.
    """
    return next((feature for feature in features() if feature.name == command), None)


def commands() -> Iterator[tuple[str, Feature, Command]]:
    """Yield the full name, the feature and the declaration of every command."""
    for feature in features():
        yield from (
            (command.name or feature.name, feature, command) for command in feature.commands
        )


@cache
def record_kinds() -> dict[str, type[Record]]:
    """Return every kind of record of all features, by its name in a results file."""
    kinds: list[type[Record]] = [
        feature.load(path) for feature in features() for path in feature.records
    ]
    return {kind.model_fields["record"].default: kind for kind in kinds}


def figures() -> Iterator[tuple[Feature, Figure]]:
    """Yield every figure with its feature; figures that draw any record come last."""
    declared = [(feature, figure) for feature in features() for figure in feature.figures]
    yield from sorted(declared, key=lambda pair: not pair[1].kind)


def find_function(name: str) -> Callable[[], Any] | None:
    """Return the loader of a public function; None if no feature has it.

    Installed packages are loaded only for a name that loradiag does not have: theirs may import
    loradiag's functions while they are loaded.
    """
    own = _list_functions(built_in())
    return own[name] if name in own else functions().get(name)


@cache
def functions() -> dict[str, Callable[[], Any]]:
    """Return a loader for each public function, by its name."""
    return _list_functions(features())


def _list_functions(given: tuple[Feature, ...]) -> dict[str, Callable[[], Any]]:
    """Return a loader for each public function of features, by its name."""
    return {
        path.partition(":")[2]: partial(feature.load, path)
        for feature in given
        for path in feature.functions
    }


def read_results(path: Path | str) -> Results[Any]:
    """Read a results file.

    Args:
        path: A file written by ``-o`` or ``Results.write``, or the saved output of ``--json``.

    Returns:
        The records. An incomplete last line, left by a crash, is dropped, and so is everything
            after a zero byte, left
        by a loss of power; ``end`` is then None.

    Raises:
        InputError: The file cannot be read, is not a results file, is damaged or edited, holds
            several runs, or has a schema newer than this version of loradiag.
    """
    from lora_diag.records.file import read_results as read

    record_kinds()
    return _rename_settings(read(path))


def _rename_settings(results: Results[Any]) -> Results[Any]:
    """Return results with their settings under today's names of the command's options."""
    rename_settings = load("lora_diag.running.options:rename_settings")
    settings = results.run.settings
    if (feature := feature_of(results.run.command)) is not None:
        for command in feature.commands:
            for group in feature.option_groups(command):
                settings = rename_settings(group, settings)
    run = results.run.model_copy(update={"settings": settings})
    return replace(results, run=run)


def read_results_of(kind: type[L], path: Path | str) -> Results[L]:
    """Read a results file whose layer records are all of one kind.

    Args:
        kind: Class of the records, such as ``Spectrum``.
        path: The file.

    Raises:
        InputError: The file cannot be read, or holds records of another command.
    """
    results: Results[L] = read_results(path)
    kind_name = kind.model_fields["record"].default
    if any(not isinstance(record, kind) for record in results) or (
        not results.layers and results.run.command != kind_name
    ):
        raise InputError(
            f"{path}: holds results of loradiag {results.run.command}; give a file with "
            f"{kind_name} records"
        )
    return results


def table(
    results: Results[Any],
    width: int = 80,
    color: bool = False,
    per: str = "type",
    next_command: str | None = None,
    values: Mapping[str, Any] | None = None,
) -> str:
    """Return the table and the summary of results of any command.

    Args:
        results: The results.
        width: Columns of the terminal.
        color: Whether to use ANSI colours.
        per: ``type`` for one row per module type, ``layer`` for one row per layer.
        next_command: The suggested next command, printed last; None without one.
        values: Arguments and options of the command; the feature's table or statements get those
            that their parameters name.

    Raises:
        InputError: The results come from a command that is unknown to this version, or has no
            table.
    """
    feature = feature_of(results.run.command)
    if feature is not None and feature.table:
        values = {**(values or {}), "per": per, "next_command": next_command}
        return draw_table(feature.load(feature.table), results, width, color, values)
    if feature is not None and feature.statements:
        statements = feature.load(feature.statements)
        chosen = _select_values(statements, 1, values or {})
        text: str = load("lora_diag.rendering.tables:grids_table")(
            feature.tables(results, per), statements(results, **chosen), width, color, next_command
        )
        return text
    raise InputError(
        f"results of loradiag {results.run.command}: this version has no table for them; update "
        "loradiag, or install the package that adds the command"
    )


def draw_table(
    function: Callable[..., str], result: Any, width: int, color: bool, values: Mapping[str, Any]
) -> str:
    """Return the table that a function makes of a result; of the values it gets those that its
    parameters name.
    """
    return function(result, width, color, **_select_values(function, 3, values))


def _select_values(
    function: Callable[..., Any], first: int, values: Mapping[str, Any]
) -> dict[str, Any]:
    """Return those of the values that a function's parameters name, from the given position on."""
    names = list(signature(function).parameters)[first:]
    return {name: values[name] for name in names if name in values}


# Columns of the preformatted text in a notebook, of a command without a section of a report.
_WIDTH = 100


def html_of(results: Results[Any]) -> str:
    """Return tables and summary of results as HTML for a notebook.

    It is preformatted text for a command without a summary, or with a terminal table of its own and
    no section. Names are escaped, and nothing is loaded from elsewhere.
    """
    feature = feature_of(results.run.command)
    if feature is None or not feature.statements or (feature.table and not feature.section):
        text = table(results, _WIDTH) if feature and feature.table else repr(results)
        return f"<pre>{escape(text)}</pre>"
    grid_html, statement_html = (
        load(f"lora_diag.rendering.html:{name}") for name in ("grid_html", "statement_html")
    )
    statements = feature.load(feature.statements)(results)
    tables = "".join(map(grid_html, feature.tables(results, "type")))
    summary = "".join(map(statement_html, statements))
    return f"<div>{tables}<table><tbody>{summary}</tbody></table></div>"
