"""What a feature declares of itself: one command, its records, and how they are shown.

Callables are named by dotted path, ``module:name``, so that declaring a feature imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any


@cache
def load(path: str, package: str = "") -> Any:
    """Return what a dotted path names.

    Args:
        path: ``module:name``; with a leading dot, in ``package``.
        package: Of the feature that declares it.

    Example:
        >>> load("math:pi") > 3
        True
    """
    module, _, name = path.partition(":")
    return getattr(import_module(module, package), name)


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure that a feature's records can be drawn as.

    Args:
        name: As ``loradiag plot --figure`` takes it.
        shows: What it shows, in one line.
        needs: The kind of record that it draws (of ``probe`` records: which probe); empty for any of layers.
        draw: ``module:name`` of ``draw(series, look, options) -> Figure``.
        panels: ``module:name`` of its panels for a user's own axes, ``lora_diag.plots.NAME``.
        made_by: The command that measures such records.
        by_color: Whether runs are told apart by colour, which limits how many there can be.
        lacks: ``module:name`` of ``lacks(records, options) -> str | None``: why records cannot be drawn; empty if any
            can.
    """

    name: str
    shows: str
    needs: str
    draw: str
    panels: tuple[str, ...] = ()
    made_by: str = ""
    by_color: bool = True
    lacks: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    """The section of a report on one run of a feature.

    Args:
        title: What the records are of.
        statements: ``module:name`` of ``statements(results) -> list[Statement]``.
        grids: ``module:name`` of ``grids(results) -> list[Grid]``.
        order: Sections are sorted by it, then by the catalog; those on losses lead.
        figures: Names of the figures that belong to it; empty for those of the feature.
        losses: Whether it is of losses of a model.
    """

    title: str
    statements: str
    grids: str
    order: int = 50
    figures: tuple[str, ...] = ()
    losses: bool = False


@dataclass(frozen=True, slots=True)
class Feature:
    """One command and everything that belongs to it.

    Paths that begin with a dot are in the feature's own package.

    Args:
        package: The feature's package, ``__name__``.
        name: The command as a user types it, such as ``spectrum`` or ``probe sweep``; also ``Run.command``.
        command: ``module:name`` of the Typer command; empty where another feature's command runs it.
        subcommands: Further commands by their full names, such as ``gate init``, each with its ``module:name``.
        records: ``module:name`` of its kinds of records.
        functions: ``module:name`` of its public functions, ``lora_diag.NAME``.
        table: ``module:name`` of ``table(results, width, color, per=...) -> str``; if empty, the
            columns that the records declare, above the section's statements.
        section: Its section of a report; None if it has none of its own.
        questions: Keys of statements of that section, each with the question at the top of a report that it answers.
        figures: Its figures, in the order in which they are listed.
    """

    package: str
    name: str
    command: str = ""
    subcommands: tuple[tuple[str, str], ...] = ()
    records: tuple[str, ...] = ()
    functions: tuple[str, ...] = ()
    table: str = ""
    section: Section | None = None
    questions: tuple[tuple[str, str], ...] = ()
    figures: tuple[Figure, ...] = ()

    def load(self, path: str) -> Any:
        """Return what one of the declared paths names."""
        return load(path, self.package)
