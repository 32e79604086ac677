"""The options that commands have in common, declared once: the API takes them, the command line spreads them.

A group is a ``TypedDict`` whose fields are annotated with ``Option``; a function takes it as
``**options: Unpack[LayerOptions]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict, get_type_hints

from lora_diag.records import AnyRecord
from lora_diag.running.engines import Ray
from lora_diag.running.measuring import Progress


@dataclass(frozen=True, slots=True)
class Option:
    """One option: its default and what it does."""

    default: Any
    help: str


class RunOptions(TypedDict, total=False):
    """Options of every command that goes over layers.

    Keys:
        layers: Regular expression: only weights whose name contains a match.
        exclude: Regular expression: no weights whose name contains a match.
        allow_unmatched: Leave out what an adapter changes and BASE does not have, instead of stopping.
        device: Where to compute: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        seed: Seed of the random starts of ``krylov``.
        workers: Layers at once; by default as many as fit into memory.
        memory: Memory limit of the process, such as ``"8GB"``; larger layers are processed in row blocks.
        engine: A Ray cluster to measure on; None for this machine.
        output: Results file, appended layer by layer.
        resume: Resume the interrupted run in ``output``.
        overwrite: Replace a file in the place of ``output`` that loradiag did not write.
        verify: Hash every byte of the inputs (SHA-256) for ``resume`` to compare, instead of samples.
        on_progress: Called at the start and after every layer.
        on_record: Called with every record, in the order of the file.
    """

    layers: Annotated[str | None, Option(None, "Only weights whose name contains a match.")]
    exclude: Annotated[str | None, Option(None, "No weights whose name contains a match.")]
    allow_unmatched: Annotated[bool, Option(False, "Leave out what an adapter changes and BASE lacks.")]
    device: Annotated[str, Option("auto", "Where to compute.")]
    seed: Annotated[int, Option(0, "Seed of the random starts of krylov.")]
    workers: Annotated[int | None, Option(None, "Layers at once; default by cores and memory.")]
    memory: Annotated[str | int | None, Option(None, "Memory limit, e.g. 8GB; larger layers in row blocks.")]
    engine: Annotated[Ray | None, Option(None, "Ray cluster; default this machine.")]
    output: Annotated[Path | str | None, Option(None, "Write the records here (JSONL).")]
    resume: Annotated[bool, Option(False, "Resume the interrupted run in --output.")]
    overwrite: Annotated[bool, Option(False, "Replace a file in the place of --output that loradiag did not write.")]
    verify: Annotated[bool, Option(False, "Hash every byte of the inputs, for --resume to compare.")]
    on_progress: Annotated[Callable[[Progress], None] | None, Option(None, "Called after every layer.")]
    on_record: Annotated[Callable[[AnyRecord], None] | None, Option(None, "Called with every record.")]


class MethodOptions(RunOptions, total=False):
    """``RunOptions``, and how singular values are computed.

    Keys:
        method: ``auto``, ``exact``, ``gram`` or ``krylov``.
    """

    method: Annotated[str, Option("auto", "How to compute singular values.")]


class LayerOptions(MethodOptions, total=False):
    """``MethodOptions``, and how well.

    Keys:
        tol: Bound to reach on the error of every energy fraction.
    """

    tol: Annotated[float, Option(1e-4, "Bound to reach on the error of every energy fraction.")]


def filled(group: type, given: dict[str, Any]) -> dict[str, Any]:
    """Return all options of a group: those given, and the defaults of the others.

    Args:
        group: A ``TypedDict`` of options.
        given: What a caller gave.

    Raises:
        TypeError: There is no such option.
    """
    declared = {name: hint.__metadata__[0] for name, hint in get_type_hints(group, include_extras=True).items()}
    if unknown := sorted(set(given) - set(declared)):
        raise TypeError(f"unexpected keyword argument {unknown[0]!r}; there are {', '.join(declared)}")
    return {name: given.get(name, option.default) for name, option in declared.items()}
