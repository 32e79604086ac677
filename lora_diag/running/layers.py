"""A run of a command over layers: check options, open inputs, measure the layers without a record,
write records.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from lora_diag.adapters.source import get_stated_alpha
from lora_diag.deltas import Pairing, footprint, natural_order
from lora_diag.errors import Given, MemoryLimitError, UsageError
from lora_diag.layers.task import LayerSettings, left_out_rows, left_out_vector
from lora_diag.records import LayerRecord, LeftOut, Results, ResultsWriter, Run, RunInput
from lora_diag.running.amounts import read_bytes
from lora_diag.running.engines import MachineLayout, Ray, layout_for, run_local, run_ray
from lora_diag.running.engines.schedule import Sized
from lora_diag.running.inputs import Comparison, compare
from lora_diag.running.options import (
    G,
    fill_options,
    list_own_settings,
    stated_alpha,
)
from lora_diag.running.progress import Progress, ProgressReporter, RunRecords
from lora_diag.storage import Checkpoint
from lora_diag.version import __version__

L = TypeVar("L", bound=LayerRecord)
T = TypeVar("T", bound=Sized)


# Entries from which the only layer of a run gets all cores: on two, all values of 4096² took 2.1 s
# instead of 3.1 s. At 2048² a second core gains nothing (docs/benchmarks.md).
ALL_CORES_FROM = 3072**2


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """The devices of a run.

    Args:
        tasks: Device of the layers, as in ``--device``.
        kind: Name of that device in the results file, such as ``cuda``.
        here: Device of the measurements in this process: norms, biases, added rows.
    """

    tasks: str
    kind: str
    here: str


def plan_device(engine: Ray | None, device: str) -> DevicePlan:
    """Return the devices; on a cluster they follow from the GPUs of its tasks.

    ``engine`` is None without a cluster.

    Raises:
        UsageError: The device is unknown, does not exist or has no float64, or is not that of the
            cluster's tasks; the cluster's options are invalid, or Ray is not installed.
    """
    if engine is None:
        from lora_diag.linalg.devices import resolve_device  # deferred: imports torch

        return DevicePlan(device, resolve_device(device).type, device)
    engine.check()
    kind = "cuda" if engine.gpus_per_task else "cpu"
    if device not in {"auto", kind}:
        fix = (
            "add $gpus_per_task 1 for cuda"
            if kind == "cpu"
            else "with $gpus_per_task, leave out $device"
        )
        raise UsageError(
            Given("device", device), f"not the device of the cluster's tasks, {kind}", fix
        )
    return DevicePlan(kind, kind, "auto" if kind == "cuda" else "cpu")


def read_memory(text: str | int | None, engine: Ray | None) -> int | None:
    """Return the memory limit of a run in bytes; None without one.

    Raises:
        UsageError: The value is not a size, or the run uses a cluster.
    """
    if text is None:
        return None
    if engine is not None:
        raise UsageError(
            Given("memory"),
            "not available with $engine ray",
            "Ray's scheduler uses the memory of each node",
        )
    return text if isinstance(text, int) else read_bytes(text, "memory")


def check_ranks(ranks: Sequence[int], minimum: int = 1) -> tuple[int, ...]:
    """Return the distinct ranks in ascending order.

    Raises:
        UsageError: There is no rank, or one below ``minimum``.
    """
    if not ranks or min(ranks) < minimum:
        raise UsageError(Given("ranks", ranks), f"ranks must be whole numbers from {minimum} up")
    return tuple(sorted(set(ranks)))


S = TypeVar("S", bound=Any)

# Common settings in a run record, in this order, after a command's own.
RECORDED = ("layers", "exclude", "svd", "tol", "device", "seed")


def entry_bytes(task: Sized, settings: Any) -> int:
    """Return the memory of a layer's entries in float64, in bytes."""
    return 8 * math.prod(task.shape)


class LayerRun(Generic[G]):
    """One run of a command over layers.

    Args:
        command: Its name in the results file.
        options: Options given by the caller.
        group: The command's options.

    Attributes:
        options: All options, with defaults, as the command declares them.
        values: The same options untyped, for code that serves many groups.
        stated_alpha: α of adapters whose files give none.
        own: The command's own options, in the form of the run record.

    Raises:
        UsageError: An option is invalid, a GPU given by name does not exist, or Ray is needed and
            not installed.
        TypeError: An option is unknown or missing.
    """

    def __init__(self, command: str, options: Mapping[str, object], group: type[G]) -> None:
        self.command = command
        self.options = fill_options(group, options)
        self.values = {"engine": None, "verify": False, **cast(dict[str, Any], self.options)}
        self.own = list_own_settings(group, self.values)
        self._torch = True
        self._apart = False
        self._usual_workers: int | None = None
        self._device = self.values.get("device", "cpu")
        if self.values["engine"] is not None or self._device not in {"auto", "cpu"}:
            self.where  # noqa: B018  (refuses what is not there before any input is opened)
        self._limit = read_memory(self.values.get("memory"), self.values["engine"])
        self.stated_alpha = get_stated_alpha(self.values)

    def use_numpy(self, workers: int | None = None, apart: bool = False) -> None:
        """Measure the layers with NumPy on the CPU, without importing torch.

        Called before ``where`` is read.

        Args:
            workers: Concurrent layers where the user sets none; None for what cores and memory
                permit.
            apart: Whether layers are measured in separate processes, one per worker.
        """
        self._torch = False
        self._usual_workers = workers
        self._apart = apart

    @cached_property
    def where(self) -> DevicePlan:
        """The devices of the run.

        Raises:
            UsageError: As ``plan_device``.
        """
        if not self._torch:
            return DevicePlan(self._device, "cpu", "cpu")
        return plan_device(self.values["engine"], self._device)

    def compare(
        self,
        base: Path | str | Checkpoint,
        tuned: Path | str | None,
        role: str | None = None,
        **options: Any,
    ) -> Comparison:
        """Open both sides and pair the selected weights; see ``inputs.compare``.

        Args:
            base: Base checkpoint, which may be open already; or an adapter, if ``tuned`` is None.
            tuned: Fine-tuned checkpoint or adapter.
            role: Role of TUNED in the run record; by default ``tuned`` or ``adapter``.
            **options: Further arguments of ``inputs.compare``, and options in place of those of the
                run.

        Raises:
            InputError: A side cannot be read, the adapter does not fit BASE, or two weights have
                one name.
            NothingComparedError: No weight is selected, or none can be compared.
            UsageError: An input is in the wrong place or is refused, or a selection is not a valid
                regular expression.
        """
        names = ("layers", "exclude", "allow_unmatched", "verify")
        arguments = {name: self.values[name] for name in names} | options
        return compare(base, tuned, stated_alpha=self.stated_alpha, role=role, **arguments)

    def pair(
        self,
        base: Path | str | Checkpoint,
        tuned: Path | str | None,
        measure: Callable[..., Sequence[L | LeftOut]],
        size: Callable[..., int] = entry_bytes,
        own: Mapping[str, object] | None = None,
        settings: Any = None,
    ) -> Results[L]:
        """Measure every matrix that both sides have:
        ``measure(delta, settings=LayerSettings(...))``.

        Args:
            base: Base checkpoint, which may be open already; or an adapter, if ``tuned`` is None.
            tuned: Fine-tuned checkpoint or adapter.
            measure: Returns the records of one layer, or why it has none.
            size: Returns the memory needed to measure a layer, in bytes.
            own: The command's own settings, for the run record.
            settings: Settings of the measurement; default ``LayerSettings`` of the options.

        Returns:
            All records of the run.

        Raises:
            LoradiagError: As ``compare`` and ``over``.
        """
        compared = self.compare(base, tuned)
        settings = self.settings(LayerSettings) if settings is None else settings
        return self.over(
            compared.matrices, measure, size, settings, compared.pairing, compared.inputs, own or {}
        )

    def settings(self, kind: Callable[..., S], **own: Any) -> S:
        """Return the settings of a diagnostic: its own, and the options common to all
        diagnostics.
        """
        names = {"svd": "method", "tol": "tol", "seed": "seed"}
        common = {field: self.values[name] for name, field in names.items() if name in self.values}
        return kind(
            **common, device=self.where.tasks if self.values["engine"] else self._device, **own
        )

    def over(
        self,
        tasks: Sequence[T],
        measure: Callable[..., Sequence[L | LeftOut]],
        size: Callable[..., int],
        settings: S,
        unmeasured: Pairing | Callable[[MachineLayout, str], Iterable[LeftOut]],
        inputs: tuple[RunInput, ...],
        own: Mapping[str, object],
        recorded: Sequence[str] = RECORDED,
        finish: Callable[[Results[L]], None] | None = None,
        conclude: Callable[[RunRecords[L]], None] = lambda records: None,
        rest: Callable[[T, Sequence[L]], T | None] = lambda task, records: None,
    ) -> Results[L]:
        """Measure every layer; write and report each record in the order of the file.

        Args:
            tasks: One per layer, in the order of the file.
            measure: ``measure(task, settings=...)`` returns the records of one layer, or why it has
                none.
            size: ``size(task, settings=...)`` returns the memory of a running task in bytes; the
                memory limit of a layer is enough for any.
            settings: A frozen dataclass with a field ``memory``, which is set to the memory limit
                of a layer in bytes.
            unmeasured: The tensors without a task: of their pairing, 1-D and unpaired tensors are
                recorded as left out; or a function of layout and device that yields their records.
            inputs: For the run record.
            own: The command's own settings, for the run record.
            recorded: Names of settings that come after the command's own in the run record, in this
                order.
            finish: Called with the records while the results file is still locked.
            conclude: Writes the records about the run as a whole, once those of all layers are
                written.
            rest: Returns the part of a task that an interrupted run left out, given its records of
                the task; None if there is none. That part is measured again, and only its
                ``left_out`` records are kept.

        Returns:
            All records of the run, including those of an interrupted run.

        Raises:
            UsageError: The memory limit is too small for the program itself and a small layer of
                every worker, or the output can be neither replaced nor resumed.
            InputError: An input cannot be read, or the file cannot be written.
        """
        options = self.values
        values = {**options, "device": self.where.kind, **own}
        recorded_settings = {name: value for name, value in own.items() if name not in recorded}
        recorded_settings |= {name: values[name] for name in recorded} | stated_alpha(options)
        run = Run(
            command=self.command, version=__version__, inputs=inputs, settings=recorded_settings
        )
        layout = self.layout(tasks)
        settings = replace(settings, memory=layout.limit)
        with ResultsWriter[L](
            options["output"], run, options["resume"], options["overwrite"]
        ) as writer:
            records = RunRecords(
                writer, ProgressReporter(options["on_progress"], options["on_record"])
            )
            results = records.finished
            if results is None:
                earlier: dict[str, list[L]] = {}
                for record in records.layers:
                    earlier.setdefault(record.layer, []).append(record)
                todo = [task for task in tasks if task.layer not in earlier]
                bound = partial(measure, settings=settings)
                limit = math.inf if layout.limit is None else layout.limit

                def estimate_bytes(task: T) -> int:
                    return int(min(size(task, settings=settings), limit))

                left_out = self._measure_tasks(todo, bound, estimate_bytes, layout, records)
                list_unmeasured = (
                    partial(leave_out, unmeasured)
                    if isinstance(unmeasured, Pairing)
                    else unmeasured
                )
                left_out += list_unmeasured(layout, self.where.here)
                for task in tasks:
                    if (
                        task.layer in earlier
                        and (part := rest(task, earlier[task.layer])) is not None
                    ):
                        again = measure(part, settings=replace(settings, device=self.where.here))
                        left_out += [record for record in again if isinstance(record, LeftOut)]
                conclude(records)
                results = records.end(
                    sorted(left_out, key=lambda item: (natural_order(item.layer), item.reason))
                )
            if finish is not None:
                finish(results)
        return results

    def _measure_tasks(
        self,
        tasks: Sequence[T],
        measure: Callable[[T], Sequence[L | LeftOut]],
        size: Callable[[T], int],
        layout: MachineLayout,
        records: RunRecords[L],
    ) -> list[LeftOut]:
        """Measure layers on this machine or a cluster, write their records, and return those of
        skipped layers.
        """
        engine = self.values["engine"]
        run = run_local if engine is None else partial(run_ray, engine=engine)
        names = [*(task.layer for task in tasks), ""]
        entries_done = list(accumulate((math.prod(task.shape) for task in tasks), initial=0))

        def report_progress(done: int) -> None:
            records.watch.progress(
                Progress(names[done], done, len(tasks), entries_done[done], entries_done[-1])
            )

        report_progress(0)
        left_out = list[LeftOut]()
        for done, measured in enumerate(
            run(partial(_measure_or_skip, measure), tasks, layout, size), 1
        ):
            report_progress(done)
            left_out += [record for record in measured if isinstance(record, LeftOut)]
            records.put(*(record for record in measured if not isinstance(record, LeftOut)))
        return left_out

    def layout(self, tasks: Sequence[Sized]) -> MachineLayout:
        """Return the allocation of this machine to layers; one large layer alone gets all cores.

        Raises:
            UsageError: The memory limit is too small for the program itself and a small layer of
                every worker.
        """
        workers = self.values["workers"] or self._usual_workers
        largest = max((math.prod(task.shape) for task in tasks), default=0)
        if workers is None and len(tasks) == 1 and largest >= ALL_CORES_FROM:
            workers = 1
        planned = layout_for(largest, workers, self.where.kind, self._limit, self._torch)
        return replace(planned, apart=self._apart and (planned.workers or planned.cores) > 1)


def _measure_or_skip(
    measure: Callable[[T], Sequence[L | LeftOut]], task: T
) -> Sequence[L | LeftOut]:
    """Return the records of one layer; if it does not fit into memory, a record of it
    as skipped.
    """
    try:
        return measure(task)
    except MemoryLimitError as error:
        norms = {"fro": error.fro, "base_fro": error.base_fro}
        return (
            LeftOut(
                layer=task.layer, shape=task.shape, reason="memory", detail=str(error), **norms
            ),
        )


def leave_out(pairing: Pairing, layout: MachineLayout, device: str) -> Iterator[LeftOut]:
    """Yield the records of the 1-D tensors of a pairing, and of the tensors that could not be
    paired.

    Raises:
        InputError: A file could not be read.
    """
    vectors = [delta for delta in pairing.deltas if not delta.is_matrix]
    yield from run_local(partial(left_out_vector, device=device), vectors, layout, footprint)
    yield from run_local(
        partial(left_out_rows, device=device), pairing.unpaired, layout, lambda unpaired: 0
    )
