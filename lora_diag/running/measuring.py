"""The loop of a command over its layers: keep existing records, measure, report and write the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from lora_diag.deltas import Pairing, footprint, natural_order
from lora_diag.errors import MemoryLimitError, UsageError
from lora_diag.layers.left_out import left_out_rows, left_out_vector
from lora_diag.records import LayerRecord, LeftOut, Results, ResultsWriter
from lora_diag.running.amounts import read_bytes
from lora_diag.running.engines import Layout, Ray, layout_for, run_local, run_ray
from lora_diag.running.engines.schedule import Sized
from lora_diag.running.progress import Progress, ProgressReporter, RunRecords

L = TypeVar("L", bound=LayerRecord)
T = TypeVar("T", bound=Sized)


# Entries from which the only layer of a run gets all cores: on two, all values of 4096² took 2.1 s instead of 3.1 s. At
# 2048² a second core gains nothing (docs/benchmarks.md).
ALL_CORES_FROM = 3072**2


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """The device of a computation.

    Args:
        tasks: Device of the layers, as in ``--device``.
        kind: Its name in the results file, such as ``cuda``.
        here: Device of the measurements in this process: norms, biases, added rows.
    """

    tasks: str
    kind: str
    here: str


def plan_device(engine: Ray | None, device: str) -> DevicePlan:
    """Return the device; on a cluster it follows from the GPUs of its tasks.

    Raises:
        UsageError: The device does not exist, or the cluster's tasks have no GPU.
    """
    if engine is None:
        from lora_diag.linalg import resolve_device  # deferred: imports torch

        return DevicePlan(device, resolve_device(device).type, device)
    engine.check()
    kind = "cuda" if engine.gpus_per_task else "cpu"
    if device not in {"auto", kind}:
        fix = "add --gpus-per-task 1 for cuda" if kind == "cpu" else "with --gpus-per-task, leave out --device"
        raise UsageError(f"--device {device}: not the device of the cluster's tasks, {kind}; {fix}")
    return DevicePlan(kind, kind, "auto" if kind == "cuda" else "cpu")


def layout_of(
    tasks: Sequence[Sized], workers: int | None, device: str, memory: int | None = None, torch: bool = True
) -> Layout:
    """Return the allocation of this machine, determined by the largest layer; one large layer alone gets all cores.

    Args:
        tasks: One per layer; may be empty.
        workers: Concurrent layers; None to choose.
        device: Device of the computation, such as ``cuda``.
        memory: Memory limit of the whole program in bytes; None for the need of the largest matrix.
        torch: Whether layers are computed with torch.

    Raises:
        UsageError: The memory limit is too small for the program itself.
    """
    largest = max((math.prod(task.shape) for task in tasks), default=0)
    if workers is None and len(tasks) == 1 and largest >= ALL_CORES_FROM:
        workers = 1
    return layout_for(largest, workers, device, memory, torch)


def read_memory(text: str | int | None, engine: Ray | None) -> int | None:
    """Parse the memory limit of a run.

    Raises:
        UsageError: The value is not a size, or the run uses a cluster.
    """
    if text is None:
        return None
    if engine is not None:
        raise UsageError("--memory: not available with --engine ray; Ray's scheduler uses the memory of each node")
    return text if isinstance(text, int) else read_bytes(text, "--memory")


def _measure_or_skip(measure: Callable[[T], Sequence[L | LeftOut]], task: T) -> Sequence[L | LeftOut]:
    """Measure one layer; if it does not fit into memory, return a record with that reason."""
    try:
        return measure(task)
    except MemoryLimitError as error:
        detail = {"detail": str(error), "fro": error.fro, "base_fro": error.base_fro}
        return (LeftOut(layer=task.layer, shape=task.shape, reason="memory", **detail),)


def measure_layers(
    writer: ResultsWriter[L],
    tasks: Sequence[T],
    measure: Callable[[T], Sequence[L | LeftOut]],
    rest: Callable[[], Iterable[LeftOut]],
    layout: Layout,
    size: Callable[[T], int],
    watch: ProgressReporter,
    engine: Ray | None = None,
) -> Results[L]:
    """Measure the layers that are not in the results file; write and report each record in the order of the file.

    Args:
        writer: The results file, with the records of an earlier run.
        tasks: One per layer, in the order of the file.
        measure: A diagnostic with its settings bound; returns the records of one layer, or why it has none.
        rest: Further skipped tensors, measured after the layers.
        layout: Allocation of the machine.
        size: Returns the memory of a running task in bytes.
        watch: Callbacks.
        engine: A cluster to measure on; None for this machine only.

    Returns:
        All records of the run, including earlier ones.

    Raises:
        InputError: An input cannot be read, or the file cannot be written.
    """
    kept = RunRecords(writer, watch)
    if kept.finished is not None:
        return kept.finished
    measured = {record.layer for record in kept.layers}
    todo = [task for task in tasks if task.layer not in measured]
    left_out = list[LeftOut]()
    run = partial(run_ray, engine=engine) if engine is not None else run_local
    for records in _report_progress(run(partial(_measure_or_skip, measure), todo, layout, size), todo, watch):
        left_out += [record for record in records if isinstance(record, LeftOut)]
        kept.put(*(record for record in records if not isinstance(record, LeftOut)))
    return kept.end(sorted([*left_out, *rest()], key=lambda record: (natural_order(record.layer), record.reason)))


def _report_progress(
    measured: Iterator[Sequence[L | LeftOut]], todo: Sequence[T], watch: ProgressReporter
) -> Iterator[Sequence[L | LeftOut]]:
    sizes = [math.prod(task.shape) for task in todo]
    names = [task.layer for task in todo] + [""]
    entries_done, entries = 0, sum(sizes)
    watch.progress(Progress(names[0], 0, len(todo), 0, entries))
    for done, records in enumerate(measured, 1):
        entries_done += sizes[done - 1]
        watch.progress(Progress(names[done], done, len(todo), entries_done, entries))
        yield records


def without_rank(pairing: Pairing, layout: Layout, device: str) -> Iterator[LeftOut]:
    """Yield the records of 1-D tensors and of tensors that could not be paired."""
    vectors = [delta for delta in pairing.deltas if not delta.is_matrix]
    yield from run_local(partial(left_out_vector, device=device), vectors, layout, footprint)
    yield from record_unpaired(pairing, layout, device)


def record_unpaired(pairing: Pairing, layout: Layout, device: str) -> Iterator[LeftOut]:
    """Yield the records of tensors that could not be paired."""
    measure = partial(left_out_rows, device=device)
    yield from run_local(measure, pairing.unpaired, layout, lambda unpaired: 0)


def check_ranks(ranks: Sequence[int], minimum: int = 1) -> tuple[int, ...]:
    """Return the distinct ranks in ascending order.

    Raises:
        UsageError: There is no rank, or one below ``minimum``.
    """
    if not ranks or min(ranks) < minimum:
        raise UsageError(f"--ranks {','.join(map(str, ranks))}: ranks must be whole numbers from {minimum} up")
    return tuple(sorted(set(ranks)))


def check_running(workers: int | None, seed: int) -> None:
    """Check numeric options before any input is opened.

    Raises:
        UsageError: A number is out of range.
    """
    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers}: must be at least 1")
    if not 0 <= seed < 2**63:
        raise UsageError(f"--seed {seed}: must be a whole number from 0 to 2^63 - 1")
