"""Rounding of one layer's W + ΔW to a format, entry by entry in row blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_diag.decisions.plan_merge.formats import SIXTEEN_BIT, Target, quantize
from lora_diag.decisions.plan_merge.record import FormatEffect, PlannedMerge, conclude
from lora_diag.deltas import BLOCK_ENTRIES, Delta, DenseDelta, FactoredDelta
from lora_diag.layers.task import LayerTask
from lora_diag.linalg import first_non_finite, require_memory
from lora_diag.records import LeftOut

# Bytes for each entry of a block: 93 (bf16) to 159 (nvfp4) were measured with blocks of 2^20 entries.
BLOCK = 160
# Bytes for each entry of an update that is computed in full, with one copy.
COMPUTED = 16

NEEDS_BASE = "W itself is rounded, and BASE does not hold this weight"


@dataclass(frozen=True, slots=True)
class MergeTask(LayerTask):
    """A layer and its storage.

    Args:
        delta: ΔW of the layer.
        in_out: Whether W is stored ``(in, out)``, so that groups of inputs are along its columns.
    """

    in_out: bool = False


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """Settings of the measurement of a layer.

    Args:
        target: The format.
        memory: Memory limit of a layer in bytes; None without limit.
    """

    target: Target
    memory: int | None = None


def size(task: MergeTask, settings: PlanSettings) -> int:
    """Return the approximate memory of measuring a layer in bytes."""
    rows, columns = task.shape
    needed = BLOCK * min(max(BLOCK_ENTRIES, _rows_per_group(task, settings.target) * columns), rows * columns)
    needed += COMPUTED * rows * columns if isinstance(task.delta, DenseDelta) else 0
    return needed if settings.memory is None else min(needed, settings.memory)


def measure(task: MergeTask, settings: PlanSettings) -> tuple[PlannedMerge | LeftOut]:
    """Round W and W + ΔW of one layer.

    Returns:
        One record; a ``left_out`` record where an entry is not finite or BASE does not hold the weight.

    Raises:
        InputError: A file could not be read.
        MemoryLimitError: An update that is computed in full does not fit.
    """
    delta = task.delta
    if delta.base is None:
        return (LeftOut(layer=delta.layer, shape=delta.shape, reason="not_in_base", detail=NEEDS_BASE),)
    if settings.memory is not None and isinstance(delta, DenseDelta):
        needed = COMPUTED * math.prod(delta.shape)
        require_memory(needed, settings.memory, delta.shape, "its update, computed in full, takes", "--exclude it")
    layer = _Layer(task, settings.target)
    if problem := layer.scan():
        return (LeftOut(layer=delta.layer, shape=delta.shape, reason="non_finite", detail=problem),)
    return (layer.round_entries(),)


def _rows_per_group(task: MergeTask, target: Target) -> int:
    """Return the number of rows of which a block is a multiple: complete groups if they are along the columns."""
    return target.group or 1 if task.in_out else 1


@dataclass(slots=True)
class _Sum:
    """Sums over the entries of a format."""

    inner: float = 0.0
    squares: float = 0.0
    overflow: int = 0

    def effect(self, energy: float) -> FormatEffect:
        if not energy or self.overflow:
            return FormatEffect(arrived=None, error=None)
        return FormatEffect(arrived=self.inner / energy, error=math.sqrt(self.squares / energy))


@dataclass
class _Layer:
    """One layer during its measurement."""

    task: MergeTask
    target: Target
    energy: float = 0.0
    base_energy: float = 0.0
    step_energy: float = 0.0
    peaks: tuple[Tensor, Tensor] | None = None
    update: Callable[[int, int], Tensor] = field(init=False)
    basis: Tensor | None = field(init=False, default=None)

    def scan(self) -> str | None:
        """Read the layer once for norms and the maxima of scales; return what is not finite, None if all is."""
        delta = self.task.delta
        assert delta.base is not None
        self.update, self.basis, problem = _load(delta, self.task.in_out)
        if problem:
            return problem
        outputs = self.task.shape[1 if self.task.in_out else 0]
        merged_peaks, base_peaks = torch.zeros(outputs, 1), torch.zeros(outputs, 1)
        for (first, last), w, u in self._read_blocks():
            problem = first_non_finite("BASE holds", w, first) or first_non_finite("the update holds", u, first)
            if problem:
                return problem
            self.energy += float(u.square().sum())
            self.base_energy += float(w.square().sum())
            if delta.base.is_quantized:
                span = first * self.task.shape[1], last * self.task.shape[1]
                steps = delta.base.read_steps(*span)
                self.step_energy += 0.0 if steps is None else float(steps.double().square().sum())
            rows = slice(None) if self.task.in_out else slice(first, last)
            for peak, x in ((merged_peaks, w + u), (base_peaks, w)):
                x = self._to_out_in(x).float()
                peak[rows] = torch.maximum(peak[rows], x.abs().amax(dim=1, keepdim=True))
        if self.target.name == "nvfp4" or self.target.per_tensor:
            merged_peaks, base_peaks = merged_peaks.max().expand(outputs, 1), base_peaks.max().expand(outputs, 1)
        self.peaks = merged_peaks, base_peaks
        finite = math.isfinite(self.energy + self.base_energy)
        return None if finite else "the squares of its entries overflow float64"

    def round_entries(self) -> PlannedMerge:
        """Round every entry; return the record of the layer."""
        delta, target = self.task.delta, self.target
        assert delta.base is not None
        assert self.peaks is not None
        sums = {name: _Sum() for name in (*SIXTEEN_BIT, target.name)}
        formats = {name: target if name == target.name else Target(name) for name in sums}
        changed, base = 0, _Sum()
        within: float | Tensor = 0.0
        for (first, last), w, u in self._read_blocks():
            w, u = self._to_out_in(w), self._to_out_in(u)
            rows = slice(None) if self.task.in_out else slice(first, last)
            x, merged_peaks, base_peaks = (w + u).float(), self.peaks[0][rows], self.peaks[1][rows]
            base_codes, rounded = quantize(w.float(), target, base_peaks)
            rounding = rounded - w
            base.overflow += int((~rounded.isfinite()).sum())
            base.squares += float(rounding.square().sum())
            if self.basis is not None and self.task.in_out:
                within = within + rounding @ self.basis[first:last]
            elif self.basis is not None:
                within += float((rounding @ self.basis).square().sum())
            for name, kind in formats.items():
                codes, stored = quantize(x, kind, merged_peaks)
                change = stored - w
                sums[name].overflow += int((~stored.isfinite()).sum())
                sums[name].inner += float((change * u).sum())
                sums[name].squares += float((change - u).square().sum())
                if name == target.name:
                    changed += int((codes != base_codes).sum())
        inside = float(within.square().sum()) if isinstance(within, Tensor) else within
        known = bool(self.energy) and not base.overflow
        effect, sixteen = (
            sums[target.name].effect(self.energy),
            [sums[name].effect(self.energy) for name in SIXTEEN_BIT],
        )
        base_error = math.sqrt(base.squares / self.energy) if known else None
        quantized = delta.base.is_quantized and self.energy
        return PlannedMerge(
            layer=delta.layer,
            shape=delta.shape,
            to=target.name,
            fro=math.sqrt(self.energy),
            base_fro=math.sqrt(self.base_energy),
            arrived=effect.arrived,
            error=effect.error,
            moved=changed / math.prod(delta.shape),
            overflow=sums[target.name].overflow,
            base_error=base_error,
            base_error_inside=math.sqrt(inside / self.energy) if known and self.basis is not None else None,
            base_noise=math.sqrt(self.step_energy / 12 / self.energy) if quantized else None,
            bf16=sixteen[0],
            fp16=sixteen[1],
            conclusion=conclude(target.name, effect, sixteen, base_error) if self.energy else None,
        )

    def _read_blocks(self) -> Iterator[tuple[tuple[int, int], Tensor, Tensor]]:
        """Yield spans of rows as they are stored, with W and ΔW there, float64."""
        base, (rows, columns) = self.task.delta.base, self.task.shape
        assert base is not None
        smallest = _rows_per_group(self.task, self.target)
        step = max(1, BLOCK_ENTRIES // max(1, columns) // smallest) * smallest
        for first in range(0, rows, step):
            last = min(rows, first + step)
            w = base.read(first * columns, last * columns).double().view(last - first, columns)
            yield (first, last), w, self.update(first, last)

    def _to_out_in(self, block: Tensor) -> Tensor:
        """Return a block as ``(out, in)``."""
        return block.T.contiguous() if self.task.in_out else block


def _load(delta: Delta, in_out: bool) -> tuple[Callable[[int, int], Tensor], Tensor | None, str | None]:
    """Return a function for rows of ΔW in float64, a basis of its input space ``(in, r)``, and what is not finite."""
    if isinstance(delta, FactoredDelta):
        b, a = (factor.double() for factor in delta.load())
        problem = first_non_finite("lora_B holds", b) or first_non_finite("lora_A holds", a)
        basis = None if problem else _row_space_basis(b.T if in_out else a)
        return lambda first, last: b[first:last] @ a, basis, problem
    if isinstance(delta, DenseDelta):
        matrix = delta.load()
        return lambda first, last: matrix[first:last].double(), None, None
    columns = delta.shape[1]

    def rows(first: int, last: int) -> Tensor:
        span = first * columns, last * columns
        return (delta.tuned.read(*span).double() - delta.base.read(*span).double()).view(-1, columns)

    return rows, None, None


def _row_space_basis(a: Tensor) -> Tensor:
    """Return an orthonormal basis of the row space of A, ``(in, r)``."""
    _, s, vh = torch.linalg.svd(a, full_matrices=False)
    threshold = max(a.shape) * torch.finfo(a.dtype).eps * (float(s[0]) if len(s) else 0.0)
    basis: Tensor = vh[s > threshold].T
    return basis
