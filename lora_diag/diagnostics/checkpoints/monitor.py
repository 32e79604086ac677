"""Measure the updates of a model in training: the records of ``checkpoints``, without checkpoints.

Of a LoRA, all numbers follow from r×r products of its factors, as in ``factors``; the products are
computed on the device of the factors, and their eigenvalues on the CPU. Of a weight that is trained
itself, ``ROWS`` rows are sampled.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from lora_diag.catalog import read_results
from lora_diag.deltas import natural_order, selector
from lora_diag.diagnostics.checkpoints.factors import Array, UpdateFactors
from lora_diag.diagnostics.checkpoints.measure import OVERFLOW, describe_increment, describe_values
from lora_diag.diagnostics.checkpoints.record import CheckpointLayer, RunCheckpoint, group_by
from lora_diag.diagnostics.checkpoints.series import MONITOR, Step, make_series
from lora_diag.diagnostics.checkpoints.trainer import collect_log
from lora_diag.diagnostics.checkpoints.verdict import SPIKED, judge_trajectory, pool_checkpoints
from lora_diag.errors import LoradiagError, UsageError
from lora_diag.files import RESULTS, check_output, lock
from lora_diag.linalg.exact import decompose_factored
from lora_diag.models.callback import TrainingCallback
from lora_diag.models.weights import Frozen, Trained, Weight, is_main, is_sharded, weights_of
from lora_diag.records import LeftOut, ResultsWriter, Run, RunInput, totals
from lora_diag.rendering.text import list_names
from lora_diag.running.fingerprint import legible
from lora_diag.thin import MAX_GRAM_ERROR, Grams, thin_energies
from lora_diag.version import __version__

_LOG = logging.getLogger(__name__)

# Role of the input of a run that was measured while it trained.
ROLE = "training"

# Entries of factors, over all of their layers, that are multiplied at once: 16 MiB in float64, ten
# times.
PART_ENTRIES = 2**21

# Rows that stand for all of a weight that is trained itself. Their error is in the record: 3% of
# ‖ΔW‖ where the energies of the rows differ by half of their mean.
ROWS = 64

# Ranks r of C(r).
RANKS = (1, 4, 16)

# The fields of a checkpoint's record that are logged.
_LOGGED = {
    "fro",
    "relative",
    "increment",
    "cosine",
    "spectral_share",
    "effective_rank",
    "dead",
    "non_finite",
}

# Rules of ``stop_on``: the layers that ``checkpoints`` counts in the record of a run.
RULES = ("dead", "non_finite", "collapsed", "spiked", "frozen")

# Measurements that the rules look back on: of ``checkpoints``, the whole run.
LOOK_BACK = 16


@dataclass(frozen=True, slots=True)
class _Moment:
    """The updates B·diag(c)·A of L layers at one time.

    Args:
        b: B ``(L, m, r)``.
        a: A ``(L, r, n)``.
        c: c ``(L, r)``, float64.
        known: Whether each update is finite and known.
        square: ‖D_t‖_F² of each increment ``(L,)``.
    """

    b: Tensor
    a: Tensor
    c: Tensor
    known: list[bool]
    square: Array

    def sides(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return B·diag(c) ``(L, m, r)`` and Aᵀ ``(L, n, r)`` in float64 on a device."""
        return self.b.to(device).double() * self.c.to(device)[:, None], self.a.to(
            device
        ).double().mT

    def keep(self, known: list[bool], square: Array) -> _Moment:
        """Return a copy on the CPU, with zeros in place of entries that are not finite."""
        b, a, c = (torch.nan_to_num(each.cpu(), 0.0, 0.0, 0.0) for each in (self.b, self.a, self.c))
        return _Moment(b, a, c, known, square)


@dataclass
class _ShapeGroup:
    """Layers under a LoRA whose factors have one shape, which are measured together.

    Args:
        weights: The layers.
        base_fro: ‖W_base‖_F of each; None if it is not known.
        window: The last two moments; the first one, when the monitor attaches, is known by itself
            only.
    """

    weights: list[Frozen]
    base_fro: list[float | None]
    window: list[_Moment] = field(default_factory=list)

    def __post_init__(self) -> None:
        now = self._read()
        nothing = np.zeros(len(self.weights))
        self.window = [now.keep([known] * len(self.weights), nothing) for known in (False, True)]

    def _read(self) -> _Moment:
        """Return the factors as they are now, on their device."""
        b, a, c = (
            torch.stack(each)
            for each in zip(*(weight.factors() for weight in self.weights), strict=True)
        )
        if b.device.type == "mps":  # has no float64
            b, a, c = b.cpu(), a.cpu(), c.cpu()
        return _Moment(b, a, c, [], np.zeros(0))

    def measure(self, step: int) -> list[CheckpointLayer]:
        """Return the records of the layers, and keep their factors for the next time."""
        moment = self._read()
        b, a, size = moment.b, moment.a, len(self.weights)
        first, before = (moment.sides(b.device) for moment in self.window)
        now = moment.sides(b.device)
        square, product = _multiply_increments(now, before, first)
        equal = [(x == y).sum((1, 2)) for x, y in zip(now, before, strict=True)]
        unchanged = ((equal[0] + equal[1]) / (b[0].numel() + a[0].numel())).tolist()
        left, right = (
            Grams((side.mT @ side).cpu().numpy(), np.full(size, side.shape[1])) for side in now
        )
        values = thin_energies(left, right, np.ones(size))
        finite = np.isfinite(
            left.products.sum(axis=(1, 2)) + right.products.sum(axis=(1, 2))
        ).tolist()
        records = []
        for i, (weight, base_fro) in enumerate(zip(self.weights, self.base_fro, strict=True)):
            s, fro = values.s[i], float(values.fro[i])
            if finite[i]:
                if values.energy_error[i] > MAX_GRAM_ERROR:
                    exact = decompose_factored(now[0][i], now[1][i].mT)
                    s, fro = np.asarray(exact.s, np.float64), exact.fro
                was_known, is_known = (each.known[i] for each in self.window)
                earlier = self.window[1].square[i] if was_known and is_known else None
                fields = describe_values(s, fro, RANKS) | {
                    "unchanged": unchanged[i] if is_known else None
                }
                fields |= describe_increment(square[i] if is_known else None, earlier, product[i])
                fields["relative"] = fro / base_fro if base_fro else None
            else:
                problem = UpdateFactors(
                    b[i].double().cpu().numpy(), a[i].double().cpu().numpy()
                ).find_problem()
                fields = {"fro": None, "non_finite": problem or OVERFLOW}
            shape = (b.shape[1], a.shape[2])
            records.append(
                CheckpointLayer(
                    layer=weight.name, step=step, shape=shape, base_fro=base_fro, **fields
                )
            )
        self.window = [self.window[1], moment.keep(finite, square)]
        return records


Sides = tuple[Tensor, Tensor]


def _multiply_increments(now: Sides, before: Sides, first: Sides) -> tuple[Array, Array]:
    """Return ‖D_t‖_F² and ⟨D_t, D_{t−1}⟩ of D_t = ΔW_t − ΔW_{t−1} = [δB_t B_{t−1}] [A_t; δA_t] of L
    layers, ``(L,)``.

    As in ``factors``, a small increment of a large update loses no digits.

    Args:
        now: B_t ``(L, m, r)`` and A_tᵀ ``(L, n, r)``.
        before: The same at t − 1.
        first: The same at t − 2.
    """
    (b, a), (b_before, a_before), (b_first, a_first) = now, before, first
    left, right = torch.cat([b - b_before, b_before], -1), torch.cat([a, a - a_before], -1)
    other = (
        torch.cat([b_before - b_first, b_first], -1),
        torch.cat([a_before, a_before - a_first], -1),
    )
    square = ((left.mT @ left) * (right.mT @ right)).sum((1, 2))
    product = ((left.mT @ other[0]) * (right.mT @ other[1])).sum((1, 2))
    return square.cpu().numpy(), product.cpu().numpy()


@dataclass
class _Rows:
    """A weight that is trained itself, of which rows are sampled.

    Args:
        weight: The weight.
        base_fro: ‖W‖_F when training began; None if it is not known.
        rows: The sampled rows, ascending.
        start: Their values when training began; None if they are not known.
        window: Their values at the last two moments; None where they are not known or not finite.
    """

    weight: Trained
    base_fro: float | None
    rows: Tensor
    start: Tensor | None
    window: list[Tensor | None]

    @classmethod
    def sample(cls, weight: Trained, is_start: bool) -> _Rows:
        """Sample rows that depend on the weight's name alone."""
        seed = int.from_bytes(hashlib.sha256(weight.name.encode()).digest()[:7])
        chosen = (
            torch.randperm(weight.shape[0], generator=torch.Generator().manual_seed(seed))[:ROWS]
            .sort()
            .values
        )
        now = _read_rows(weight, chosen)
        base_fro, start = (_norm(weight.parameter), now) if is_start else (None, None)
        return cls(weight, base_fro, chosen, start, [None, now])

    def measure(self, step: int) -> list[CheckpointLayer]:
        """Return the record of the weight, and keep its rows for the next time."""
        norm, (first, before) = _norm(self.weight.parameter), self.window
        now = None if norm is None else _read_rows(self.weight, self.rows)
        whole, change, earlier = (
            _subtract(now, self.start),
            _subtract(now, before),
            _subtract(before, first),
        )
        rows, columns = self.weight.shape
        fields = _estimate_norm("fro", whole, rows) | _estimate_norm("increment", change, rows)
        fro, cosine = fields["fro"], None
        if change is not None and earlier is not None and change.any() and earlier.any():
            cosine = float(torch.cosine_similarity(change.flatten(), earlier.flatten(), 0))
        self.window = [before, now]
        return [
            CheckpointLayer(
                layer=self.weight.name,
                step=step,
                shape=(rows, columns),
                base_fro=self.base_fro,
                relative=fro / self.base_fro if fro is not None and self.base_fro else None,
                cosine=cosine,
                unchanged=None if change is None else float((change == 0).double().mean()),
                dead=fro == 0.0 and norm == self.base_fro,
                non_finite="it holds NaN or infinite values" if norm is None else None,
                method="rows",
                **fields,
            )
        ]


def _read_rows(weight: Trained, rows: Tensor) -> Tensor:
    """Return rows of a weight as they are now, on the CPU."""
    return weight.parameter.detach()[rows.to(weight.parameter.device)].cpu()


def _subtract(now: Tensor | None, before: Tensor | None) -> Tensor | None:
    """Return a difference in float64; None if one side is not known."""
    return None if now is None or before is None else now.double() - before.double()


def _norm(weight: Tensor) -> float | None:
    """Return ‖W‖_F; None if it is not finite."""
    norm = float(torch.linalg.vector_norm(weight.detach(), dtype=torch.float64))
    return norm if math.isfinite(norm) else None


def _estimate_norm(name: str, rows: Tensor | None, count: int) -> dict[str, Any]:
    """Return the fields of ‖X‖_F from a random sample of its rows, and of its standard error; none
    if X is not known.

    With k of m rows, ‖X‖_F² is estimated by m times the mean ‖x_i‖², whose variance is (1 −
    k/m)·s²/k (Cochran 1977, *Sampling Techniques*, theorem 2.2), and the error of its root by
    dividing by 2‖X‖_F. It is None if k = m.
    """
    if rows is None:
        return {name: None}
    energies, size = rows.square().sum(1), len(rows)
    fro, error = math.sqrt(count * float(energies.mean())), None if size == count else 0.0
    if size < count and fro:
        error = count * math.sqrt((1 - size / count) * float(energies.var()) / size) / (2 * fro)
    return {name: fro, f"{name}_error": error}


def _base_norm(weight: Frozen) -> float | None:
    """Return ‖W_base‖_F of the weight under a LoRA; None if it is quantized, offloaded or not
    finite.
    """
    base = weight.module.get_base_layer().weight
    if base.device.type == "meta" or not base.is_floating_point() or base.dtype.itemsize < 2:
        return None
    return _norm(base) if tuple(base.shape) == weight.shape else None


class LoraMonitor(TrainingCallback):
    r"""Measure the update of every trained matrix at every n-th step of training, and log the
    numbers.

    Pass it to a Trainer of transformers or TRL (``Trainer(..., callbacks=[monitor])``;
    ``monitor.log_to(trainer)`` adds its numbers to the Trainer's log), or use it in your own loop::

        with LoraMonitor("monitor.jsonl", every=50).attach(model) as monitor:
            for batch in batches:
                ...
                optimizer.step()
                if monitor.step():  # True if a rule of stop_on holds
                    break

    ``loradiag checkpoints monitor.jsonl --follow``, ``inspect``, ``plot``, ``report`` and ``gate``
    read the records, also during training. After a resume from a checkpoint, the records up to its
    step are kept, and new ones follow.

    Args:
        output: The results file; None for ``monitor.jsonl`` in the Trainer's output folder. That of
            an earlier run of the monitor is renamed (``monitor.1.jsonl``).
        every: Measure after the steps ``every``, 2·``every``, …, and in a Trainer after the last.
        stop_on: Rules that end the training: of ``RULES``, one or several.
        layers: Regular expression; only weights whose name contains a match. None for all.
        exclude: Regular expression; no weights whose name contains a match. None to exclude none.
        log: Called with the numbers of every measured step by name, on the main process.

    Raises:
        UsageError: An argument is invalid.
    """

    def __init__(
        self,
        output: Path | str | None = None,
        *,
        every: int = 50,
        stop_on: str | Collection[str] = (),
        layers: str | None = None,
        exclude: str | None = None,
        log: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        if every < 1:
            raise UsageError(f"every={every}: must be at least 1")
        self.stop_on = {stop_on} if isinstance(stop_on, str) else set(stop_on)
        if unknown := sorted(self.stop_on - set(RULES)):
            raise UsageError(f"stop_on={unknown[0]!r}: no such rule; use {', '.join(RULES)}")
        self.output, self.every, self.log = None if output is None else Path(output), every, log
        self._is_selected, self._settings = (
            selector(layers, exclude),
            {"layers": layers, "exclude": exclude},
        )
        self._parts: list[_ShapeGroup | _Rows] = []
        self._writer: ResultsWriter[CheckpointLayer] | None = None
        self._left_out: list[LeftOut] = []
        self._step = 0
        self._recent: deque[tuple[RunCheckpoint, list[CheckpointLayer]]] = deque(
            maxlen=LOOK_BACK - 1
        )
        self._pending: list[CheckpointLayer] = []
        self._warned: set[str] = set()

    def attach(self, model: nn.Module, step: int = 0) -> Self:
        """Find the weights of a model, and open the results file; return the monitor.

        Where the weights are sharded over processes (FSDP, DeepSpeed ZeRO-3), it says so and
        measures nothing.

        Args:
            model: The model, possibly with adapters and data-parallel wrappers.
            step: Number of updates so far.

        Raises:
            UsageError: No output is given, the model has nothing to measure, or the file is not a
                monitor's or is being written.
            InputError: The output cannot be written.
        """
        self.close(finished=False)  # of a training that an error ended
        self._step = step
        if not is_main():
            return self
        if sharded := [
            name for name, weight in model.named_parameters() if is_sharded(name, weight)
        ]:
            _LOG.warning(
                "LoraMonitor measures nothing: %s is sharded over processes (FSDP, ZeRO-3)",
                sharded[0],
            )
            return self
        weights, unread = weights_of(model, self._is_selected)
        unread |= {each.name: "it is no matrix" for each in weights if len(each.shape) != 2}
        self._left_out = [
            LeftOut(layer=name, shape=(), reason="no_factors", detail=unread[name])
            for name in unread
        ]
        if unread:
            _LOG.warning(
                "LoraMonitor leaves out %s: %s",
                list_names(list(unread)),
                next(iter(unread.values())),
            )
        # Of a head that is tied to a table, the table, under whose name they are saved.
        trained = {
            id(each.parameter): each
            for each in weights
            if isinstance(each, Trained) and len(each.shape) == 2
        }
        self._parts = [
            *_make_parts(weights),
            *(_Rows.sample(each, step == 0) for each in trained.values()),
        ]
        if not self._parts:
            raise UsageError("nothing to monitor: no selected matrix is trained or under a LoRA")
        if self.output is None:
            raise UsageError(
                "output: is required outside of a Trainer; give the name of a results file"
            )
        inputs = (
            RunInput(
                role=ROLE,
                path=legible(self.output.parent),
                kind="in training",
                tensors=len(weights),
            ),
        )
        settings = {**self._settings, "every": self.every, "ranks": list(RANKS)}
        self._open(
            Run(command="checkpoints", version=__version__, inputs=inputs, settings=settings)
        )
        return self

    def _open(self, run: Run) -> None:
        """Open the results file; rename that of an earlier run, and copy its records up to the
        present step.

        Raises:
            UsageError: The file is not a monitor's, or is being written.
            InputError: It cannot be read or written.
        """
        path, checkpoints, by_step = (
            self.output,
            list[RunCheckpoint](),
            dict[int, list[CheckpointLayer]](),
        )
        assert path is not None
        if path.exists() and path.stat().st_size:
            check_output(path, RESULTS, appending=True)
            os.close(lock(path))
            earlier = read_results(path)
            if [each.role for each in earlier.run.inputs] != [ROLE]:
                raise UsageError(
                    f"{path}: holds results of loradiag {earlier.run.command}; choose another name"
                )
            by_step = group_by(earlier, "step")
            checkpoints = [
                each for each in earlier.whole_of(RunCheckpoint) if each.step <= self._step
            ]
            names = (path.with_name(f"{path.stem}.{i}{path.suffix}") for i in count(1))
            path.rename(next(name for name in names if not name.exists()))
        self._writer = ResultsWriter(path, run)
        for checkpoint in checkpoints:
            self._recent.append((checkpoint, by_step[checkpoint.step]))
            self._writer.append(*by_step[checkpoint.step], checkpoint)

    def step(self) -> bool:
        """Count an update, and measure if it is due; call after the optimizer's step.

        Returns:
            Whether a rule of ``stop_on`` holds.
        """
        stop = self._advance(self._step + 1)
        self._write([])
        return stop

    def close(self, finished: bool = True) -> None:
        """Release the model, and end the results file.

        Args:
            finished: False to end the file without ``left_out`` records and last line, as that of
                an interrupted run.

        Raises:
            InputError: The results file cannot be written.
        """
        self._parts, self._pending = [], []
        if self._writer is not None:
            with self._writer as writer:
                if finished and self._recent:
                    writer.append(*self._left_out, totals(self._recent[-1][1], self._left_out))
            self._writer = None
        self._recent.clear()

    # --- in a Trainer
    # ---------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Attach to the model, as ``attach`` does; the file is in the Trainer's output folder by
        default.
        """
        if self.output is None and is_main():
            self.output = Path(args.output_dir, MONITOR)
        self.attach(model, state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the records of the step before, with the losses that the Trainer has
        logged since.
        """
        self._write(state.log_history)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure if it is due; end the training if a rule of ``stop_on`` holds."""
        should_log = control.should_log
        if self._advance(
            state.global_step, state.log_history, state.global_step >= state.max_steps
        ):
            control.should_training_stop = True
        control.should_log = (
            should_log  # the Trainer's log resets it, and would not log the loss of this step
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the last records, and close the file, as ``close`` does."""
        self._write(state.log_history)
        self.close()

    # --- shared by both
    # -------------------------------------------------------------------------------------------

    def _advance(self, step: int, history: Sequence[Any] = (), last: bool = False) -> bool:
        """Measure the weights after a step if it is due, log and warn; return whether a rule of
        ``stop_on`` holds.

        Args:
            step: Number of updates so far.
            history: The Trainer's log so far, ``log_history`` of its state.
            last: Whether the step is the last, which is always measured.
        """
        self._step = step
        stop = set[str]()
        if self._writer is not None and (step % self.every == 0 or last):
            with self._guard():
                records = [record for part in self._parts for record in part.measure(step)]
                self._pending = sorted(records, key=lambda record: natural_order(record.layer))
                checkpoint = self._pool(history)
                if self.log is not None:
                    values = checkpoint.model_dump(include=_LOGGED, exclude_none=True)
                    self.log({f"update/{name}": value for name, value in values.items()})
                stop = self._warn(checkpoint) & self.stop_on
        return bool(stop)

    def _pool(self, history: Sequence[Any]) -> RunCheckpoint:
        """Return the record of the step that was measured last."""
        assert self.output is not None
        groups = [group for _, group in [*self._recent][-1:]] + [self._pending]
        steps = [Step(group[0].step, self.output.parent) for group in groups]
        series = make_series(steps, None, collect_log(history))
        return pool_checkpoints(steps, series, [record for group in groups for record in group])[-1]

    def _warn(self, checkpoint: RunCheckpoint) -> set[str]:
        """Return the rules that hold now, and warn of those that hold for the first time."""
        moments = [*self._recent, (checkpoint, self._pending)]
        run = judge_trajectory(
            [record for _, group in moments for record in group], [each for each, _ in moments]
        )
        found = {rule: list(layers) for rule, layers in run.affected.items() if layers}
        if run.spike is not None and run.spike > SPIKED:
            found.setdefault("spiked", ["all layers together"])
        for rule in found.keys() - self._warned:
            _LOG.warning(
                "step %d: %s: %s", checkpoint.step, rule.replace("_", "-"), list_names(found[rule])
            )
        self._warned |= found.keys()
        return set(found)

    def _write(self, history: Sequence[Any]) -> None:
        """Write the records of the step that was measured last, if they are not yet written."""
        if self._pending and self._writer is not None:
            with self._guard():
                checkpoint = self._pool(history)
                self._writer.append(*self._pending, checkpoint)
                self._recent.append((checkpoint, self._pending))
            self._pending = []

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """End the measurement where it fails, with a warning: the training continues."""
        try:
            yield
        except Exception as error:  # such as a full disk, or a GPU without memory
            trace = not isinstance(error, LoradiagError)
            _LOG.warning("LoraMonitor stops after step %d: %s", self._step, error, exc_info=trace)
            self.close(finished=False)


def _make_parts(weights: Sequence[Weight]) -> list[_ShapeGroup]:
    """Return the layers under a LoRA, together where their factors have one shape and
    one device.
    """
    groups: dict[Any, list[Frozen]] = {}
    for weight in weights:
        if isinstance(weight, Frozen) and len(weight.shape) == 2:
            b, a, _ = weight.factors()
            groups.setdefault((b.shape, a.shape, b.device), []).append(weight)
    parts = []
    for (b_shape, a_shape, _), group in groups.items():
        size = max(1, PART_ENTRIES // (math.prod(b_shape) + math.prod(a_shape)))
        parts += [group[start : start + size] for start in range(0, len(group), size)]
    return [_ShapeGroup(part, [_base_norm(weight) for weight in part]) for part in parts]
