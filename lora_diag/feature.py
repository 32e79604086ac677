"""Declaration of a feature: a command, its records and their presentation.

Callables are given as dotted paths, ``module:name``, so that a declaration imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any


@cache
def load(path: str, package: str = "") -> Any:
    """Import and return the object at a dotted path.

    Args:
        path: ``module:name``; a leading dot makes it relative to ``package``.
        package: Package of the feature that declares the path.

    Example:
        >>> load("math:pi") > 3
        True
    """
    module, _, name = path.partition(":")
    return getattr(import_module(module, package), name)


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure of a feature's records.

    Args:
        name: Value of ``loradiag plot --figure``.
        shows: Content of the figure, in one line.
        needs: Kind of record that it draws (for ``probe`` records, the probe) where it is not ``name``; ``*`` for any
            records of layers.
        page: ``module:name`` of ``make_page(series, style, options) -> Page``, which raises ``UndrawableError`` for
            records that cannot be drawn.
        panels: ``module:name`` of its panels for a user's own axes, ``lora_diag.plots.NAME``.
        made_by: Command that measures these records.
        by_color: Whether colours distinguish the runs, which limits their number.
        options: The fields of ``Options`` that it uses, besides ``per``: ``field``, ``rank``.
    """

    name: str
    shows: str
    needs: str = ""
    page: str = ".figures:make_page"
    panels: tuple[str, ...] = ()
    made_by: str = ""
    by_color: bool = True
    options: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """The kind of record that it draws; empty for any records of layers."""
        return self.needs.strip("*") if self.needs else self.name


@dataclass(frozen=True, slots=True)
class Section:
    """The section of a report about one run of a feature.

    Args:
        title: Subject of the records.
        per: What a row of the tables is: a module ``type``, or a ``layer``.
        order: Sort key of sections, before the order of the catalog; sections about losses come first.
        figures: Names of the figures in this section; empty for all figures of the feature.
        losses: Whether the section is about losses of a model.
    """

    title: str
    per: str = "type"
    order: int = 50
    figures: tuple[str, ...] = ()
    losses: bool = False


@dataclass(frozen=True, slots=True)
class Feature:
    """One command and everything that belongs to it.

    Paths with a leading dot are relative to the feature's package.

    Args:
        package: The feature's package, ``__name__``.
        name: The command as typed, such as ``spectrum`` or ``probe sweep``; also ``Run.command``.
        command: ``module:name`` of the Typer command; empty if another feature's command runs it.
        subcommands: Further commands by full name, such as ``gate init``, each with its ``module:name``.
        records: ``module:name`` of each kind of record.
        functions: ``module:name`` of each public function, ``lora_diag.NAME``.
        statements: ``module:name`` of ``statements(results) -> list[Statement]``, the summary.
        grids: ``module:name`` of ``grids(results, per) -> list[Grid]``, the tables; if empty, they show the columns
            declared by the records.
        table: ``module:name`` of ``table(results, width, color, per=..., next_command=...)``, for a terminal; if empty,
            it shows the tables above the summary.
        section: The feature's section of a report; None if it has none.
        questions: Pairs of a statement's key and the question that it answers at the top of a report; further keys of a
            question add lines to its answer.
        figures: The figures, in the order in which they are listed.
        named_by: Roles of the inputs that name a run in figures; empty for all that it measured.
        needs_input: Whether the command without arguments shows its help.
    """

    package: str
    name: str
    command: str = ""
    subcommands: tuple[tuple[str, str], ...] = ()
    records: tuple[str, ...] = ()
    functions: tuple[str, ...] = ()
    statements: str = ""
    grids: str = ""
    table: str = ""
    section: Section | None = None
    questions: tuple[tuple[str, str], ...] = ()
    figures: tuple[Figure, ...] = ()
    named_by: tuple[str, ...] = ()
    needs_input: bool = True

    def load(self, path: str) -> Any:
        """Import and return the object at a declared path."""
        return load(path, self.package)

    def tables(self, results: Any, per: str) -> list[Any]:
        """Return the tables of results, each a ``Grid``."""
        grids: list[Any] = self.load(self.grids or "lora_diag.rendering.tables:record_grids")(results, per)
        return grids
