"""Options of commands and the parsing of their values.

A command takes a group as one parameter, and ``spread`` presents its options to typer. A group is either a
``TypedDict`` of ``running.options``, shared with a Python function, and the command gets a dictionary to pass on; or a
dataclass of options that exist on the command line only::

    @spread
    def residual(base: Base, tuned: Tuned, *, arguments: LayerOptions, shown: Rows) -> None:
        with shown.callbacks() as callbacks:
            results = measure(base, tuned, **arguments, **callbacks)
        shown.show(results)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints, is_typeddict

import typer

from lora_diag.cli.output import message, progress_bar, record_printer, report_reading, result, terminal
from lora_diag.errors import UsageError
from lora_diag.running.options import EXECUTION, OUTPUT, PER, Option, Output, list_options

if TYPE_CHECKING:
    from lora_diag.records import Results
    from lora_diag.running.engines import Ray


# Maximum number of lines below a table without --verbose, not counting warnings and failures.
LINES: int | None = 12


class Engine(StrEnum):
    """Where a command runs."""

    local = "local"
    ray = "ray"


class Per(StrEnum):
    """What one row of a table is."""

    type = "type"
    layer = "layer"


def typer_option(name: str, option: Option) -> Any:
    """Return the typer option for a declaration."""
    flags = option.flags or (option.flag(name),)
    choices = option.completions or option.choices
    return typer.Option(
        *flags,
        metavar=option.metavar or None,
        help=option.help,
        rich_help_panel=option.panel,
        hidden=option.hidden,
        autocompletion=(lambda: list(choices)) if choices else None,
    )


def flag(name: str, help: str, panel: str, *flags: str) -> Any:
    """Return a typer flag that exists on the command line only."""
    return typer_option(name, Option(False, help, flags=flags, panel=panel))


# Inputs are strings: a Path would collapse the two slashes of s3://.
Base = Annotated[str, typer.Argument(metavar="BASE", help="Base checkpoint: file, folder, index, address or Hub id.")]
Tuned = Annotated[str, typer.Argument(metavar="TUNED", help="Fine-tuned checkpoint, or an adapter.")]
Adapters = Annotated[
    list[str] | None, typer.Argument(metavar="ADAPTER", help="Adapters, or checkpoints with one merged in.")
]
ResultsFiles = Annotated[list[Path], typer.Argument(metavar="RESULTS", help="Results files of any command.")]
ResultsFile = Annotated[Path, typer.Argument(metavar="RESULTS", help="Results file of spectrum.")]
Json = Annotated[bool, flag("json", "Print only the records, as JSON lines.", OUTPUT)]
PerRow = Annotated[Per, typer_option("per", PER)]
Quiet = Annotated[bool, flag("quiet", "Suppress progress, messages and tables.", OUTPUT, "--quiet", "-q")]
Verbose = Annotated[
    bool, flag("verbose", "Print every line of the summary, and how much was read.", OUTPUT, "--verbose", "-v")
]
Overwrite = Annotated[bool, typer_option("overwrite", list_options(Output)["overwrite"][1])]


@dataclass(frozen=True)
class Cluster:
    """The command-line form of a function's option ``engine``."""

    engine: Annotated[
        Engine, typer_option("engine", Option("", "This machine, or a Ray cluster.", "local|ray", panel=EXECUTION))
    ] = Engine.local
    ray_address: Annotated[
        str | None,
        typer_option("ray_address", Option("", "Ray cluster; default: RAY_ADDRESS.", "HOST:PORT", panel=EXECUTION)),
    ] = None
    gpus_per_task: Annotated[
        float, typer_option("gpus_per_task", Option("", "GPUs per Ray task; may be a fraction.", "G", panel=EXECUTION))
    ] = 0.0

    def value(self) -> Ray | None:
        """Return the cluster; None to run on this machine only.

        Raises:
            UsageError: A cluster option is given without ``--engine ray``.
        """
        if self.engine is Engine.local:
            if self.ray_address is not None or self.gpus_per_task:
                option = "--ray-address" if self.ray_address is not None else "--gpus-per-task"
                raise UsageError(f"{option}: needs a Ray cluster; add --engine ray")
            return None
        from lora_diag.running.engines import Ray  # deferred: imports torch

        return Ray(self.ray_address, self.gpus_per_task)


@dataclass(frozen=True)
class Shown:
    """Selection and destination of the output."""

    json: Json = False
    quiet: Quiet = False
    verbose: Verbose = False

    @property
    def table(self) -> bool:
        """Whether to print a table."""
        return not (self.json or self.quiet)

    @contextmanager
    def callbacks(self, notes: bool = False) -> Iterator[dict[str, Any]]:
        """Yield the callbacks of a run: a progress bar and, with ``--json``, one line per record.

        With ``--verbose``, print afterwards how much was read.

        Args:
            notes: Whether the run estimates its cost before it starts.
        """
        with progress_bar(self.quiet) as on_progress:
            options: dict[str, Any] = {"on_progress": on_progress, "on_record": record_printer(self.json)}
            yield {**options, **({"on_note": None if self.quiet else message} if notes else {})}
        if self.verbose and not self.quiet:
            report_reading()

    def show(self, results: Results[Any], next_command: str | None = None, per: str = "") -> None:
        """Print the tables and the summary of results, where they are shown.

        Args:
            results: The results.
            next_command: The suggested next command, printed last.
            per: Content of a row, ``type`` or ``layer``; the default is that of the options.
        """
        if self.table:
            from lora_diag.inspection.table import table

            result(table(results, *terminal(), per=per or getattr(self, "per", Per.type), next_command=next_command))


@dataclass(frozen=True)
class Rows(Shown):
    """Selection, destination and rows of the output."""

    per: PerRow = Per.type


def check_output(output: Path | None, resume: bool, overwrite: bool) -> None:
    """Check, before any work, that the results file can be written.

    Raises:
        UsageError: ``--resume`` without ``-o``, or the output exists and may not be replaced.
        InputError: The output's location is not writable.
    """
    if output is not None:
        from lora_diag.records.file import check_results_file

        check_results_file(output, resume, overwrite)
    elif resume:
        raise UsageError("--resume: give the results file of the interrupted run with -o")


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command with its groups spread: typer gets single options, and the command gets groups.

    >>> from lora_diag.running.options import Selection
    >>> @spread
    ... def command(base: str, *, arguments: Selection) -> None:
    ...     print(base, arguments)
    >>> ", ".join(signature(command).parameters)
    'base, layers, exclude'
    >>> command(base="base/", layers="q_proj", exclude=None)
    base/ {'layers': 'q_proj', 'exclude': None}
    """
    parameters = signature(command, eval_str=True).parameters
    options_by_group = {
        name: options
        for name, parameter in parameters.items()
        if (options := list(_list_options(parameter.annotation)))
    }

    @wraps(command)
    def call_with_groups(**values: Any) -> None:
        values = {name: _hide_secrets(value) for name, value in values.items()}
        for name, options in options_by_group.items():
            group_values = {option.name: values.pop(option.name) for option in options}
            values[name] = _gather_group(parameters[name].annotation, group_values)
        with _limit_lines(not any(getattr(values[name], "verbose", False) for name in options_by_group)):
            command(**values)

    spread_parameters = [
        option
        for name, parameter in parameters.items()
        # typer passes arguments by name
        for option in options_by_group.get(name) or [parameter.replace(kind=Parameter.KEYWORD_ONLY)]
    ]
    call_with_groups.__signature__ = Signature(spread_parameters)  # type: ignore[attr-defined]
    return call_with_groups


def _hide_secrets(value: Any) -> Any:
    """Return the value of an argument, with addresses whose text has no secrets.

    >>> _hide_secrets(["a", "https://host/b?signature=c"])
    ['a', 'https://host/b']
    """
    if isinstance(value, list | tuple):
        return type(value)(map(_hide_secrets, value))
    if not isinstance(value, str) or ":/" not in value:
        return value
    from lora_diag.checkpoints.addresses import ADDRESS, Address  # deferred: imports torch

    return Address(value) if ADDRESS.fullmatch(value) else value


@contextmanager
def _limit_lines(brief: bool) -> Iterator[None]:
    """Limit summaries to a few lines if ``brief``, else not at all."""
    from lora_diag.rendering.statements import limit_lines  # deferred: imports rich

    with limit_lines(LINES if brief else None):
        yield


def _list_options(group: Any) -> Iterator[Parameter]:
    """Yield the options of a group; nothing for other types."""
    if is_dataclass(group):
        hints = get_type_hints(group, include_extras=True)
        for field in fields(group):
            yield Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name])
    elif is_typeddict(group):
        for name, (kind, option) in list_options(group).items():
            if name == "engine":
                yield from _list_options(Cluster)
            elif option.cli:
                annotation: Any = Annotated[_value_type(kind, option), typer_option(name, option)]
                yield Parameter(name, Parameter.KEYWORD_ONLY, default=_format_default(option), annotation=annotation)


def _format_default(option: Option) -> Any:
    """Return a default in its command-line form: comma-separated numbers, and None for no files.

    >>> _format_default(Option((1e-4, 0.1, 1000), "Numbers.", "X,X,...")), _format_default(Option((), "Files.", "FILE"))
    ('1e-4,0.1,1000', None)
    """
    if not isinstance(option.default, tuple):
        return option.default
    return ",".join(map(_format_number, option.default)) or None


def _format_number(number: float) -> str:
    """Return the shorter spelling of a number; integers have digits only."""
    if isinstance(number, int):
        return str(number)
    mantissa, exponent = f"{number:e}".split("e")
    return min(f"{number:g}", f"{float(mantissa):g}e{int(exponent)}", key=len)


def _first_type(kind: Any) -> Any:
    """Return the first type of a union."""
    return get_args(kind)[0] if isinstance(kind, UnionType) else kind


def _value_type(kind: Any, option: Option) -> Any:
    """Return the type of an option's command-line value: the first type that the function accepts, or None.

    >>> _value_type(str | int | None, Option(None, "Memory limit.", "SIZE"))
    str | None
    >>> _value_type(Sequence[int], Option((4, 8), "Ranks.", "R,R,..."))
    <class 'str'>
    >>> _value_type(Sequence[Path | str], Option((), "", "FILE")) == list[Path] | None
    True
    """
    first = _first_type(kind)
    if get_origin(first) is Literal:
        first = str
    if get_origin(first) is Sequence:
        first = str if "," in option.metavar else list[_first_type(get_args(first)[0])]  # type: ignore[misc]
    optional = _format_default(option) is None
    return first | None if optional else first


def _parse_value(kind: Any, option: Option, name: str, text: Any) -> Any:
    """Return the value of an option from its command-line form; no files give the default."""
    first = _first_type(kind)
    if get_origin(first) is not Sequence:
        return text
    if "," not in option.metavar or not isinstance(text, str):
        return option.default if text is None else text
    if not text:
        return ()
    (entry_type,) = get_args(first)
    if entry_type is str:
        return [part.strip() for part in text.split(",")]
    example = _format_default(option) or "1,0.5"
    return (
        parse_ranks(text, option.flag(name)) if entry_type is int else parse_numbers(text, option.flag(name), example)
    )


def _gather_group(group: Any, values: dict[str, Any]) -> Any:
    """Return a group built from the given values.

    Raises:
        UsageError: Two options contradict each other, or the output exists and may not be replaced.
        InputError: The output cannot be written.
    """
    if is_dataclass(group):
        return group(**values)  # type: ignore[operator]
    if "engine" in values:
        values["engine"] = Cluster(**{field.name: values.pop(field.name) for field in fields(Cluster)}).value()
    for name, (kind, option) in list_options(group).items():
        if name in values:
            values[name] = _parse_value(kind, option, name, option.checked(name, values[name]))
    if {"output", "resume"} <= set(values):  # checked here because reading a model may take minutes
        check_output(values["output"], values["resume"], values["overwrite"])
    return values


def parse_ranks(value: str, option: str = "--ranks") -> list[int]:
    """Parse ``4,8,16``; ``option`` is the name used in the error.

    >>> parse_ranks("4,8,16")
    [4, 8, 16]

    Raises:
        UsageError: It is not a list of whole numbers.
    """
    try:
        return [int(text) for text in value.split(",")]
    except ValueError as error:
        raise UsageError(
            f"{option} {value}: not a list of whole numbers; separate them by commas, such as 4,8,16"
        ) from error


def parse_numbers(value: str, option: str, example: str) -> list[float]:
    """Parse comma-separated numbers; the error gives ``example`` as an example.

    >>> parse_numbers("1,0.5", "--weights", "1,0.5")
    [1.0, 0.5]

    Raises:
        UsageError: It is not a list of numbers.
    """
    try:
        return [float(text) for text in value.split(",")]
    except ValueError as error:
        raise UsageError(
            f"{option} {value}: not a list of numbers; separate them by commas, such as {example}"
        ) from error
