"""``plan-merge``: fraction of an update that a merge into a storage format keeps.

W + ΔW of each layer is rounded to the format, entry by entry in row blocks.

In the formats below x is a float32 matrix ``(out, in)``. A group is consecutive inputs of one
output; the last group of a row may be shorter. ``rne`` rounds to the nearest value of a type, ties
to even. Where the maximum is zero, all values are zero.

    bf16, fp16  rne(x); fp16 overflows to infinity from 65520 on
    fp8         e4m3: rne(x/s)·s, saturating at ±448; s = fl32(max|x| / 448) of an output, or of the
                matrix
    mxfp4       groups of 32: e2m1(x/s)·s, saturating at ±6; s = 2^(⌊log₂ max|x|⌋ − 2),
                2^−127 ≤ s ≤ 2^127
    nvfp4       groups of 16: e2m1(x/(s·g))·s·g; g = fl32(max|x| of the matrix / 2688),
                s = e4m3(max|x| / (6g))
    int4        groups of --group-size: clamp(round(x/s), −7, 7)·s; s = fl32(max|x| / 7)
    q8_0        groups of 32: round(x/s)·fl16(s); s = max|x| / 127
    q5_0, q4_0  groups of 32, b bits: min(⌊x/s + ½⌋, 2^(b−1) − 1)·fl16(s); s = −x_m / 2^(b−1),
                |x_m| = max|x|
    q5_1, q4_1  groups of 32, b bits: ⌊(x − min x)/s + ½⌋·fl16(s) + fl16(min x);
                s = (max x − min x) / (2^b − 1)

Reference: Open Compute Project, Microscaling Formats (MX) 1.0, sections 5.3 and 6.3 (mxfp4);
NVIDIA, Pretraining Large Language Models with NVFP4, 2025 (nvfp4, 2688 = 6 · 448); llama.cpp,
``ggml-quants.c`` (q8_0 to q4_1). Round to nearest, without calibration or importance matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor

from lora_diag.adapters.experts import TRANSPOSED_MODELS
from lora_diag.adapters.placing import Orientation
from lora_diag.decisions.plan_merge import PlanMergeOptions
from lora_diag.decisions.plan_merge.record import FormatEffect, PlannedMerge, conclude
from lora_diag.deltas import BLOCK_ENTRIES, EXPERTS, Delta, DenseDelta, Side
from lora_diag.errors import Given, UsageError
from lora_diag.layers.change import load_addend
from lora_diag.layers.task import LayerTask, leave_out
from lora_diag.linalg.difference import first_non_finite
from lora_diag.linalg.merge import Product
from lora_diag.linalg.methods import require_memory
from lora_diag.records import LeftOut, Results
from lora_diag.running.layers import LayerRun
from lora_diag.running.options import show_options
from lora_diag.storage import Checkpoint

# Largest values.
E4M3, E2M1, INT4 = 448.0, 6.0, 7.0
# Number of inputs that share a scale.
GROUPS = {
    "mxfp4": 32,
    "nvfp4": 16,
    "int4": 128,
    **dict.fromkeys(("q8_0", "q5_0", "q5_1", "q4_0", "q4_1"), 32),
}
SIXTEEN_BIT = ("bf16", "fp16")
# Largest exponent of e2m1, and the exponents that E8M0 has.
E2M1_EXPONENT, E8M0 = 2, 127


@dataclass(frozen=True, slots=True)
class StorageTarget:
    """A storage format.

    Args:
        name: The format, as ``--to`` names it.
        group: Number of inputs that share a scale; 0 without groups.
        per_tensor: Whether fp8 has one scale for the whole matrix.
    """

    name: str
    group: int = 0
    per_tensor: bool = False


def quantize(
    x: Tensor, target: StorageTarget, peaks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return a matrix, or whole groups of its inputs, as codes of a format and as the numbers that
    they encode.

    Args:
        x: ``(out, in)``, float32.
        target: The format.
        peaks: For fp8 and nvfp4, max|x| of every output over all inputs of the matrix,
            ``(out, 1)``; for nvfp4, and for fp8 with one scale per tensor, the maximum of the
            matrix in every row. Default those of the rows of ``x``.

    Returns:
        Codes, and the numbers that they encode, float64; both ``(out, in)``.

    Example:
        >>> quantize(torch.tensor([[1.0, 0.3, -6.1]]), StorageTarget("mxfp4", 32))[1]
        tensor([[ 1.0000,  0.5000, -6.0000]], dtype=torch.float64)
    """
    if target.name in SIXTEEN_BIT:
        codes = x.to(torch.bfloat16 if target.name == "bf16" else torch.float16).double()
        return codes, codes
    peaks = x.abs().amax(dim=1, keepdim=True) if peaks is None else peaks
    if target.name == "fp8":
        scale = _replace_zeros(peaks / E4M3)
        codes = _round_e4m3(x / scale)
        return codes, codes * scale.double()
    padding = -x.shape[1] % target.group
    groups = torch.nn.functional.pad(x, (0, padding)).view(len(x), -1, target.group)
    top = groups.abs().amax(dim=2, keepdim=True)
    minima: Tensor | float = 0.0
    if target.name == "mxfp4":
        exponent = (torch.frexp(top).exponent - 1 - E2M1_EXPONENT).clamp(-E8M0, E8M0)
        scales = torch.ldexp(torch.ones_like(top, dtype=torch.float64), exponent)
        codes = _round_e2m1(groups.double() / scales)
    elif target.name == "nvfp4":
        global_scale = _replace_zeros(peaks / (E2M1 * E4M3))[:, :, None]
        scales = _round_e4m3(top / (E2M1 * global_scale)) * global_scale.double()
        codes = torch.where(scales == 0, 0.0, _round_e2m1(groups.double() / _replace_zeros(scales)))
    elif target.name == "int4":
        scales = _replace_zeros(top / INT4).double()
        codes = (groups.double() / scales).round().clamp(-INT4, INT4)
    else:
        codes, scales, minima = _round_gguf(groups, target.name)
    codes, values = (
        part.reshape(len(x), -1)[:, : x.shape[1]] for part in (codes, codes * scales + minima)
    )
    return codes, values


def _round_gguf(groups: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scales and minima of groups in a block format of llama.cpp, which computes in
    float32.
    """
    levels, sizes = 2 ** int(name[1]), groups.abs()
    low, first = torch.zeros_like(groups[:, :, :1]), -levels // 2
    if name == "q8_0":
        scales = sizes.amax(dim=2, keepdim=True) / 127
    elif name.endswith("_0"):
        scales = groups.gather(2, sizes.argmax(dim=2, keepdim=True)) / first
    else:
        low, first = groups.amin(dim=2, keepdim=True), 0
        scales = (groups.amax(dim=2, keepdim=True) - low) / (levels - 1)
    inverse = 1 / scales
    # infinite for a scale of 0, or of less than 2⁻¹²⁸, which is 0 in fp16
    ratios = (groups - low) * torch.where(inverse.isinf(), 0.0, inverse)
    if name == "q8_0":
        codes = (ratios.abs() + 0.5).floor().copysign(ratios)
    else:
        codes = (ratios + (0.5 - first)).trunc().clamp(0, levels - 1) + first
    return codes.double(), scales.half().double(), low.half().double()


def _replace_zeros(scale: Tensor) -> Tensor:
    """Return scales with 1 in place of 0."""
    return torch.where(scale == 0, 1.0, scale)


def _round_e4m3(x: Tensor) -> Tensor:
    """Return float32 numbers rounded to e4m3, saturating, in float64."""
    return x.clamp(-E4M3, E4M3).to(torch.float8_e4m3fn).double()


def _round_e2m1(x: Tensor) -> Tensor:
    """Round to 0, 0.5, 1, 1.5, 2, 3, 4 or 6 with a sign, saturating: spacing 1/2 below 2, 1 below
    4, 2 above.
    """
    size = x.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return ((x / step).round() * step).clamp(-E2M1, E2M1)


# Bytes for each entry of a block: 93 (bf16) to 159 (nvfp4) were measured with blocks of 2^20
# entries.
BLOCK = 160
# Bytes for each entry of an update that is computed in full, with one copy.
COMPUTED = 16

NEEDS_BASE = "W itself is rounded, and BASE does not hold this weight"


@dataclass(frozen=True, slots=True)
class StorageTask(LayerTask):
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

    target: StorageTarget
    memory: int | None = None


def estimate_bytes(task: StorageTask, settings: PlanSettings) -> int:
    """Estimate the memory of measuring a layer in bytes."""
    rows, columns = task.shape
    needed = BLOCK * min(
        max(BLOCK_ENTRIES, _rows_per_group(task, settings.target) * columns), rows * columns
    )
    return needed + (COMPUTED * rows * columns if isinstance(task.delta, DenseDelta) else 0)


def measure(task: StorageTask, settings: PlanSettings) -> tuple[PlannedMerge | LeftOut]:
    """Measure one layer by rounding W and W + ΔW.

    Returns:
        One record; that of a left-out layer if an entry or a norm is not finite or BASE does not
            hold the weight.
    """
    delta = task.delta
    if delta.base is None:
        return (leave_out(delta, "not_in_base", NEEDS_BASE),)
    if settings.memory is not None and isinstance(delta, DenseDelta):
        needed = COMPUTED * math.prod(delta.shape)
        require_memory(
            needed,
            settings.memory,
            delta.shape,
            "its update, computed in full, takes",
            "$exclude it",
        )
    layer = _Layer(task, settings.target, delta.base)
    if problem := layer.scan():
        return (leave_out(delta, "non_finite", problem),)
    return (layer.round_entries(),)


def _rows_per_group(task: StorageTask, target: StorageTarget) -> int:
    """Return the number that the rows of a block are a multiple of: a group if groups are along
    columns, else 1.
    """
    return target.group or 1 if task.in_out else 1


@dataclass(slots=True)
class _Sum:
    """Sums over the entries of a layer in a format.

    Args:
        inner: ⟨Q(W + ΔW) − W, ΔW⟩.
        squares: ‖Q(W + ΔW) − W − ΔW‖_F²; of BASE alone ‖Q(W) − W‖_F².
        overflow: Number of entries that are not finite.
    """

    inner: float = 0.0
    squares: float = 0.0
    overflow: int = 0

    def make_effect(self, energy: float) -> FormatEffect:
        """Return c and error of an update with ‖ΔW‖_F² = ``energy``; null if it is 0 or an entry
        overflows.
        """
        if not energy or self.overflow:
            return FormatEffect(arrived=None, error=None)
        return FormatEffect(arrived=self.inner / energy, error=math.sqrt(self.squares / energy))


@dataclass
class _Layer:
    """One layer during its measurement: ``scan`` reads it, then ``round_entries`` measures it."""

    task: StorageTask
    target: StorageTarget
    base: Side
    energy: float = 0.0
    base_energy: float = 0.0
    step_energy: float = 0.0
    peaks: tuple[Tensor, Tensor] = field(init=False)
    update: Callable[[int, int], Tensor] = field(init=False)
    basis: Tensor | None = field(init=False, default=None)

    def scan(self) -> str | None:
        """Read the layer once for norms and ``peaks``; return which entry or norm is not finite,
        None if all are.
        """
        addend = load_addend(self.task.delta)
        if isinstance(addend, Product):
            if problem := first_non_finite("lora_B holds", addend.b) or first_non_finite(
                "lora_A holds", addend.a
            ):
                return problem
            self.basis = _row_space_basis(addend.b.T if self.task.in_out else addend.a)
        self.update = addend.rows
        outputs = self.task.shape[1 if self.task.in_out else 0]
        merged_peaks, base_peaks = torch.zeros(outputs, 1), torch.zeros(outputs, 1)
        for (first, last), w, u in self._read_blocks():
            if problem := first_non_finite("BASE holds", w, first) or first_non_finite(
                "the update holds", u, first
            ):
                return problem
            self.energy += float(u.square().sum())
            self.base_energy += float(w.square().sum())
            if self.base.is_quantized:
                steps = self.base.read_steps(first * self.task.shape[1], last * self.task.shape[1])
                self.step_energy += 0.0 if steps is None else float(steps.double().square().sum())
            rows = slice(None) if self.task.in_out else slice(first, last)
            for peak, x in ((merged_peaks, w + u), (base_peaks, w)):
                x = self._to_out_in(x).float()
                peak[rows] = torch.maximum(peak[rows], x.abs().amax(dim=1, keepdim=True))
        if self.target.name == "nvfp4" or self.target.per_tensor:
            merged_peaks, base_peaks = (
                merged_peaks.max().expand(outputs, 1),
                base_peaks.max().expand(outputs, 1),
            )
        self.peaks = merged_peaks, base_peaks
        finite = math.isfinite(self.energy + self.base_energy)
        return None if finite else "the squares of its entries overflow float64"

    def round_entries(self) -> PlannedMerge:
        """Round every entry; return the record of the layer."""
        delta, target = self.task.delta, self.target
        sums = {name: _Sum() for name in (*SIXTEEN_BIT, target.name)}
        formats = {name: target if name == target.name else StorageTarget(name) for name in sums}
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
            for name, storage in formats.items():
                codes, stored = quantize(x, storage, merged_peaks)
                change = stored - w
                sums[name].overflow += int((~stored.isfinite()).sum())
                sums[name].inner += float((change * u).sum())
                sums[name].squares += float((change - u).square().sum())
                if name == target.name:
                    changed += int((codes != base_codes).sum())
        inside = float(within.square().sum()) if isinstance(within, Tensor) else within
        has_base_error = bool(self.energy) and not base.overflow
        effects = {name: total.make_effect(self.energy) for name, total in sums.items()}
        effect, sixteen = effects[target.name], [effects[name] for name in SIXTEEN_BIT]
        base_error = math.sqrt(base.squares / self.energy) if has_base_error else None
        quantized = self.base.is_quantized and self.energy
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
            base_error_inside=math.sqrt(inside / self.energy)
            if has_base_error and self.basis is not None
            else None,
            base_noise=math.sqrt(self.step_energy / 12 / self.energy) if quantized else None,
            bf16=sixteen[0],
            fp16=sixteen[1],
            conclusion=conclude(target.name, effect, sixteen, base_error) if self.energy else None,
        )

    def _read_blocks(self) -> Iterator[tuple[tuple[int, int], Tensor, Tensor]]:
        """Yield spans of rows as they are stored, with W and ΔW there, float64."""
        rows, columns = self.task.shape
        smallest = _rows_per_group(self.task, self.target)
        step = max(1, BLOCK_ENTRIES // max(1, columns) // smallest) * smallest
        for first in range(0, rows, step):
            last = min(rows, first + step)
            w = self.base.read(first * columns, last * columns).double().view(last - first, columns)
            yield (first, last), w, self.update(first, last)

    def _to_out_in(self, block: Tensor) -> Tensor:
        """Return a block as ``(out, in)``."""
        return block.T.contiguous() if self.task.in_out else block


def _row_space_basis(a: Tensor) -> Tensor:
    """Return an orthonormal basis of the row space of A, ``(in, rank of A)``."""
    _, s, vh = torch.linalg.svd(a, full_matrices=False)
    threshold = max(a.shape) * torch.finfo(a.dtype).eps * (float(s[0]) if len(s) else 0.0)
    basis: Tensor = vh[s > threshold].T
    return basis


@show_options
def plan_merge(
    base: Path | str,
    adapter: Path | str,
    **options: Unpack[PlanMergeOptions],
) -> Results[PlannedMerge]:
    r"""Measure how much of an adapter's update survives a merge into a storage format, without
    merging.

    W + ΔW is computed in float64, rounded to float32 and then to the format, entry by entry, as a
    merge in float32 does. Nothing is written but the records.

    Args:
        base: The checkpoint that the adapter was trained on.
        adapter: The adapter.
        to: Format of the merged weights: ``bf16``, ``fp16``, ``fp8`` (e4m3), ``mxfp4``, ``nvfp4``,
            ``int4``, or one of GGUF, ``q8_0``, ``q5_0``, ``q5_1``, ``q4_0`` or ``q4_1``.
        group_size: Number of inputs that share a scale of ``int4``; default 128.
        fp8_scale: Scales of ``fp8``: ``row`` for one per output (default), ``tensor`` for one per
            matrix.
        **options: ``PlanMergeOptions``.

    Returns:
        One record for each measured matrix that the adapter changes.

    Raises:
        UsageError: An option is invalid, ``adapter`` is not an adapter or ``base`` is one, or the
            output may not be replaced.
        InputError: An input cannot be read, the adapter does not fit ``base``, or the output cannot
            be written.
        NothingComparedError: The two have no weight in common, or none is selected.

    Example:
        >>> found = plan_merge(
        ...     "sample_checkpoints/base",
        ...     "sample_checkpoints/lora_r4",
        ...     to="bf16",
        ...     layers=r"layers\.0\..*q_proj",
        ... )
        >>> found[0].conclusion
        'merge'
    """
    engine = options.get("engine")
    if engine is not None and engine.gpus_per_task:
        raise UsageError(
            Given("gpus_per_task"), "plan-merge runs on CPUs only", "remove the option"
        )
    run = LayerRun("plan-merge", options, PlanMergeOptions)
    options = run.options
    target = _make_target(options["to"], options["group_size"], options["fp8_scale"])
    refused = (
        Checkpoint,
        "not an adapter; the order is: loradiag plan-merge BASE ADAPTER --to FORMAT",
    )
    compared = run.compare(base, adapter, refuse=refused)
    assert compared.base is not None
    orientation = Orientation(compared.base, {}, flag=False)
    return run.over(
        [StorageTask(delta, _is_in_out(delta, orientation)) for delta in compared.matrices],
        measure,
        estimate_bytes,
        PlanSettings(target),
        compared.pairing,
        compared.inputs,
        run.own,
        recorded=("layers", "exclude", "allow_unmatched"),
    )


def _make_target(to: str, group_size: int | None, scale: str | None) -> StorageTarget:
    """Return the format of ``--to`` with its options.

    Raises:
        UsageError: An option does not apply to the format, or a group has no inputs.
    """
    if group_size is not None and to != "int4":
        raise UsageError(Given("group_size"), "applies to int4 only", f"remove it with $to {to}")
    if scale is not None and to != "fp8":
        raise UsageError(Given("fp8_scale"), "applies to fp8 only", f"remove it with $to {to}")
    if group_size is not None and group_size < 1:
        raise UsageError(Given("group_size", group_size), "must be a positive integer")
    return StorageTarget(to, group_size or GROUPS.get(to, 0), scale == "tensor")


def _is_in_out(delta: Delta, orientation: Orientation) -> bool:
    """Return whether a matrix is stored ``(in, out)``: GPT-2's Conv1D, and stacks of experts of
    some models.

    False if BASE does not hold it.
    """
    if delta.base is None:
        return False
    stored = delta.base.info.shape
    if len(stored) == 3 and EXPERTS.search(delta.base.name):
        return delta.base.checkpoint.config.get("model_type") in TRANSPOSED_MODELS
    return orientation.in_out(delta.base.name, (None, None), stored)
