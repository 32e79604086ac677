"""The options of commands, and how their words are read.

A command takes a group as one parameter, and ``spread`` shows typer the options in it. A group is a ``TypedDict`` of
``running.options``, whose options a Python function has, too: the command gets a dictionary to pass on. Or it is a
dataclass of options that only the command line has::

    @spread
    def residual(base: Base, tuned: Tuned, *, given: LayerOptions, shown: Rows) -> None:
        with shown.callbacks() as callbacks:
            results = measure(base, tuned, **given, **callbacks)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints, is_typeddict

import typer

from lora_diag.cli.output import as_lines, progress_bar
from lora_diag.errors import UsageError
from lora_diag.running.options import Option, Output, Resuming, Selection, declared

if TYPE_CHECKING:
    from lora_diag.running.engines import Ray


class Engine(StrEnum):
    """What a command runs on."""

    local = "local"
    ray = "ray"


class Per(StrEnum):
    """What one row of a table is."""

    type = "type"
    layer = "layer"


def spelled(group: type, name: str) -> Any:
    """Return the typer option of an option of a group."""
    option: Option = declared(group)[name][1]
    flags = option.flags or (f"--{name.replace('_', '-')}",)
    return typer.Option(*flags, metavar=option.metavar or None, help=option.help)


# What is read is given as words: a Path would make one slash of the two in s3://.
Base = Annotated[
    str, typer.Argument(metavar="BASE", help="Checkpoint before: file, folder, index or address (docs, guides/remote).")
]
Tuned = Annotated[str, typer.Argument(metavar="TUNED", help="Checkpoint after, or an adapter.")]
Json = Annotated[bool, typer.Option("--json", help="Records on standard output, and nothing else there.")]
PerRow = Annotated[Per, typer.Option(help="One row a module type, or one a layer.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no messages, no table.")]
Layers = Annotated[str | None, spelled(Selection, "layers")]
Exclude = Annotated[str | None, spelled(Selection, "exclude")]
Overwrite = Annotated[bool, spelled(Output, "overwrite")]


@dataclass(frozen=True)
class Cluster:
    """What the option ``engine`` of a function is on the command line."""

    engine: Annotated[Engine, typer.Option(help="This machine, or a Ray cluster (docs, guides/cluster).")] = (
        Engine.local
    )
    ray_address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Ray cluster; default RAY_ADDRESS, else a Ray of its own.")
    ] = None
    gpus_per_task: Annotated[
        float, typer.Option(metavar="G", help="With --engine ray: GPUs for each layer, or a share.")
    ] = 0.0

    def value(self) -> Ray | None:
        """Return the cluster; None for this machine alone.

        Raises:
            UsageError: An option of a cluster is given without one.
        """
        if self.engine is Engine.local:
            if self.ray_address is not None or self.gpus_per_task:
                option = "--ray-address" if self.ray_address is not None else "--gpus-per-task"
                raise UsageError(f"{option}: is of a Ray cluster; add --engine ray")
            return None
        from lora_diag.running.engines import Ray  # torch comes with it: not before it is needed

        return Ray(self.ray_address, self.gpus_per_task)


@dataclass(frozen=True)
class Shown:
    """What is shown, and where."""

    json: Json = False
    quiet: Quiet = False

    @property
    def table(self) -> bool:
        """Whether a table is shown."""
        return not (self.json or self.quiet)

    @contextmanager
    def callbacks(self) -> Iterator[dict[str, Any]]:
        """Give the callbacks of a run over layers: a progress bar, and with ``--json`` every record as a line."""
        with progress_bar(self.quiet) as on_progress:
            yield {"on_progress": on_progress, "on_record": as_lines(self.json)}


@dataclass(frozen=True)
class Rows(Shown):
    """What is shown, where, and in which rows."""

    per: PerRow = Per.type


@dataclass(frozen=True)
class Selected:
    """Which weights."""

    layers: Layers = None
    exclude: Exclude = None


@dataclass(frozen=True)
class Written(Shown):
    """Where the records of a probe go.

    Raises:
        UsageError: A run that was not kept should be resumed, or something is in the way of the output.
        InputError: Nothing could be written there.
    """

    output: Annotated[Path | None, spelled(Output, "output")] = None
    resume: Annotated[bool, spelled(Resuming, "resume")] = False
    overwrite: Overwrite = False
    verify: Annotated[bool, spelled(Resuming, "verify")] = False

    def __post_init__(self) -> None:
        check_output(self.output, self.resume, self.overwrite)

    def arguments(self) -> dict[str, Any]:
        """Return what a function of the API takes."""
        given = {name: getattr(self, name) for name in ("output", "resume", "overwrite", "verify")}
        return {**given, "on_record": as_lines(self.json)}


def check_output(output: Path | None, resume: bool, overwrite: bool) -> None:
    """Refuse, before any work, a results file that could not be written.

    Raises:
        UsageError: A run that was not kept should be resumed, or something is in the way of the output.
        InputError: Nothing could be written there.
    """
    if output is not None:
        from lora_diag.records.writing import check_results_file

        check_results_file(output, resume, overwrite)
    elif resume:
        raise UsageError("--resume: give the results file of the interrupted run with -o")


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command whose groups are spread: typer sees their options, and the command gets the groups.

    >>> @spread
    ... def command(base: str, *, given: Selection) -> None:
    ...     print(base, given)
    >>> ", ".join(signature(command).parameters)
    'base, layers, exclude'
    >>> command(base="base/", layers="q_proj", exclude=None)
    base/ {'layers': 'q_proj', 'exclude': None}
    """
    parameters = signature(command, eval_str=True).parameters
    groups = {name: options for name, each in parameters.items() if (options := list(_options(each.annotation)))}

    @wraps(command)
    def gathered(**words: Any) -> None:
        for name, options in groups.items():
            given = {each.name: words.pop(each.name) for each in options}
            words[name] = _gathered(parameters[name].annotation, given)
        command(**words)

    shown = [
        option
        for name, each in parameters.items()
        for option in groups.get(name) or [each.replace(kind=Parameter.KEYWORD_ONLY)]  # typer calls by name
    ]
    gathered.__signature__ = Signature(shown)  # type: ignore[attr-defined]
    return gathered


def _options(group: Any) -> Iterator[Parameter]:
    """Yield the options of a group; nothing if it is none."""
    if is_dataclass(group):
        kinds = get_type_hints(group, include_extras=True)
        for each in fields(group):
            yield Parameter(each.name, Parameter.KEYWORD_ONLY, default=each.default, annotation=kinds[each.name])
    elif is_typeddict(group):
        for name, (kind, option) in declared(group).items():
            if name == "engine":
                yield from _options(Cluster)
            elif option.cli:
                typed: Any = Annotated[_typed(kind), spelled(group, name)]
                yield Parameter(name, Parameter.KEYWORD_ONLY, default=option.default, annotation=typed)


def _typed(kind: Any) -> Any:
    """Return what a word on the command line becomes, of all types that a function takes: the first, or None.

    >>> _typed(str | int | None)
    str | None
    """
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    return kinds[0] | None if type(None) in kinds else kinds[0]


def _gathered(group: Any, given: dict[str, Any]) -> Any:
    """Return a group of what was given.

    Raises:
        UsageError: An option makes no sense beside another, or something is in the way of the output.
        InputError: The output could not be written.
    """
    if is_dataclass(group):
        return group(**given)  # type: ignore[operator]
    if "engine" in given:
        given["engine"] = Cluster(**{each.name: given.pop(each.name) for each in fields(Cluster)}).value()
    if "output" in given:  # now: reading a model may take minutes
        check_output(given["output"], given["resume"], given["overwrite"])
    return given


def parse_ranks(words: str, option: str = "--ranks") -> list[int]:
    """Read ``4,8,16``; ``option`` is what the message names.

    >>> parse_ranks("4,8,16")
    [4, 8, 16]
    """
    try:
        return [int(word) for word in words.split(",")]
    except ValueError as error:
        raise UsageError(f"{option} {words}: give whole numbers with commas, such as 4,8,16") from error


def parse_numbers(words: str, option: str, such: str) -> list[float]:
    """Read numbers with commas between them; a message gives ``such`` as an example.

    >>> parse_numbers("1,0.5", "--weights", "1,0.5")
    [1.0, 0.5]
    """
    try:
        return [float(word) for word in words.split(",")]
    except ValueError as error:
        raise UsageError(f"{option} {words}: give numbers with commas, such as {such}") from error
