"""Record gradients in training: save them as snapshots, or compare them with subspaces at once."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from lora_diag.adapters import match_names
from lora_diag.deltas import row_spans, selector
from lora_diag.diagnostics.overlap.measure import Reference, Subspaces, overlaps
from lora_diag.diagnostics.overlap.record import Overlap
from lora_diag.errors import InputError, UsageError
from lora_diag.files import SNAPSHOT, check_output
from lora_diag.linalg.distance import orthonormalize
from lora_diag.linalg.exact import decompose_factored
from lora_diag.models.callback import TrainingCallback
from lora_diag.models.weights import (
    Frozen,
    Weight,
    average_over_processes,
    is_main,
    is_unscaled,
    weights_of,
)
from lora_diag.records import LeftOut, ResultsWriter, Run, RunInput, totals
from lora_diag.records.names import module_type_of
from lora_diag.storage.safetensors import write_safetensors
from lora_diag.storage.tensors import TensorInfo
from lora_diag.version import __version__


def read_live_subspaces(weight: Frozen, step: int, ranks: Sequence[int]) -> Subspaces | LeftOut:
    """Return the subspaces spanned by the factors of the LoRA around a weight.

    If the LoRA is zero or not finite, return a ``left_out`` record.

    Args:
        weight: The weight.
        step: Number of updates so far.
        ranks: Ranks besides the LoRA's own; larger ones are skipped.
    """
    shape = (weight.shape[0], weight.shape[1])
    b, a, sizes = weight.factors()
    factors = decompose_factored(b.double() * sizes, a.double(), vectors=True)
    if factors.fro == 0.0 or not bool(torch.isfinite(factors.s).all()):
        problem = "zero" if factors.fro == 0.0 else "not finite"
        detail = f"step {step}: the LoRA is {problem}, so it spans no subspaces"
        return LeftOut(layer=weight.name, shape=shape, reason="no_reference", detail=detail)
    own_rank, (u, vh) = len(factors.s), factors.vectors
    measured_ranks = tuple(sorted({*(rank for rank in ranks if rank < own_rank), own_rank}))
    return Subspaces(
        weight.name, orthonormalize(u), orthonormalize(vh.T), measured_ranks, "factored", "resolved"
    )


_LOG = logging.getLogger(__name__)

# float16 is not among them: it flushes gradients below 6e-8 to zero.
DTYPES = ("float32", "bfloat16")


class GradientRecorder(TrainingCallback):
    r"""Record the gradient of every selected matrix that is trained or frozen under a LoRA, at
    every n-th update.

    Pass it to a transformers Trainer (``Trainer(..., callbacks=[recorder])``), or use it in your
    own loop::

        with GradientRecorder("gradients", every=100).attach(model) as recorder:
            for batch in batches:
                loss(model, batch).backward()  # as often as gradients are accumulated
                recorder.step(scaler)  # before clipping and before optimizer.step()
                ...

    The gradient of step t is ∂L/∂W at the weights after t updates, summed over the backward passes
    of one update, with the loss scale of mixed precision removed. For trained weights it is the
    gradient of the weight; for weights frozen under a LoRA it is Σ δy xᵀ from the inputs and output
    gradients of the layer (``models.weights``).

    Args:
        output: Without a reference: a folder for one safetensors file per step, as read by
            ``overlap`` and ``spectrum --gradients``. With one: a new results file for the overlap
            records.
        every: Record the steps 0, ``every``, 2·``every``, ….
        reference: Subspaces to compare gradients with, from ``lora_diag.subspaces``; or ``live``
            for the current subspaces of the LoRA at each step; None to save the gradients.
        layers: Regular expression; only weights whose name contains a match. None for all.
        exclude: Regular expression; no weights whose name contains a match. None to exclude none.
        dtype: Dtype of the saved gradients, ``float32`` or ``bfloat16``.
        ranks: With ``live``: ranks besides the LoRA's own.
        log: With a reference: called with ``summary_of`` the records of every step that has some,
            on the main process; ``log_to`` connects it to a Trainer's log.

    Attributes:
        records: The overlap records so far, on the main process; empty without a reference.

    Raises:
        UsageError: An argument is invalid.
    """

    def __init__(
        self,
        output: Path | str,
        *,
        every: int = 100,
        reference: Reference | Literal["live"] | None = None,
        layers: str | None = None,
        exclude: str | None = None,
        dtype: str = "float32",
        ranks: Sequence[int] = (),
        log: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        if every < 1:
            raise UsageError(f"every={every}: must be at least 1")
        if dtype not in DTYPES:
            raise UsageError(f"dtype={dtype!r}: use {' or '.join(DTYPES)}")
        if isinstance(reference, str) and reference != "live":
            raise UsageError(f"reference={reference!r}: give lora_diag.subspaces(...) or 'live'")
        self.output, self.every, self.reference, self.dtype, self.log = (
            Path(output),
            every,
            reference,
            dtype,
            log,
        )
        self.records: list[Overlap] = []
        self._is_selected, self._settings = (
            selector(layers, exclude),
            {"layers": layers, "exclude": exclude},
        )
        if any(rank < 1 for rank in ranks):
            raise UsageError(f"ranks={list(ranks)}: must be at least 1")
        self._ranks = tuple(ranks)
        self._weights: list[Weight] = []
        self._hook_removers: list[Callable[[], None]] = []
        self._targets: dict[str, list[tuple[Subspaces, int]]] = {}
        self._writer: ResultsWriter[Overlap] | None = None
        self._left_out: list[LeftOut] = []
        self._step = 0
        self._clipped = False

    # --- in a loop of one's own
    # -----------------------------------------------------------------------------------

    def attach(self, model: nn.Module, step: int = 0) -> Self:
        """Find the weights of a model, hook those frozen under a LoRA, and open the results file of
        a reference.

        Return the recorder.

        Args:
            model: The model, possibly with adapters and data-parallel wrappers.
            step: Number of updates so far.

        Raises:
            UsageError: The recorder is attached already, the model has nothing to record or
                compare, its weights are sharded over processes, the results file exists, or a
                snapshot in the folder may not be replaced.
            InputError: The output cannot be written.
        """
        if self._hook_removers or self._weights:
            raise UsageError("the recorder is already attached; close it first")
        weights, unread = weights_of(model, self._is_selected)
        for name, why in unread.items():
            _LOG.warning("%s: its gradient is not recorded: %s", name, why)
        if not weights:
            raise UsageError(
                "nothing to record: no selected matrix is trained or frozen under a LoRA"
            )
        if self.reference is not None:
            self._prepare(self.reference, weights)
        elif is_main():
            for earlier in self.output.glob("grad_step*.safetensors"):
                check_output(earlier, SNAPSHOT)
        self._weights = weights
        self._hook_removers = [
            weight.hook() for weight in self._weights if isinstance(weight, Frozen)
        ]
        self._begin(step)
        return self

    def step(self, scaler: Any = None) -> None:
        """Record if a snapshot is due; call after the last backward pass of an update, before
        clipping and the update.

        Args:
            scaler: The ``torch.amp.GradScaler`` of fp16 training, whose loss scale is removed.

        Raises:
            UsageError: A snapshot is due, and no selected weight has a gradient.
            InputError: The output cannot be written.
        """
        self._record(scaler)
        self._begin(self._step + 1)

    def close(self, finished: bool = True) -> None:
        """Remove the hooks, and end the results file.

        Args:
            finished: False to end the file without ``left_out`` records and last line, as that of
                an interrupted run.

        Raises:
            InputError: The results file cannot be written.
        """
        for remove_hook in self._hook_removers:
            remove_hook()
        self._hook_removers, self._weights, self._targets = [], [], {}
        if self._writer is not None:
            with self._writer as writer:
                if finished:
                    writer.append(*self._left_out, totals(self.records, self._left_out))
            self._writer = None

    # --- in a Trainer
    # ---------------------------------------------------------------------------------------------

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin an update; called once for all its backward passes."""
        self._begin(state.global_step)

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Record if due, as ``step`` does; gradients of trained weights are clipped if the Trainer
        has a norm limit.
        """
        self._clipped = args.max_grad_norm > 0
        self._record(getattr(optimizer, "scaler", None))

    # --- shared by both
    # ---------------------------------------------------------------------------------------------

    def _begin(self, step: int) -> None:
        """Begin the update after ``step`` updates; hooks of frozen weights collect its gradients if
        they are due.
        """
        self._step = step
        for weight in self._weights:
            if isinstance(weight, Frozen):
                weight.start(step % self.every == 0)

    def _prepare(self, reference: Reference | Literal["live"], weights: Sequence[Weight]) -> None:
        """Match the weights to the layers of the reference; on the main process, open the results
        file.

        Raises:
            UsageError: No weight is a layer of the reference, or frozen under a LoRA; or the output
                exists.
            InputError: The output cannot be written.
        """
        if isinstance(reference, Reference):
            self._targets = {}
            matched, _ = match_names(
                {weight.name: weight.shape for weight in weights}, reference.base
            )
            for weight in weights:
                for location in matched.get(weight.name, ()):
                    if location.layer in reference.layers:
                        first = location.index * (weight.shape[1] if len(weight.shape) == 3 else 0)
                        start = first + (location.rows[0] if location.rows else 0)
                        self._targets.setdefault(weight.name, []).append(
                            (reference.layers[location.layer], start)
                        )
            if not self._targets:
                raise UsageError(
                    "no selected weight of the model is a layer of the reference, which has layers "
                    f"like {next(iter(reference.layers), 'none')}"
                )
            reached = {spaces.layer for targets in self._targets.values() for spaces, _ in targets}
            self._left_out = [*reference.left_out]
            self._left_out += [
                LeftOut(
                    layer=name,
                    shape=layer.shape,
                    reason="no_gradient",
                    detail="not trained, or not selected",
                )
                for name, layer in reference.layers.items()
                if name not in reached
            ]
        elif not any(isinstance(weight, Frozen) for weight in weights):
            raise UsageError("reference='live': no selected weight is frozen under a LoRA")
        if not is_main():
            return
        if self.output.exists():
            raise UsageError(
                f"{self.output}: exists; give another name for the overlap records, or delete it "
                "first"
            )
        if isinstance(reference, Reference):
            inputs, settings = reference.inputs, reference.settings
        else:
            kind = "the LoRA in training, as it was at each step"
            inputs = (RunInput(role="adapter", path=reference, kind=kind, tensors=len(weights)),)
            settings = {"ranks": list(self._ranks)}
        settings = {**settings, **self._settings, "every": self.every}
        run = Run(command="overlap", version=__version__, inputs=inputs, settings=settings)
        self._writer = ResultsWriter(self.output, run)

    def _record(self, scaler: Any) -> None:
        """Save or compare the gradients, on the main process, if a snapshot is due; other processes
        only average them.

        Raises:
            UsageError: No selected weight has a gradient.
            InputError: The output cannot be written.
        """
        if self._step % self.every:
            return
        made = (
            (weight.name, self._make_gradient_reader(weight, scaler)) for weight in self._weights
        )
        readers = {name: reader for name, reader in made if reader is not None}
        if not readers:
            raise UsageError(
                f"step {self._step}: no selected weight has a gradient; call step() after "
                "backward() and before "
                "zero_grad(); DeepSpeed does not expose gradients, so they cannot be recorded"
            )
        if not is_main():
            return
        if self.reference is None:
            self._save(readers)
        else:
            self._measure(readers)

    def _make_gradient_reader(self, weight: Weight, scaler: Any) -> Callable[[], Tensor] | None:
        """Return a function for the gradient, averaged over processes and without the loss scale;
        None without one.
        """
        gradient = (
            average_over_processes(weight) if isinstance(weight, Frozen) else weight.gradient()
        )
        if gradient is None:
            return None
        scale = 1.0
        if scaler is not None and (isinstance(weight, Frozen) or not is_unscaled(scaler)):
            scale = float(scaler.get_scale())
        unscaled = gradient.detach()
        return lambda: unscaled if scale == 1.0 else unscaled.float() / scale

    def _save(self, readers: dict[str, Callable[[], Tensor]]) -> None:
        """Write the snapshot of this step, one gradient at a time; create the folder if needed.

        Raises:
            InputError: The output cannot be written.
        """
        try:
            self.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.output}: cannot be written: {error.strerror}") from error
        shapes = {weight.name: weight.shape for weight in self._weights}
        write_safetensors(
            self.output / f"grad_step{self._step:06d}.safetensors",
            {name: TensorInfo(name, shapes[name], self.dtype) for name in readers},
            lambda name: readers[name]().to(getattr(torch, self.dtype)),
            {
                "clipped": "trained weights: yes; weights under a LoRA: no"
                if self._clipped
                else "no",
                "kind": "gradient",
                "step": str(self._step),
            },
            SNAPSHOT,
        )

    def _measure(self, readers: dict[str, Callable[[], Tensor]]) -> None:
        """Compare every gradient with its subspaces; keep, write and log the records, and keep what
        is left out.
        """
        records: list[Overlap] = []
        for weight in self._weights:
            if weight.name not in readers:
                continue
            gradient = readers[weight.name]()
            targets = self._targets.get(weight.name, [])
            if self.reference == "live" and isinstance(weight, Frozen):
                current = read_live_subspaces(weight, self._step, self._ranks)
                if isinstance(current, LeftOut):
                    self._left_out.append(current)
                    continue
                targets = [(current, 0)]
            for spaces, start in targets:
                blocks = _slice_blocks(gradient, spaces.shape, start)
                measured = overlaps(_move_to_device(spaces, gradient), self._step, blocks)
                records += [record for record in measured if isinstance(record, Overlap)]
                self._left_out += [record for record in measured if isinstance(record, LeftOut)]
        if records and self._writer is not None:
            self._writer.append(*records)
        self.records += records
        if self.log is not None and records:
            self.log(summary_of(records))


def summary_of(records: Sequence[Overlap]) -> dict[str, float]:
    """Return the medians over the layers of one step by name, such as
    ``overlap/r8/kappa/mlp.up_proj``.

    Those of κ, the tangent overlap and their baselines for each rank; those of κ also for each
    module type. Zero gradients are not counted.
    """
    medians: dict[str, float] = {}
    for rank in sorted({record.rank for record in records}):
        nonzero = [record for record in records if record.rank == rank and record.kappa is not None]
        if not nonzero:
            continue
        for name in ("kappa", "kappa_random", "tangent", "tangent_random"):
            medians[f"overlap/r{rank}/{name}"] = median(getattr(record, name) for record in nonzero)
        for module_type in dict.fromkeys(module_type_of(record.layer) for record in nonzero):
            kappas = [
                record.kappa or 0.0
                for record in nonzero
                if module_type_of(record.layer) == module_type
            ]
            medians[f"overlap/r{rank}/kappa/{module_type}"] = median(kappas)
    return medians


def _move_to_device(spaces: Subspaces, gradient: Tensor) -> Subspaces:
    """Return the subspaces on the gradient's device; unchanged if that does not support float64
    (MPS).
    """
    if gradient.device == spaces.u.device or gradient.device.type == "mps":
        return spaces
    return replace(spaces, u=spaces.u.to(gradient.device), v=spaces.v.to(gradient.device))


def _slice_blocks(gradient: Tensor, shape: tuple[int, int], start: int) -> list[Tensor]:
    """Return row blocks of a layer's part of a gradient: its rows from ``start`` on, counted over
    stacked matrices.
    """
    rows = gradient.reshape(math.prod(gradient.shape) // shape[1], shape[1])[
        start : start + shape[0]
    ]
    return [rows[first:last] for first, last in row_spans(shape)]
