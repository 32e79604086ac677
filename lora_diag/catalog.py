"""The catalog of features: built-in ones and those of installed packages.

A feature is one line in ``_FEATURES``, or an entry point in the group ``loradiag.features`` of an installed package.
All lists of commands, records, tables, figures, report sections and public functions are derived from this catalog.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lora_diag.errors import InputError
from lora_diag.feature import Feature, Figure

if TYPE_CHECKING:  # imports pydantic, which is not needed before records are read
    from lora_diag.records import LayerRecord, Record, Results

L = TypeVar("L", bound="LayerRecord")

_LOG = logging.getLogger(__name__)

GROUP = "loradiag.features"

# Packages with a ``FEATURE``, in the order of ``loradiag --help``.
_FEATURES = (
    "diagnostics.spectrum",
    "diagnostics.fleet",
    "diagnostics.residual",
    "diagnostics.overlap",
    "diagnostics.interference",
    "diagnostics.intruders",
    "diagnostics.verify_merge",
    "diagnostics.portability",
    "decisions.allocate",
    "decisions.plan",
    "tuning",
    "decisions.plan_merge",
    "decisions.extract",
    "decisions.recover",
    "gating",
    "inspection",
    "environment",
    "plots",
    "reports",
    "probes.truncation",
    "probes.activations",
    "probes.outputs",
    "probes.sweep",
    "probes.sensitivity",
    "probes.fisher",
    "probes.curvature",
    "probes.intrinsic",
)


@cache
def features() -> tuple[Feature, ...]:
    """Return all features: loradiag's own, then those of installed packages. One that fails to load is skipped."""
    loaded_features: list[Feature] = [import_module(f"lora_diag.{name}").FEATURE for name in _FEATURES]
    names = {feature.name for feature in loaded_features}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value)):
        try:
            plugin = entry.load()
            if not isinstance(plugin, Feature):
                raise TypeError(f"{entry.value} is not a lora_diag.feature.Feature")
            if plugin.name in names:
                raise ValueError(f"the command {plugin.name} already exists")
            for path in (*plugin.records, *([plugin.command] if plugin.command else [])):
                plugin.load(path)
        except Exception as error:  # a plugin can fail in any way, and must not stop loradiag
            _LOG.warning("plugin %s (%s) is skipped: %s: %s", entry.name, entry.value, type(error).__name__, error)
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


@cache
def record_kinds() -> dict[str, type[Record]]:
    """Return every kind of record of all features, by its name in a results file."""
    kinds: dict[str, type[Record]] = {}
    for feature in features():
        for path in feature.records:
            kind: type[Record] = feature.load(path)
            kinds[kind.model_fields["record"].default] = kind
    return kinds


def figures() -> Iterator[tuple[Feature, Figure]]:
    """Yield every figure with its feature; figures that draw any record come last."""
    declared = [(feature, figure) for feature in features() for figure in feature.figures]
    yield from (item for item in declared if item[1].kind)
    yield from (item for item in declared if not item[1].kind)


@cache
def panels() -> dict[str, Callable[[], Any]]:
    """Return a loader for each panel for a user's own axes, by the panel's name."""
    return {
        path.partition(":")[2]: partial(feature.load, path) for feature, figure in figures() for path in figure.panels
    }


@cache
def functions() -> dict[str, Callable[[], Any]]:
    """Return a loader for each public function, by its name."""
    return {path.partition(":")[2]: partial(feature.load, path) for feature in features() for path in feature.functions}


def read_results(path: Path | str) -> Results[Any]:
    """Read a results file.

    Args:
        path: A file written by ``-o`` or ``Results.write``, or the saved output of ``--json``.

    Returns:
        The records. An incomplete last line, left by a crash, is dropped, and so is everything after a zero byte, left
        by a loss of power; ``end`` is then None.

    Raises:
        InputError: The file is not a results file, is damaged, holds more than one run, or has a schema newer than this
            version of loradiag.
    """
    from lora_diag.records.file import read_results as read

    record_kinds()
    return read(path)


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
            f"{path}: holds results of loradiag {results.run.command}; give a file with {kind_name} records"
        )
    return results
