"""The options that several commands share, alone and in groups, and how their words are read.

A command takes a group as one parameter, by name, and ``spread`` shows typer the options in it::

    @spread
    def residual(base: Base, tuned: Tuned, *, compared: Compared, written: Written) -> None: ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from lora_diag.cli.output import as_lines
from lora_diag.errors import UsageError

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


# What is read is given as words: a Path would make one slash of the two in s3://.
Base = Annotated[
    str, typer.Argument(metavar="BASE", help="Checkpoint before: file, folder, index or address (docs/remote.md).")
]
Tuned = Annotated[str | None, typer.Argument(metavar="TUNED", help="Checkpoint after, or an adapter.")]
Layers = Annotated[str | None, typer.Option(metavar="REGEX", help="Only weights whose name contains a match.")]
Exclude = Annotated[str | None, typer.Option(metavar="REGEX", help="No weights whose name contains a match.")]
Method = Annotated[str, typer.Option(metavar="auto|exact|gram|krylov", help="How to compute singular values.")]
Tol = Annotated[float, typer.Option(metavar="T", help="Bound to reach on the error of every energy fraction.")]
Json = Annotated[bool, typer.Option("--json", help="Records on standard output, and nothing else there.")]
PerRow = Annotated[Per, typer.Option(help="One row a module type, or one a layer.")]
Workers = Annotated[int | None, typer.Option(metavar="N", help="Layers at once; default by cores and memory.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no messages, no table.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace a file in the way that loradiag did not write; never a link.")
]


@dataclass(frozen=True)
class Selected:
    """Which weights."""

    layers: Layers = None
    exclude: Exclude = None


@dataclass(frozen=True)
class Compared(Selected):
    """Which weights of two sides."""

    allow_unmatched: Annotated[
        bool, typer.Option("--allow-unmatched", help="Leave out what an adapter changes and BASE lacks, not stop.")
    ] = False


@dataclass(frozen=True)
class Shared:
    """How layers share this machine, or a cluster."""

    workers: Workers = None
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="What the program may take, such as 8GB; larger layers in row blocks."),
    ] = None
    engine: Annotated[Engine, typer.Option(help="This machine, or a Ray cluster (docs/cluster.md).")] = Engine.local
    ray_address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Ray cluster; default RAY_ADDRESS, else a Ray of its own.")
    ] = None
    gpus_per_task: Annotated[
        float, typer.Option(metavar="G", help="With --engine ray: GPUs for each layer, or a share.")
    ] = 0.0

    def arguments(self) -> dict[str, Any]:
        """Return what a function of the API takes."""
        given = dict(vars(self), engine=self.cluster())
        del given["ray_address"], given["gpus_per_task"]
        return given

    def cluster(self) -> Ray | None:
        """Return the cluster that was asked for; None for this machine alone.

        Raises:
            UsageError: Something is said of one that is not used.
        """
        if self.engine is Engine.local:
            if self.ray_address is not None or self.gpus_per_task:
                option = "--ray-address" if self.ray_address is not None else "--gpus-per-task"
                raise UsageError(f"{option}: is of a Ray cluster; add --engine ray")
            return None
        from lora_diag.running.engines import Ray  # torch comes with it: not before it is needed

        return Ray(self.ray_address, self.gpus_per_task)


@dataclass(frozen=True)
class Computed(Shared):
    """How, on what and with how much of it."""

    method: Method = "auto"
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda[:i]|mps", help="Where to compute.")] = "auto"
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the random starts of krylov.")] = 0


@dataclass(frozen=True)
class ComputedWhole(Computed):
    """The same where a layer is held whole."""

    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="What the program may take, such as 8GB; others are left out.")
    ] = None


@dataclass(frozen=True)
class Written:
    """Where records go, and what else is said.

    Raises:
        UsageError: A run that was not kept should go on, or something is in the way of the output.
        InputError: Nothing could be written there.
    """

    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the records here (JSONL).")
    ] = None
    json: Json = False
    quiet: Quiet = False
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in --output.")] = False
    overwrite: Overwrite = False
    verify: Annotated[
        bool, typer.Option("--verify", help="Hash every byte of the inputs, for --resume to compare.")
    ] = False

    def __post_init__(self) -> None:
        if self.resume and self.output is None:
            raise UsageError("--resume: give the results file of the interrupted run with -o")
        if self.output is not None:
            self.check(self.output)  # now: a model may take minutes to load

    def check(self, output: Path) -> None:
        """Refuse an output that could not be written."""
        from lora_diag.records.writing import check_results_file

        check_results_file(output, self.resume, self.overwrite)

    @property
    def table(self) -> bool:
        """Whether a table is shown."""
        return not (self.json or self.quiet)

    def arguments(self) -> dict[str, Any]:
        """Return what a function of the API takes."""
        given = {name: getattr(self, name) for name in ("output", "resume", "overwrite", "verify")}
        return {**given, "on_record": as_lines(self.json)}


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command whose groups are spread: typer sees their options, and the command gets the groups.

    >>> @spread
    ... def command(base: str, *, selected: Selected) -> None:
    ...     print(base, selected)
    >>> ", ".join(signature(command).parameters)
    'base, layers, exclude'
    >>> command(base="base/", layers="q_proj", exclude=None)
    base/ Selected(layers='q_proj', exclude=None)
    """
    parameters = signature(command, eval_str=True).parameters
    groups: dict[str, Any] = {
        name: each.annotation for name, each in parameters.items() if is_dataclass(each.annotation)
    }

    @wraps(command)
    def gathered(**words: Any) -> None:
        for name, group in groups.items():
            words[name] = group(**{each.name: words.pop(each.name) for each in fields(group)})
        command(**words)

    shown = [each for parameter in parameters.values() for each in _options(parameter)]
    gathered.__signature__ = Signature(shown)  # type: ignore[attr-defined]
    return gathered


def _options(parameter: Parameter) -> Iterator[Parameter]:
    """Give the parameters of a group, or the one that is no group; all by name, as typer calls."""
    group = parameter.annotation
    if not is_dataclass(group):
        yield parameter.replace(kind=Parameter.KEYWORD_ONLY)
        return
    kinds = get_type_hints(group, include_extras=True)
    for each in fields(group):
        yield Parameter(each.name, Parameter.KEYWORD_ONLY, default=each.default, annotation=kinds[each.name])


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
