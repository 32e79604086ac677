"""A run over layers: check options, open inputs, measure every layer, write records."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from lora_diag.adapters.user_alpha import alpha_option
from lora_diag.layers.task import LayerSettings
from lora_diag.records import LayerRecord, LeftOut, Results, ResultsWriter, Run, RunInput
from lora_diag.running.engines import Layout
from lora_diag.running.engines.schedule import Sized
from lora_diag.running.inputs import Comparison, compare
from lora_diag.running.measuring import (
    DevicePlan,
    check_running,
    layout_of,
    measure_layers,
    plan_device,
    read_memory,
    without_rank,
)
from lora_diag.running.options import LayerOptions, fill_options, settings, stated_alpha
from lora_diag.running.progress import ProgressReporter
from lora_diag.version import __version__

L = TypeVar("L", bound=LayerRecord)
T = TypeVar("T", bound=Sized)
S = TypeVar("S", bound=Any)

# Common settings in a run record, in this order, after a command's own.
RECORDED = ("layers", "exclude", "method", "tol", "device", "seed")


def entry_bytes(task: Sized, settings: Any) -> int:
    """Return the size of a layer's entries in float64."""
    return 8 * math.prod(task.shape)


class LayerRun:
    """One run of a command over layers.

    Args:
        command: Its name in the results file.
        options: Options given by the caller.
        group: The command's options.

    Attributes:
        options: All options, with defaults.
        torch: Whether torch is needed: a command sets it to False, before reading ``where``, if its layers are measured
            with NumPy on the CPU.
        apart: Whether layers are measured in separate processes, one per worker.
        usual_workers: Concurrent layers where the user sets none; None for what cores and memory permit.
        stated_alpha: α of adapters whose files give none.
        own: The command's own options, in the form of the run record.

    Raises:
        UsageError: An option is invalid, or the device does not exist.
    """

    def __init__(self, command: str, options: Mapping[str, object], group: type = LayerOptions) -> None:
        self.command = command
        self.options: dict[str, Any] = fill_options(group, options)
        self.own = settings(group, self.options)
        self.torch = True
        self.apart = False
        self.usual_workers: int | None = None
        self._device = self.options.get("device", "cpu")
        if self.options["engine"] is not None or self._device not in {"auto", "cpu"}:
            self.where  # noqa: B018  (refuses what is not there before any input is opened)
        self._limit = read_memory(self.options.get("memory"), self.options["engine"])
        check_running(self.options["workers"], self.options.get("seed", 0))
        self.stated_alpha = alpha_option(self.options)

    @cached_property
    def where(self) -> DevicePlan:
        """Device of the computation."""
        return (
            plan_device(self.options["engine"], self._device) if self.torch else DevicePlan(self._device, "cpu", "cpu")
        )

    def compare(self, base: Path | str, tuned: Path | str | None) -> Comparison:
        """Open both sides and pair the selected weights.

        Raises:
            InputError: A side cannot be read, the adapter does not fit BASE, or two weights have one name.
            NothingComparedError: The sides have no weight in common.
        """
        names = ("layers", "exclude", "allow_unmatched", "verify")
        selected: dict[str, Any] = {name: self.options[name] for name in names}
        return compare(base, tuned, stated_alpha=self.stated_alpha, **selected)

    def pair(
        self,
        base: Path | str,
        tuned: Path | str | None,
        measure: Callable[..., Sequence[L | LeftOut]],
        size: Callable[..., int] = entry_bytes,
        settings: dict[str, Any] | None = None,
    ) -> Results[L]:
        """Measure every matrix that both sides have: ``measure(delta, settings=LayerSettings(...))``.

        Args:
            base: Base checkpoint; or an adapter, if ``tuned`` is None.
            tuned: Fine-tuned checkpoint or adapter.
            measure: Returns the records of one layer, or why it has none.
            size: Returns the memory needed to measure a layer, in bytes.
            settings: The command's own settings, for the run record.
        """
        compared = self.compare(base, tuned)
        matrices = [delta for delta in compared.pairing.deltas if delta.is_matrix]
        return self.over(
            matrices,
            measure,
            size,
            self.settings(LayerSettings),
            lambda layout, _, __: without_rank(compared.pairing, layout, self.where.here),
            compared.inputs,
            settings or {},
        )

    def settings(self, kind: Callable[..., S], **own: Any) -> S:
        """Return the settings of a diagnostic: its own, and the options common to all diagnostics."""
        common = {name: self.options[name] for name in ("method", "tol", "seed") if name in self.options}
        return kind(**common, device=self.where.tasks if self.options["engine"] else self._device, **own)

    def over(
        self,
        tasks: Sequence[T],
        measure: Callable[..., Sequence[L | LeftOut]],
        size: Callable[..., int],
        settings: S,
        rest: Callable[[Layout, Results[L], S], Iterable[LeftOut]],
        inputs: tuple[RunInput, ...],
        requested: Mapping[str, object],
        recorded: Sequence[str] = RECORDED,
        finish: Callable[[Results[L]], None] | None = None,
    ) -> Results[L]:
        """Measure every layer; write and report each record in the order of the file.

        Args:
            tasks: One per layer, in the order of the file.
            measure: ``measure(task, settings=...)`` returns the records of one layer, or why it has none.
            size: ``size(task, settings=...)`` returns the memory of a running task in bytes.
            settings: A frozen dataclass with a field ``memory``, which is set to the memory limit of a layer in bytes.
            rest: Returns further skipped tensors, given the layout, the records of an interrupted run, and the
                settings.
            inputs: For the run record.
            requested: The command's own settings, for the run record.
            recorded: Names of settings that come last in the run record, in this order.
            finish: Called with the records while the results file is still locked.

        Returns:
            All records of the run, including those of an interrupted run.

        Raises:
            InputError: An input cannot be read, or the file cannot be written.
        """
        options = self.options
        values = {**options, "device": self.where.kind, **requested}
        first = {name: value for name, value in requested.items() if name not in recorded}
        run = Run(
            command=self.command,
            version=__version__,
            inputs=inputs,
            settings={**first, **{name: values[name] for name in recorded}, **stated_alpha(self.options)},
        )
        layout = self.layout(tasks)
        limited: S = replace(settings, memory=layout.limit)
        with ResultsWriter[L](options["output"], run, options["resume"], options["overwrite"]) as writer:
            results = measure_layers(
                writer,
                tasks,
                partial(measure, settings=limited),
                lambda: rest(layout, writer.earlier, limited),
                layout,
                partial(size, settings=limited),
                ProgressReporter(options["on_progress"], options["on_record"]),
                options["engine"],
            )
            if finish is not None:
                finish(results)
        return results

    def layout(self, tasks: Sequence[Sized]) -> Layout:
        """Return the allocation of this machine to layers.

        Raises:
            UsageError: The memory limit is too small for the program itself.
        """
        workers = self.options["workers"] or self.usual_workers
        planned = layout_of(tasks, workers, self.where.kind, self._limit, self.torch)
        return replace(planned, apart=self.apart and (planned.workers or planned.cores) > 1)
