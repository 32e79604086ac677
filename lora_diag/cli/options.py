"""The options that several commands share, and how their words are read."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_diag.errors import UsageError

if TYPE_CHECKING:
    from lora_diag import Ray


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
AllowUnmatched = Annotated[
    bool, typer.Option("--allow-unmatched", help="Leave out what an adapter changes and BASE lacks, not stop.")
]
Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda[:i]|mps", help="Where to compute.")]
Method = Annotated[str, typer.Option(metavar="auto|exact|gram|krylov", help="How to compute singular values.")]
Top = Annotated[int | None, typer.Option(metavar="K", help="Keep only the K largest singular values.")]
Tol = Annotated[float, typer.Option(metavar="T", help="Bound to reach on the error of every energy fraction.")]
Ranks = Annotated[str, typer.Option(metavar="R,R,...", help="Ranks r at which C(r) and the errors are given.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the records here (JSONL).")]
Json = Annotated[bool, typer.Option("--json", help="Records on standard output, and nothing else there.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in --output.")]
Verify = Annotated[bool, typer.Option("--verify", help="Hash every byte of the inputs, for --resume to compare.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Seed of the random starts of krylov.")]
PerRow = Annotated[Per, typer.Option(help="One row a module type, or one a layer.")]
Workers = Annotated[int | None, typer.Option(metavar="N", help="Layers at once; default by cores and memory.")]
On = Annotated[Engine, typer.Option("--engine", help="This machine, or a Ray cluster (docs/cluster.md).")]
RayAddress = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="Ray cluster; default RAY_ADDRESS, else a Ray of its own.")
]
GpusPerTask = Annotated[float, typer.Option(metavar="G", help="With --engine ray: GPUs for each layer, or a share.")]
Memory = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="What the program may take, such as 8GB; larger layers in row blocks."),
]
WholeMemory = Annotated[
    str | None,
    typer.Option("--memory", metavar="SIZE", help="What the program may take, such as 8GB; others are left out."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no messages, no table.")]


def cluster(engine: Engine, address: str | None, gpus_per_task: float) -> Ray | None:
    """Return the cluster that was asked for; None for this machine alone.

    Raises:
        UsageError: Something is said of a cluster that is not used.
    """
    if engine is Engine.local:
        if address is not None or gpus_per_task:
            option = "--ray-address" if address is not None else "--gpus-per-task"
            raise UsageError(f"{option}: is of a Ray cluster; add --engine ray")
        return None
    from lora_diag import Ray  # torch comes with it: not before it is needed

    return Ray(address, gpus_per_task)


def check_resume(resume: bool, output: Path | None) -> None:
    """Refuse to go on with a run that was not kept.

    Raises:
        UsageError: That was asked.
    """
    if resume and output is None:
        raise UsageError("--resume: give the results file of the interrupted run with -o")


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
