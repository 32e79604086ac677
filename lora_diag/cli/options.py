"""From the declaration of a command (``lora_diag.feature.Command``) to a function that Typer
understands.

The options of all groups of a command become parameters of one function. It parses their values,
calls the declared Python function, and shows the result.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from inspect import Parameter, Signature, signature
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer

from lora_diag import catalog
from lora_diag.cli import output as out
from lora_diag.cli.hints import find_hint
from lora_diag.errors import DONE, UNREADABLE, Given, UsageError, flag
from lora_diag.feature import Argument, Command, Feature
from lora_diag.running.options import BY_ROW, EXECUTION, INPUTS, OUTPUT, Option, list_options

if TYPE_CHECKING:
    from lora_diag.running.engines import Ray


# Maximum number of lines below a table without --verbose; a decision or a warning is shown even
# where it exceeds it.
LINES: int | None = 8

# Flags that select the output (``feature.ROWS``).
DISPLAY = {
    "json": Option(False, "Print only the records, as JSON lines.", panel=OUTPUT),
    "quiet": Option(False, "Suppress progress, messages and tables.", short="-q", panel=OUTPUT),
    "verbose": Option(
        False,
        "Print every line of the summary, and how much was read.",
        short="-v",
        panel=OUTPUT,
    ),
    "by": BY_ROW,
}

# Read before the other options, as it gives their defaults (``lora_diag.cli.project``).
LIKE = Option(
    None, "Take texts and settings from results; @base is their BASE.", "RESULTS", panel=INPUTS
)

# The command-line form of a function's option ``engine``.
CLUSTER = {
    "engine": (
        str,
        Option("local", "This machine, or a Ray cluster.", "local|ray", panel=EXECUTION),
    ),
    "ray_address": (
        str | None,
        Option(None, "Ray cluster; default: RAY_ADDRESS.", "HOST:PORT", panel=EXECUTION),
    ),
    "gpus_per_task": (
        float,
        Option(0.0, "GPUs per Ray task; may be a fraction.", "G", panel=EXECUTION),
    ),
}


def make_typer_option(name: str, option: Option) -> Any:
    """Return the typer option for a declaration."""
    choices = option.completions or option.choices
    return typer.Option(
        *option.flags(name),
        metavar=option.metavar or None,
        help=option.help,
        rich_help_panel=option.panel,
        autocompletion=(lambda: list(choices)) if choices else None,
    )


def make_cluster(engine: str, ray_address: str | None, gpus_per_task: float) -> Ray | None:
    """Return the cluster; None to run on this machine only.

    Raises:
        UsageError: A cluster option is given without ``--engine ray``.
    """
    if engine == "local":
        if ray_address is not None or gpus_per_task:
            option = "gpus_per_task" if ray_address is None else "ray_address"
            raise UsageError(Given(option), "needs a Ray cluster", "add $engine ray")
        return None
    from lora_diag.running.engines import Ray  # deferred: imports torch

    return Ray(ray_address, gpus_per_task)


@dataclass(frozen=True)
class OutputChoice:
    """Selection and destination of the output."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    by: str = "type"

    @property
    def table(self) -> bool:
        """Whether to print a table."""
        return not (self.json or self.quiet)

    @contextmanager
    def callbacks(self, follow: bool = False) -> Iterator[dict[str, Any]]:
        """Yield the callbacks of a run: a progress bar, a line per record with ``--json``, and
        notes on its cost.

        With ``--verbose`` and without ``--quiet``, print afterwards how much was read.

        Args:
            follow: Whether the command shows a view that is refreshed, in place of the progress
                bar.
        """
        view = out.live_view() if follow and self.table else nullcontext()
        with out.progress_bar(self.quiet or follow) as on_progress, view as on_view:
            on_note = None if self.quiet else out.print_message
            on_record = out.record_printer(self.json)
            own = {"on_view": on_view} if follow else {}
            yield {"on_progress": on_progress, "on_record": on_record, "on_note": on_note, **own}
        if self.verbose and not self.quiet:
            out.report_reading()

    @property
    def terminal(self) -> tuple[int, bool]:
        """Width for standard output in columns, and whether to use colours."""
        return out.terminal()

    def print(self, text: str) -> None:
        """Print a result to standard output, as ``output.print_result`` does."""
        out.print_result(text)

    def print_annotated(self, text: str, commands: Sequence[str]) -> None:
        """Print a result and commands of GitHub Actions, as ``output.print_annotated`` does."""
        out.print_annotated(text, commands)

    def print_line(self, json: str) -> None:
        """Print a line of JSON to standard output, as ``output.print_json`` does."""
        out.print_json(json)

    def confirm(self, question: str) -> bool:
        """Ask a question on standard error; return whether the answer is yes, which Enter means,
        too.
        """
        return typer.confirm(question, default=True, err=True)

    def message(self, text: str) -> None:
        """Print a message to standard error, unless ``--quiet``."""
        if not self.quiet:
            out.print_message(text)


def make_function(feature: Feature, command: Command) -> Callable[..., None]:
    """Return the function of a command, with the parameters that Typer reads and the declared help
    as docstring.
    """
    groups = feature.option_groups(command)

    def run(context: typer.Context, **values: Any) -> None:
        if re.match(r"\w{2,}:/", str(values.get("output"))):  # a Path has only one slash
            raise UsageError(Given("output"), "cannot write to an address", "name a local path")
        values.pop("like", None)
        values = {name: _hide_secrets(value) for name, value in values.items()}
        out.silence_matplotlib()
        for argument in command.arguments:
            if argument.many:
                values[argument.name] = _list_words(argument, values[argument.name])
        display = {name: DISPLAY[name].checked(name, values.pop(name)) for name in command.shows}
        shown = OutputChoice(**display)
        for group in groups:
            of_group = {each.name: values.pop(each.name) for each in _list_options(group)}
            values |= _gather_group(group, of_group)
        from lora_diag.rendering.statements import limit_lines  # deferred: imports rich

        _report_defaults(context, shown)
        with limit_lines(None if shown.verbose else LINES):
            if command.call:
                code = feature.function_of(command)(shown, **values)
            else:
                names = set[str]().union(*map(list_options, groups))
                # An option with a default is filled in by the function.
                source = context.get_parameter_source
                names = {name for name in names if getattr(source(name), "name", "") != "DEFAULT"}
                code = _measure_and_show(feature, command, shown, values, names)
        if code:
            raise typer.Exit(code)

    parameters = [Parameter("context", Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    parameters += map(_make_argument, command.arguments)
    for group in groups:
        parameters += _list_options(group)
    for name in command.shows:
        kind = str if name == "by" else bool
        parameters.append(_make_parameter(name, kind, DISPLAY[name]))
    if groups and feature.name != "gate":
        parameters.append(_make_parameter("like", str, LIKE))
    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    run.__doc__ = command.description
    return run


def _report_defaults(context: typer.Context, shown: OutputChoice) -> None:
    """Print the values that a project file or earlier results gave, and which of them."""
    project = context.find_root().obj
    given = (
        project.defaults.get(context.command_path.removeprefix("loradiag "), {}) if project else {}
    )
    words = list[str]()
    for name, value in given.items():
        if getattr(context.get_parameter_source(name), "name", "") == "DEFAULT_MAP":
            entries = value if isinstance(value, list) else [value]
            words += [f"{flag(name)} {entry}" for entry in entries]
    if words:
        shown.message(f"From {project.path}: {' '.join(words)}")


def _list_words(argument: Argument, words: Sequence[str] | None) -> list[str]:
    """Return the words of an argument, with the lines of standard input for ``-`` if it
    takes them.
    """
    words = list(words or ())
    if not argument.stdin or "-" not in words:
        return words
    lines = [line.rstrip("\n") for line in sys.stdin if line.strip()]
    return [word for word in words if word != "-"] + lines


def _measure_and_show(
    feature: Feature,
    command: Command,
    shown: OutputChoice,
    values: dict[str, Any],
    option_names: set[str],
) -> int:
    """Call the function of a command with its values and callbacks, show the result, and return the
    exit code.

    The function gets the options of ``option_names``, and those that it has no default for.
    """
    from lora_diag.records import Results, lines_of

    function = feature.function_of(command)
    parameters = signature(function).parameters
    rest = [name for name, each in parameters.items() if each.kind is Parameter.VAR_POSITIONAL]
    needed = {name for name, each in parameters.items() if each.default is Parameter.empty}
    with shown.callbacks(values.get("follow", False)) as callbacks:
        passed = {
            *option_names,
            *needed,
            *(argument.name for argument in command.arguments),
        }.difference(rest)
        named = {name: value for name, value in values.items() if name in passed}
        named |= {name: callback for name, callback in callbacks.items() if name in option_names}
        result = function(*(word for name in rest for word in values[name]), **named)
    is_results = isinstance(result, Results)
    if shown.json and "on_record" not in option_names:
        if is_results:
            lines = lines_of(result.records())
        else:
            models = result if isinstance(result, list) else [result]
            lines = (model.model_dump_json() for model in models)
        for line in lines:
            out.print_json(line)
    if shown.table:
        by = shown.by if "by" in command.shows else values.get("by")
        values = {**values, "per": "layer" if by == "layer" else "type"}
        hint = (
            None
            if values.get("follow")
            else find_hint(feature, command, result, values, option_names)
        )
        if is_results:
            text = catalog.table(result, *out.terminal(), values["per"], hint, values)
        else:
            values |= {"next_command": hint, "verbose": shown.verbose}
            text = catalog.draw_table(feature.load(command.table), result, *out.terminal(), values)
        if values.get("github"):
            out.print_annotated(text, feature.load(command.annotations)(result))
        else:
            out.print_result(text)
    if not is_results:
        return DONE
    out.report_unmeasured(result.unmeasured)
    code: int = feature.load(command.exit_code)(result) if command.exit_code else DONE
    return code or (UNREADABLE if result.unmeasured else DONE)


def _hide_secrets(value: Any) -> Any:
    """Return the value of an argument, with addresses whose text has no secrets.

    >>> _hide_secrets(["a", "https://host/b?signature=c"])
    ['a', 'https://host/b']
    """
    if isinstance(value, list | tuple):
        return type(value)(map(_hide_secrets, value))
    if not isinstance(value, str) or ":/" not in value:
        return value
    from lora_diag.storage.addresses import ADDRESS, Address  # deferred: imports torch

    return Address(value) if ADDRESS.fullmatch(value) else value


def _make_argument(argument: Argument) -> Parameter:
    """Return the parameter of a positional argument."""
    kind: Any = list[str] if argument.many else str
    metavar = argument.metavar or argument.name.upper()
    annotation: Any = Annotated[
        kind | None if argument.optional else kind,
        typer.Argument(metavar=metavar, help=argument.help),
    ]
    default = None if argument.optional else Parameter.empty
    return Parameter(argument.name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _make_parameter(name: str, kind: Any, option: Option) -> Parameter:
    """Return the parameter of an option."""
    annotation: Any = Annotated[_value_type(kind, option), make_typer_option(name, option)]
    return Parameter(
        name, Parameter.KEYWORD_ONLY, default=_format_default(option), annotation=annotation
    )


def _list_options(group: type) -> Iterator[Parameter]:
    """Yield the parameters of a group of options."""
    for name, (kind, option) in list_options(group).items():
        if name == "engine":
            yield from (_make_parameter(name, *declared) for name, declared in CLUSTER.items())
        elif option.cli:
            yield _make_parameter(name, kind, option)


def _format_default(option: Option) -> Any:
    """Return a default in its command-line form: comma-separated numbers, and None for no files.

    >>> (
    ...     _format_default(Option((1e-4, 0.1, 1000), "Numbers.", "X,X,...")),
    ...     _format_default(Option((), "Files.", "FILE")),
    ... )
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
    """Return the first type of a union; another type unchanged."""
    return get_args(kind)[0] if isinstance(kind, UnionType) else kind


def _value_type(kind: Any, option: Option) -> Any:
    """Return the type of an option's command-line value: the first type that the function accepts,
    or None.

    >>> _value_type(str | int | None, Option(None, "Memory limit.", "SIZE"))
    str | None
    >>> _value_type(Sequence[int], Option((4, 8), "Ranks.", "R,R,..."))
    <class 'str'>
    >>> from pathlib import Path
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
    """Return the value of an option from its command-line form; no files give the default.

    >>> _parse_value(Sequence[int], Option((4, 8), "Ranks.", "R,R,..."), "ranks", "4,8,16")
    [4, 8, 16]

    Raises:
        UsageError: It is not a list of numbers.
    """
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
    try:
        return [entry_type(part) for part in text.split(",")]
    except ValueError as error:
        noun, example = (
            ("whole numbers", "4,8,16")
            if entry_type is int
            else ("numbers", _format_default(option))
        )
        raise UsageError(
            Given(name, text),
            f"not a list of {noun}",
            f"separate them by commas, such as {example or '1,0.5'}",
        ) from error


def _gather_group(group: type, values: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a group, parsed from the values of the command line."""
    if "engine" in values:
        for name, (_, option) in CLUSTER.items():
            option.checked(name, values[name])
        values["engine"] = make_cluster(*(values.pop(name) for name in CLUSTER))
    for name, (kind, option) in list_options(group).items():
        if name in values:
            values[name] = _parse_value(kind, option, name, option.checked(name, values[name]))
    if (
        "resume" in values and values.get("output") is not None
    ):  # checked now because opening a model may take minutes
        from lora_diag.records.file import check_results_file

        check_results_file(values["output"], values["resume"], values["overwrite"])
    return values
