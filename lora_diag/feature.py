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
class Argument:
    """A positional argument of a command.

    Args:
        name: Parameter of the function that the command calls.
        help: Help text, one complete line.
        metavar: Its name in the help; default the parameter's name in capitals.
        many: Whether it takes all remaining words; the function gets a list.
        optional: Whether it may be missing; the function gets None, or an empty list.
        stdin: Whether ``-`` stands for the lines of standard input.
    """

    name: str
    help: str
    metavar: str = ""
    many: bool = False
    optional: bool = False
    stdin: bool = False


BASE_ARGUMENT = Argument("base", "Base checkpoint: file, folder, index, address or Hub id.")
TUNED_ARGUMENT = Argument("tuned", "Fine-tuned checkpoint, or an adapter.")
GRADIENTS_ARGUMENT = Argument(
    "gradients", "Gradient snapshots: a folder of them, or one file per step.", many=True
)
RESULTS_ARGUMENT = Argument("results", "Results files of any command.", many=True)
SPECTRA_ARGUMENT = Argument("results", "Results file of spectrum.")


@dataclass(frozen=True, slots=True)
class Hint:
    """A command to run next. It is suggested if all values that it names are given.

    Args:
        command: The words after ``loradiag``, with ``{name}`` for the value of an argument or
            option. Words that start with ``-`` are added to the command that was run.
        purpose: What it is good for; printed in parentheses.
        saved: Whether it needs the results file of this run.
    """

    command: str
    purpose: str
    saved: bool = False


SAVE_PROBE = Hint("-o probe.jsonl", "saves these results")

# Flags of every command that measures layers: what it prints, and whether a row is a layer.
ROWS = ("json", "quiet", "verbose", "by")


@dataclass(frozen=True, slots=True)
class Command:
    """One command: it calls a Python function with its arguments and options, and shows what the
    function returns.

    Args:
        help: Its line in the list of commands, of up to 80 characters.
        question: What users ask that it answers, of up to 60 characters; ``loradiag --help`` lists
            the commands that have one by it, above all others.
        notes: Further sentences of the help.
        examples: Words after ``loradiag`` of examples.
        name: Full name, such as ``gate init``; default that of the feature.
        run: ``module:name`` of the function; default the feature's first. It returns ``Results``,
            or what ``table`` shows. Callbacks are passed if ``options`` have them.
        arguments: Positional arguments, in order.
        options: Groups of options, each a ``TypedDict`` or its ``module:name``, in the order of the
            help.
        shows: Flags that select the output: some of ``ROWS``.
        hints: Commands to run next, of which the first that applies is printed below the results.
        suggest: ``module:name`` of ``suggest(results, values) -> Hint | str | None``: what comes
            before ``hints`` for these results.
        table: ``module:name`` of ``table(result, width, color, ...)`` for what is no ``Results``;
            it gets the values that its parameters name, and ``next_command``.
        exit_code: ``module:name`` of ``exit_code(results) -> int``, if the code depends on the
            results.
        annotations: ``module:name`` of ``annotations(results) -> list[str]``, the commands of
            GitHub Actions that the option ``github`` prints below the results.
        call: Whether ``run`` is ``run(shown, **values) -> int`` instead, which prints by ``shown``
            (``lora_diag.cli.options.Shown``) and returns the exit code.
        needs_input: Whether the command without arguments shows its help.
    """

    help: str
    question: str = ""
    notes: str = ""
    examples: tuple[str, ...] = ()
    name: str = ""
    run: str = ""
    arguments: tuple[Argument, ...] = ()
    options: tuple[type | str, ...] = ()
    shows: tuple[str, ...] = ROWS
    hints: tuple[Hint, ...] = ()
    suggest: str = ""
    table: str = ""
    exit_code: str = ""
    annotations: str = ""
    call: bool = False
    needs_input: bool = True

    @property
    def description(self) -> str:
        """The whole text of the help above the options."""
        return "\n\n".join(
            (
                self.help,
                *filter(None, [self.notes]),
                *(f"Example: loradiag {e}" for e in self.examples),
            )
        )


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure of a feature's records.

    Args:
        name: Value of ``loradiag plot --figure``.
        shows: Content of the figure, in one line.
        needs: Kind of record that it draws (for ``probe`` records, the probe) where it is not
            ``name``; ``*`` for any records of layers.
        page: ``module:name`` of ``make_page(series, style, options) -> Page``, which raises
            ``UndrawableError`` for records that cannot be drawn.
        made_by: Command that measures these records.
        by_color: Whether colours distinguish the runs, which limits their number.
        options: The fields of ``Options`` that it uses, besides ``per``: ``field``, ``rank``.
    """

    name: str
    shows: str
    needs: str = ""
    page: str = ".figures:make_page"
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
        order: Sort key of sections, before the order of the catalog.
        figures: Names of the figures in this section; empty for all figures of the feature.
    """

    title: str
    per: str = "type"
    order: int = 50
    figures: tuple[str, ...] = ()


# What commands are for: the groups of ``loradiag --help``, in its order.
GROUPS = ("Train", "Understand", "Ship", "Show", "Research")


@dataclass(frozen=True, slots=True)
class Feature:
    """A command, the further ones of its package, and everything that belongs to them.

    Paths with a leading dot are relative to the feature's package.

    Args:
        package: The feature's package, ``__name__``.
        name: ``Run.command`` of its results, such as ``probe sweep``; also the name of a command
            that has no other.
        group: What it is for, one of ``GROUPS``.
        commands: The command, and further ones, such as ``gate init``.
        records: ``module:name`` of each kind of record.
        functions: ``module:name`` of each public function, ``lora_diag.NAME``.
        statements: ``module:name`` of ``statements(results, ...) -> list[Statement]``, the summary;
            further parameters, with defaults, get the options of their name in a terminal.
        grids: ``module:name`` of ``grids(results, per) -> list[Grid]``, the tables; if empty, they
            show the columns declared by the records.
        table: ``module:name`` of ``table(results, width, color, per=..., next_command=...)``, for a
            terminal; if empty, it shows the tables above the summary.
        section: The feature's section of a report; None if it has none.
        questions: Pairs of a statement's key and the question that it answers at the top of a
            report; further keys of a question add lines to its answer.
        figures: The figures, in the order in which they are listed.
        named_by: Roles of the inputs that name a run in figures; empty for all that it measured.
        advice: ``module:name`` of ``advice(results) -> dict | None``: the ``action`` that its
            records support in a report, and ``why``.
        files: Pairs of a kind of file that users write for it, and ``module:name`` of the model
            that reads it.
        checks: ``module:name`` of a model whose ``names()`` are fields, each a built-in check.
    """

    package: str
    name: str
    group: str = "Understand"
    commands: tuple[Command, ...] = ()
    records: tuple[str, ...] = ()
    functions: tuple[str, ...] = ()
    statements: str = ""
    grids: str = ""
    table: str = ""
    section: Section | None = None
    questions: tuple[tuple[str, str], ...] = ()
    figures: tuple[Figure, ...] = ()
    named_by: tuple[str, ...] = ()
    advice: str = ""
    files: tuple[tuple[str, str], ...] = ()
    checks: str = ""

    def load(self, path: str) -> Any:
        """Import and return the object at a declared path."""
        return load(path, self.package)

    def option_groups(self, command: Command) -> list[type]:
        """Import and return the groups of a command's options, each a ``TypedDict``."""
        return [self.load(group) if isinstance(group, str) else group for group in command.options]

    def function_of(self, command: Command) -> Any:
        """Import and return the function that a command calls."""
        return self.load(command.run or self.functions[0])

    def tables(self, results: Any, per: str) -> list[Any]:
        """Return the tables of results, each a ``Grid``."""
        grids: list[Any] = self.load(self.grids or "lora_diag.rendering.tables:record_grids")(
            results, per
        )
        return grids
