"""One layer of a merge, hypotheses about it, and the diagnosis of a layer that is not a merge of W
and ΔW.

Common faults are tested one by one. A fault is a hypothesis "M is W + D', rounded" with another D'
than the adapter's ΔW: c·ΔW, ΔWᵀ, another expert's ΔW. It is accepted if it explains all but one
entry in a thousand, or if ‖M − W − D'‖ is at most rounding plus 5% of ‖D'‖, and explains clearly
more than ΔW. A sample of rows rules out most hypotheses, and those that it does not are tested on
the whole layer. The failure itself was established before, by single entries or by their sum; this
only gives the likely cause.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lora_diag.deltas import (
    BLOCK_ENTRIES,
    Delta,
    DenseDelta,
    FactoredDelta,
    Side,
    footprint,
    row_blocks,
    row_spans,
)
from lora_diag.diagnostics.verify_merge.record import MergeStatus
from lora_diag.layers.change import COMPUTED_ENTRY_BYTES, load_addend
from lora_diag.layers.lineage import cosine_of_norms, judge_cosine
from lora_diag.linalg.difference import first_non_finite
from lora_diag.linalg.merge import (
    Addend,
    Block,
    Check,
    MergeRounding,
    Product,
    Whole,
    check_merge,
    unit_roundoff,
)
from lora_diag.linalg.rounding import LAYOUT

# Maximum fraction of entries that a fault may leave unexplained: roundings that differ from those
# of a correct merge.
MAX_UNEXPLAINED = 1e-3

# Maximum fraction of ‖D'‖, besides rounding, that a fault may leave unexplained.
MAX_DISTANCE = 0.05

# If less than this fraction of the entries is wrong, the others are taken as correct.
FEW_ENTRIES = 0.05

# Errors of a ΔW that was computed less precisely are of all sizes: in units of their bound their
# standard deviation is about 0.2/√r, so that with entries beyond LARGE_ERROR there are at least
# MIN_SPREAD times as many beyond SMALL_ERROR: on products in bf16 (16² to 256², r from 1 to 64,
# rows of zeros among them) 1.6 times or more. Only in matrices of MIN_ENTRIES or more, and where
# the largest error is above MIN_ULP spacings, so that small ones show, too.
LARGE_ERROR, SMALL_ERROR, MIN_SPREAD, MIN_ENTRIES, MIN_ULP = 1 / 8, 1 / 64, 1.25, 256, 32.0

# Unit roundoff of the coarsest arithmetic in which the ΔW of a right merge is computed, bfloat16.
BFLOAT16_ROUNDOFF = 2.0**-8

# Unit roundoff of float32, in which most merges compute ΔW for every dtype of the model.
FLOAT32_ROUNDOFF = 2.0**-24

# Minimum number of rows and columns with entries that a scale explains and 1 does not, and their
# minimum fraction.
MIN_LINES, MIN_COHERENCE = 32, 0.95

# Number of entries, in rows evenly spaced over the layer, that a hypothesis must fit before it is
# tested on all. They rule it out by their unexplained entries if these are too many for the whole
# layer, which is certain, and if they are also further off than twice what is accepted, which rows
# that are unlike the others could feign.
SAMPLED_ENTRIES = 2**16

# Maximum number of steps to the scale; two or three are usual, more where ΔW is close to the
# spacing of M.
MAX_SECANT_STEPS = 12

# Maximum distance of a fitted scale from its equation's solution, in standard errors: float32 sums
# are no smoother.
SCALE_TOLERANCE = 0.1

# Minimum cosine of a layer's change with the ΔW of another layer that was added to it.
MIN_COSINE = 0.5

# Weights that join two layers, whose halves can be in the wrong order.
JOINED_WEIGHTS = ("gate_up", "gate_and_up", "up_gate", "w13", "kv_proj", "input_linear")

ADDED_TWICE = "it was added twice"
NOT_ADDED = "MERGED holds BASE's weight: the update was not added"

# Bytes for every entry of a block: both sides, and float64 copies of them while faults are tried.
# Measured on 4096x11008 (bfloat16, float32): 29 and 37 where a merge is right, 47 and 64 where
# every fault was tried in vain.
BLOCK = 72

# Maximum number of row ranges named in a message.
MAX_RANGES = 3


@dataclass(frozen=True, slots=True)
class Fault:
    """The verdict on a layer: its status, and the cause.

    Args:
        status: Status word.
        cause: Likely cause, as a sentence; empty for ``ok``.
    """

    status: MergeStatus
    cause: str


@dataclass(frozen=True, slots=True)
class MergedLayer:
    """One layer of a merge, as stored in BASE and MERGED.

    Args:
        layer: Its name in BASE.
        shape: ``(out, in)``; a 1-D tensor of n entries is ``(1, n)``.
        base: Location of W.
        merged: Location of M; that of W if MERGED has no such layer.
        deltas: The adapter's updates of it; several where tied weights are stored once. None at
            all: M must be W.
        is_matrix: False for 1-D tensors.
        adapted: Whether the adapter changes it.
        others: If the adapter changes it, the factored updates of its kind, its own among them: of
            all experts, or in all blocks. One tuple for all these layers: a list for each of 256
            experts would be 65,000 entries a block.
        missing: Why MERGED does not have the layer; empty if it does.
        kept: The first blocks, kept once they are read: an incorrect layer is compared with many
            hypotheses.
        max_kept: Maximum number of blocks to keep.
        sampled: Sampled rows, as one block, kept once they are read.
    """

    layer: str
    shape: tuple[int, int]
    base: Side
    merged: Side
    deltas: tuple[Delta, ...] = ()
    is_matrix: bool = True
    adapted: bool = True
    others: tuple[FactoredDelta, ...] = ()
    missing: str = ""
    kept: list[Block] = field(default_factory=list, repr=False, compare=False)
    max_kept: int = 1
    sampled: list[Block] = field(default_factory=list, repr=False, compare=False)

    def blocks(self) -> Iterator[Block]:
        """Yield row blocks of W and M, with the spacings of M's format; None for those of a
        floating-point dtype.
        """
        yield from self.kept
        skip = len(self.kept)
        sides = (row_blocks(side, self.shape, skip) for side in (self.base, self.merged))
        for (first, last), w, m in zip(list(row_spans(self.shape))[skip:], *sides, strict=True):
            step = self.merged.read_steps(first * self.shape[1], last * self.shape[1])
            block = w, m, step.view_as(m) if step is not None else None
            if len(self.kept) < self.max_kept:
                self.kept.append(block)
            yield block

    def sample(self) -> tuple[Tensor, MergedLayer]:
        """Return evenly spaced rows, and a layer of these rows alone: of ``SAMPLED_ENTRIES``
        entries, or one row.
        """
        rows, columns = self.shape
        chosen = torch.arange(min(rows, max(1, SAMPLED_ENTRIES // columns)))
        chosen = chosen * rows // len(chosen)
        if not self.sampled:
            parts = []
            for (first, last), block in zip(row_spans(self.shape), self.blocks(), strict=True):
                inside = chosen[(chosen >= first) & (chosen < last)] - first
                parts.append([part[inside] if part is not None else None for part in block])
            w, m, steps = zip(*parts, strict=True)
            all_w, all_m = torch.cat(w), torch.cat(m)
            all_steps = torch.cat(steps) if steps[0] is not None else None
            for span in itertools.starmap(slice, row_spans((len(chosen), columns))):
                step = all_steps[span] if all_steps is not None else None
                self.sampled.append((all_w[span], all_m[span], step))
        return chosen, replace(self, shape=(len(chosen), columns), kept=self.sampled)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the stored tensor, of a 1-D tensor ``(n,)``."""
        return self.shape if self.is_matrix else self.shape[1:]

    @property
    def scale(self) -> float | None:
        """The scaling s of its updates, α/r or α/√r; None if it is unknown, or not one."""
        scales = {
            delta.scale if isinstance(delta, FactoredDelta) else None for delta in self.deltas
        }
        return scales.pop() if len(scales) == 1 else None

    def list_rounded_scales(self, *dtypes: torch.dtype) -> list[float]:
        """Return fl(s)/s for s rounded to each of the dtypes, without 1; empty where s is unknown
        or 0.
        """
        if not self.scale:
            return []
        factors = {
            float(torch.tensor(self.scale, dtype=torch.float64).to(dtype)) / self.scale
            for dtype in dtypes
        }
        return [factor for factor in sorted(factors - {1.0}) if 0 < factor < math.inf]

    @property
    def footprint(self) -> int:
        """Upper bound on the memory of the check in bytes: ``needed``, and both sides as stored, to
        be kept.
        """
        if self.missing or not self.adapted:  # one pass, or none
            return self.needed
        entry: int = sum(getattr(torch, side.dtype).itemsize for side in (self.base, self.merged))
        return self.needed + (entry + 4 * self.merged.is_quantized) * math.prod(self.shape)

    @property
    def needed(self) -> int:
        """Memory in bytes without which the layer cannot be checked: blocks, thin factors, and
        whole updates.
        """
        blocks = BLOCK * min(max(BLOCK_ENTRIES, self.shape[1]), math.prod(self.shape))
        thin = sum(footprint(delta) for delta in self.deltas if isinstance(delta, FactoredDelta))
        return blocks + thin + self.held

    @property
    def held(self) -> int:
        """Upper bound on the memory in bytes that updates without thin factors take."""
        whole_updates = [delta for delta in self.deltas if not isinstance(delta, FactoredDelta)]
        if not whole_updates:
            return 0
        entry = 0
        copies = 28  # a weight that the adapter stores in full is read from two files
        if any(isinstance(delta, DenseDelta) for delta in whole_updates):
            entry = COMPUTED_ENTRY_BYTES
            copies = 16
        if len(self.deltas) > 1 or whole_updates[0].shape != self.shape:
            entry += 8  # the sum
        if self.shape[0] == self.shape[1] or has_halves(self.layer, self.shape):
            entry += copies  # transposed, or with its halves swapped
        return entry * math.prod(self.shape)


def sum_addends(deltas: tuple[Delta, ...], shape: tuple[int, int]) -> tuple[Addend, str | None]:
    """Return the sum of a layer's updates, and None; or an update that is not finite, and a
    description of its entry.

    Args:
        deltas: The updates; none for ΔW = 0. Where they have fewer rows than the layer (a
            vocabulary that grew), the other rows have none.
        shape: ``(m, n)`` of the layer.
    """
    addends = [load_addend(delta) for delta in deltas]
    for addend in addends:
        if problem := _find_non_finite(addend):
            return addend, problem
    products = [addend for addend in addends if isinstance(addend, Product)]
    if len(products) == len(addends):
        factors = [
            torch.nn.functional.pad(addend.b, (0, 0, 0, shape[0] - len(addend.b)))
            for addend in products
        ]
        b = torch.cat(factors or [torch.zeros(shape[0], 0).double()], dim=1)
        a = torch.cat([addend.a for addend in products] or [torch.zeros(0, shape[1]).double()])
        return Product(b, a), None
    if len(addends) == 1 and isinstance(addends[0], Whole) and addends[0].shape == shape:
        return addends[0], None
    total = torch.zeros(shape, dtype=torch.float64)
    for addend, delta in zip(addends, deltas, strict=True):
        rows = min(shape[0], delta.shape[0])
        total[:rows] += addend.rows(0, rows)
    return Whole(shape, lambda first, last: total[first:last]), None


def _find_non_finite(addend: Addend) -> str | None:
    """Return a description of the first entry that is not finite; None without one."""
    if isinstance(addend, Product):
        problem = first_non_finite("lora_B holds", addend.b)
        return problem or first_non_finite("lora_A holds", addend.a)
    for span in row_spans(addend.shape):
        if problem := first_non_finite("the adapter's update holds", addend.rows(*span), span[0]):
            return problem
    return None


@dataclass(frozen=True, slots=True)
class FaultTrial:
    """A hypothesis about a layer, that M is W + D' rounded, and its check.

    Args:
        task: The layer.
        addend: D'; the adapter's ΔW unless something else is tried.
        rounding: Possible rounding of such a merge.
        check: Result of the check.
    """

    task: MergedLayer
    addend: Addend
    rounding: MergeRounding
    check: Check

    def retry(self, addend: Addend | None = None, whole: bool = True, **changes: Any) -> FaultTrial:
        """Return the trial of another D', by default the same, with changes of its rounding; see
        ``check_merge``.
        """
        return try_merge(self.task, addend or self.addend, replace(self.rounding, **changes), whole)

    def retry_if_plausible(self, addend: Addend | None = None, **changes: Any) -> FaultTrial | None:
        """Return ``retry``; None where sampled rows rule out that D' explains nearly all entries,
        or is close.
        """
        sample = self.retry_sample(addend or self.addend, **changes)
        return None if self.is_refuted_by(sample) else self.retry(addend, **changes)

    def retry_sample(self, addend: Addend, **changes: Any) -> FaultTrial:
        """Return the trial of a D' on sampled rows."""
        rows, task = self.task.sample()
        return try_merge(task, addend.take(rows), replace(self.rounding, **changes))

    def is_refuted_by(self, sample: FaultTrial) -> bool:
        """Return whether sampled rows have too many unexplained entries for the whole layer, and
        are far off.
        """
        check = sample.check
        limit = 2 * _limit_residual(check.expected, check.allowed)
        return check.count > MAX_UNEXPLAINED * self.check.entries and check.residual > limit

    def make_precise(self) -> FaultTrial:
        """Return the trial with a D' computed at least in float32, from factors that
        were not cast.
        """
        return self.retry(roundoff=min(self.rounding.roundoff, FLOAT32_ROUNDOFF), cast=False)

    @property
    def explains(self) -> bool:
        """Whether rounding explains every entry, and the scale."""
        return self.check.count == 0 and not self.check.drifted

    @property
    def has_testable_scale(self) -> bool:
        """Whether the scale of D' is tested: where D' is not zero, neither exact nor added to a
        quantized MERGED.
        """
        is_exact = isinstance(self.addend, Whole) and self.addend.exact
        return not (self.task.merged.is_quantized or not self.check.expected or is_exact)

    def list_wrong_scales(self) -> dict[float, str]:
        """Return the factors of common mistakes, with their descriptions."""
        rank = None
        if isinstance(self.addend, Product) and len(self.task.deltas) == 1:
            rank = self.addend.b.shape[1]
        return list_wrong_scales(self.task.scale, rank)


def try_merge(
    task: MergedLayer, addend: Addend, rounding: MergeRounding, whole: bool = True
) -> FaultTrial:
    """Return the trial of a D' with a rounding; see ``check_merge``."""
    check = check_merge(task.blocks(), task.shape, addend, rounding, whole)
    return FaultTrial(task, addend, rounding, check)


def cosine_to_base(task: MergedLayer, check: Check) -> float | None:
    """Return the cosine of W and M, as of ``layers.lineage``; None for a 1-D tensor, and for rows
    that BASE lacks.
    """
    if not task.is_matrix or (task.adapted and not task.deltas):
        return None
    return cosine_of_norms(*map(math.sqrt, (check.base, check.merged, check.observed)))


def find_fault(trial: FaultTrial) -> Fault:
    """Return the first common fault that explains a layer; without one, a description of the
    difference.
    """
    check = trial.check
    if not trial.task.adapted:
        return Fault("changed", "not touched by the adapter, but MERGED differs from BASE")
    if not trial.task.deltas:
        return Fault("other", "the rows that the adapter adds are not what it holds")
    if check.moved == 0:
        return Fault("dropped", NOT_ADDED)
    return (
        _find_scale(trial)
        or find_precise_scale(trial)
        or _find_coarse_arithmetic(trial)
        or (_find_partial(trial) if check.count else None)
        or _choose_hypothesis(trial)
        or _find_uneven_scale(trial)
        or _find_unrelated_base(trial)
        or (
            _find_few_entries(trial) or _find_rounded_base(trial) or _describe_norms(trial)
            if check.count
            else None
        )
        or _describe_drift(trial)
    )


def _find_scale(trial: FaultTrial) -> Fault | None:
    """Return the fault of a scale other than 1 that leaves only rounding: no other cause is needed;
    else None.
    """
    fit = fit_scale(trial)
    if fit is None or abs(fit.factor - 1) <= fit.limit or fit.check.drifted:
        return None
    check = fit.check
    if check.count > MAX_UNEXPLAINED * trial.check.entries or check.residual > check.allowed:
        return None
    roundoff = trial.rounding.roundoff
    for factor, why in trial.list_wrong_scales().items():
        if abs(fit.factor - factor) <= fit.limit + roundoff * abs(factor):
            return Fault("wrong scale", f"ΔW was added times {factor:.4g}: {why}")
    if roundoff < BFLOAT16_ROUNDOFF:
        for factor in trial.task.list_rounded_scales(torch.bfloat16, torch.float16):
            if abs(fit.factor - factor) <= fit.limit:
                cause = f"the scaling s = {trial.task.scale:.4g} was rounded to 16 bits"
                return Fault("coarse", f"ΔW was added times {fit}: {cause}")
    return Fault("wrong scale", f"ΔW was added times {fit}, which is not a known fault")


def find_precise_scale(trial: FaultTrial) -> Fault | None:
    """Return the fault of a scale that explains the entries if ΔW was computed in float32, where 1
    does not; else None.

    In a correct merge with coarser arithmetic, the entries that 1 does not explain deviate in both
    directions: by chance MIN_COHERENCE more in one than in the other, of MIN_LINES, with
    probability 2·exp(−MIN_COHERENCE²·MIN_LINES/2) = 1e-6 (Hoeffding 1963), and no scale explains
    them.
    """
    is_precise = trial.rounding.roundoff <= FLOAT32_ROUNDOFF and not trial.rounding.cast
    if is_precise or not trial.check.expected:
        return None
    precise = trial.make_precise()
    check = precise.check
    if count_distinct_lines(check) < MIN_LINES or not is_coherent(check):
        return None
    fit = fit_scale(precise)
    if fit is None or fit.check.count > (1 - MIN_COHERENCE) * check.count or fit.check.drifted:
        return None
    # The mean distance between entries that a scale changes.
    spacing = abs(fit.factor - 1) / check.count
    fit = replace(fit, error=max(fit.error, (1 + fit.check.count) * spacing))
    if abs(fit.factor - 1) <= fit.limit + trial.check.common_error:
        return None
    return Fault(
        "wrong scale",
        f"ΔW was added times {fit}: this factor explains the entries to the last bit, 1 does not",
    )


def is_coherent(check: Check) -> bool:
    """Return whether nearly all differences of M from M* are in the direction of ΔW, or
    against it.
    """
    return abs(check.inner - check.ideal) > MIN_COHERENCE * check.apart


def count_distinct_lines(check: Check) -> int:
    """Return the number of rows, or of columns if these are fewer, with an unexplained entry."""
    return min(int((counts > 0).sum()) for counts in check.beyond)


@dataclass(frozen=True, slots=True)
class Fit:
    """A fitted scale: M is W + factor·ΔW, rounded.

    Args:
        factor: The scale.
        error: Its standard error.
        limit: Largest error by chance and by roundings common to all entries.
        check: The check with factor·ΔW.
    """

    factor: float
    error: float
    limit: float
    check: Check

    def __str__(self) -> str:
        """Return the factor with the fewest digits within two errors, and the error."""
        most = min(12, max(2, 1 - math.floor(math.log10(max(self.error, 1e-12)))))
        digits = 2
        while digits < most and abs(round(self.factor, digits) - self.factor) > 2 * self.error:
            digits += 1
        return f"{self.factor:.{digits}f} ± {self.error:.1g}"


def fit_scale(trial: FaultTrial) -> Fit | None:
    """Solve c*(γ) = c for the scale γ, c*(γ) being c of W + γ·ΔW rounded once, by chords from γ =
    1.

    Where rounding swallows part of ΔW, c is not the scale that was applied. The check is of the
    factor before the last.

    Returns:
        The fit; None where ΔW is zero, or c does not determine γ.
    """
    expected, inner = trial.check.expected, trial.check.inner
    if not expected or not math.isfinite(trial.check.scale_error):
        return None
    error = (inner - trial.check.ideal) / expected
    factor, fit = 1.0 + error, None
    if trial.is_refuted_by(trial.retry_sample(trial.addend.times(factor), cast=True)):
        return None
    for _ in range(MAX_SECANT_STEPS):
        if factor in {0.0, 1.0} or not math.isfinite(factor):
            break
        # A wrong scale is rarely a power of two, so a factor may be rounded once more than in a
        # correct merge.
        check = trial.retry(trial.addend.times(factor), cast=True).check
        new_error = (check.inner - check.ideal) / (factor * expected)
        slope = (error - new_error) / (factor - 1.0)
        if not slope > 0:
            break
        unit = abs(factor) / slope
        factor += new_error / slope
        fit = Fit(factor, check.scale_error * unit, check.scale_limit * unit, check)
        # Below what roundings common to all entries may be, the last correction needs no check.
        tolerance = SCALE_TOLERANCE * check.scale_error * abs(factor) + 1e-15
        if abs(new_error) <= max(tolerance, check.common_error / 2):
            break
    return fit


def _find_coarse_arithmetic(trial: FaultTrial) -> Fault | None:
    """Return the fault of a ΔW less precise (bfloat16, TF32) than MERGED, if it explains every
    entry; else None.
    """
    if trial.rounding.roundoff >= BFLOAT16_ROUNDOFF:
        return None
    rounded = trial.task.list_rounded_scales(torch.bfloat16, torch.float16)
    addends: list[Addend] = [trial.addend, *(trial.addend.times(factor) for factor in rounded)]
    if isinstance(trial.addend, Product):
        addends.append(trial.addend.truncate_factors(trial.task.scale or 1.0))
    for addend in addends:
        coarse = trial.retry(addend, False, roundoff=BFLOAT16_ROUNDOFF, cast=True)
        if coarse.explains:
            break
    else:
        return None
    check = trial.check
    if check.entries >= MIN_ENTRIES and check.worst > MIN_ULP:
        large = coarse.retry(roundoff=BFLOAT16_ROUNDOFF * LARGE_ERROR).check.count
        if large:
            small = coarse.retry(roundoff=BFLOAT16_ROUNDOFF * SMALL_ERROR).check.count
            if small < MIN_SPREAD * large:
                return None  # a few entries are far off while others are correct to the last bit
    distance = math.sqrt(check.residual / check.expected) if check.expected else 0.0
    dtype = str(trial.rounding.dtype).removeprefix("torch.")
    cause = f"ΔW was computed less precisely than {dtype} allows"
    return Fault("coarse", f"right to {distance:.1g} of ‖ΔW‖: {cause}")


def _find_partial(trial: FaultTrial) -> Fault | None:
    """Return the fault of rows (or columns) without the update, if all others have it;
    else None.
    """
    for axis, word in enumerate(("rows", "columns")):
        differs = trial.check.beyond[axis] > 0
        changed = trial.check.beyond_base[axis] > 0
        if differs.any() and changed.any() and not (differs & changed).any():
            without = f"{word} {format_ranges(differs)} of {len(differs)}"
            return Fault("partial", f"{without} have no update, the others have it")
    return None


def _choose_hypothesis(trial: FaultTrial) -> Fault | None:
    """Return the common fault that explains the layer with the fewest unexplained entries; None if
    none does.
    """
    fitting: list[tuple[int, float, Fault]] = []
    for fault, other in _list_hypotheses(trial):
        if other is None:
            continue
        check = other.check
        limit = _limit_residual(check.expected, check.allowed)
        near = check.residual <= min(limit, trial.check.residual / 2)
        if near or check.count <= min(MAX_UNEXPLAINED * check.entries, trial.check.count / 2):
            fitting.append((check.count, check.residual, fault))
    return min(fitting, key=lambda item: item[:2])[2] if fitting else None


def _limit_residual(squares: float, allowed: float) -> float:
    """Return the largest ‖M − W − D'‖² for which D' explains a layer: 5% of ‖D'‖ and the noise of
    two roundings.

    ``allowed`` is Σ(ulp/2)² or more; each rounding is expected to add a variance of ulp²/12.
    """
    return MAX_DISTANCE**2 * squares + allowed * 2 / 3


def _list_hypotheses(trial: FaultTrial) -> Iterator[tuple[Fault, FaultTrial | None]]:
    """Yield every common fault that a layer may have, with its trial; None where sampled rows rule
    it out.
    """
    task = trial.task
    addend = trial.addend
    fault = Fault("wrong scale", f"ΔW was added times 2: {ADDED_TWICE}, one after the other")
    yield fault, _merge_twice(trial)
    for factor, why in trial.list_wrong_scales().items():
        fault = Fault("wrong scale", f"ΔW was added times {factor:.4g}: {why}")
        yield fault, trial.retry_if_plausible(addend.times(factor))
    if task.is_matrix and task.shape[0] == task.shape[1]:
        fault = Fault("transposed", "ΔWᵀ was added in the place of ΔW")
        yield fault, trial.retry_if_plausible(addend.transpose())
    if has_halves(task.layer, task.shape):
        cause = "ΔW was added with its upper and lower half in each other's place"
        yield Fault("wrong order", cause), trial.retry_if_plausible(addend.swap_halves())
    if nearest := _find_nearest_layer(task):
        fault = Fault("wrong order", f"the ΔW of {nearest[0]} was added here")
        yield fault, trial.retry_if_plausible(nearest[1])


def _merge_twice(trial: FaultTrial) -> FaultTrial | None:
    """Return the trial of a W that already includes ΔW, rounded; None where sampled rows rule it
    out.
    """
    rows, task = trial.task.sample()
    for layer, addend in ((task, trial.addend.take(rows)), (trial.task, trial.addend)):
        blocks = _add_update(layer, addend, trial.rounding.dtype)
        check = check_merge(blocks, layer.shape, addend, trial.rounding)
        other = FaultTrial(layer, addend, trial.rounding, check)
        if trial.is_refuted_by(other):
            return None
    return other


def _add_update(task: MergedLayer, addend: Addend, dtype: torch.dtype) -> Iterator[Block]:
    """Yield the blocks of a layer with W + ΔW, rounded to a dtype, as W."""
    for span, (w, m, step) in zip(row_spans(task.shape), task.blocks(), strict=True):
        yield (w.double() + addend.rows(*span)).to(dtype), m, step


def has_halves(layer: str, shape: tuple[int, int]) -> bool:
    """Return whether a weight has two halves: by its name, and an even number of rows."""
    return shape[0] % 2 == 0 and any(word in layer for word in JOINED_WEIGHTS)


def list_wrong_scales(s: float | None, rank: int | None) -> dict[float, str]:
    """Return the factors c of common mistakes, with their descriptions.

    Args:
        s: The adapter's scaling, α/r or α/√r; None if unknown.
        rank: r; None if unknown.

    Example:
        >>> sorted(list_wrong_scales(2.0, 16))
        [-1.0, 0.25, 0.5, 2.0, 4.0]
    """
    causes: list[tuple[float, str]] = [
        (2.0, ADDED_TWICE),
        (-1.0, "it was subtracted, or BASE and MERGED are swapped"),
    ]
    if s:
        causes += [
            (1 / s, f"the scaling s = {s:.4g} (lora_alpha) was left out"),
            (s, f"s = {s:.4g} was applied twice"),
        ]
    if s is not None and rank is not None and rank > 1:
        root = math.sqrt(rank)
        causes += [
            (root, f"scaled by α/√r where the adapter says α/r (r = {rank})"),
            (1 / root, f"scaled by α/r where the adapter says α/√r, rsLoRA (r = {rank})"),
        ]
    cause_of: dict[float, str] = {}
    for factor, why in causes:
        for other in cause_of:
            if math.isclose(other, factor, rel_tol=1e-6):
                cause_of[other] += f", or {why}"
                break
        else:
            if not math.isclose(factor, 1.0, rel_tol=1e-6):
                cause_of[factor] = why
    return cause_of


def _find_nearest_layer(task: MergedLayer) -> tuple[str, Addend] | None:
    """Return the layer whose ΔW is nearest in direction to the change, by sampled rows; None if
    none is near.
    """
    chosen, sample = task.sample()
    w, m, _ = next(sample.blocks())
    observed = m.double() - w.double()
    best, nearest = MIN_COSINE * float(torch.linalg.vector_norm(observed)), None
    for delta in task.others:
        if delta.layer != task.layer and delta.shape == task.shape:
            addend, _ = sum_addends((delta,), task.shape)
            rows = addend.take(chosen).rows(0, len(chosen))
            along = float((observed * rows).sum()) / (float(torch.linalg.vector_norm(rows)) or 1.0)
            if along > best:
                best, nearest = along, (delta.layer, addend)
    return nearest


def _find_few_entries(trial: FaultTrial) -> Fault | None:
    """Return the fault of a few wrong entries; None if they are many."""
    check = trial.check
    if check.count >= FEW_ENTRIES * check.entries:
        return None
    wrong = f"wrong entries: {check.count}, {_describe_place(trial)}"
    return Fault("other", f"{wrong}; the others are right")


def _find_unrelated_base(trial: FaultTrial) -> Fault | None:
    """Return the fault of a BASE that MERGED does not descend from; None if it does, or if that is
    not known.
    """
    cosine = cosine_to_base(trial.task, trial.check)
    if cosine is None or judge_cosine(cosine, trial.check.entries) != "unrelated":
        return None
    return Fault("other base", "MERGED is unrelated to BASE")


def _find_rounded_base(trial: FaultTrial) -> Fault | None:
    """Return the fault of a base loaded in a shorter dtype than MERGED's, if it explains the
    entries; else None.
    """
    for dtype in (torch.bfloat16, torch.float16):
        if LAYOUT[dtype][2] >= LAYOUT[trial.rounding.dtype][2]:
            continue
        other = trial.retry_if_plausible(bases=(dtype,), roundoff=unit_roundoff(dtype), cast=True)
        if other is None or other.check.drifted:
            continue
        if other.check.count <= MAX_UNEXPLAINED * trial.check.entries:
            name = str(dtype).removeprefix("torch.")
            return Fault("other base", f"ΔW was added to BASE rounded to {name}")
    return None


def _find_uneven_scale(trial: FaultTrial) -> Fault | None:
    """Return the fault of a scale that differs by row, or column, if fitted ones explain the
    entries; else None.
    """
    stretches = trial.check.uneven
    if not stretches:
        return None
    axis = stretches[0].axis
    lines = trial.check.lines[axis]
    factors = 1 + torch.where(lines.energy > 0, lines.difference / lines.energy, 0.0)
    other = trial.retry_if_plausible(trial.addend.scale_lines(factors, axis))
    if other is None or (
        other.check.count > MAX_UNEXPLAINED * trial.check.entries
        and other.check.residual > other.check.allowed
    ):
        return None
    parts = []
    for stretch in stretches:
        mask = torch.zeros(len(factors), dtype=torch.bool)
        mask[stretch.first : stretch.last] = True
        off = f"{100 * abs(stretch.off):.2g}% ± {100 * stretch.error:.1g}%"
        word = "more" if stretch.off > 0 else "less"
        parts.append(f"{off} {word} in {('rows', 'columns')[axis]} {format_ranges(mask)}")
    text = f"the scale of ΔW is not the same everywhere: {' and '.join(parts)} of {len(factors)}"
    return Fault("wrong scale", text)


def _describe_norms(trial: FaultTrial) -> Fault:
    """Return the fault that the norms indicate if no common fault explains every entry."""
    check = trial.check
    place = _describe_place(trial)
    if not check.expected:
        cause = "the adapter's update is zero here, but MERGED differs from BASE"
        return Fault("other", f"{cause} {place}")
    c = check.inner / check.expected
    distance = check.observed - c * c * check.expected
    limit = min(_limit_residual(c * c * check.expected, check.allowed), check.observed / 2)
    wrong_scale = abs(c - 1) > MAX_DISTANCE and distance <= limit
    if wrong_scale or (distance <= check.allowed and check.drifted):
        return Fault("wrong scale", f"ΔW was added times {c:.4g}, which is not a known fault")
    residual = math.sqrt(check.residual)
    # Four standard errors of c, if the rest is independent of ΔW.
    ambiguity = 4 * residual / math.sqrt(check.expected * check.entries)
    if abs(c - 1) <= 0.05 + ambiguity < 0.5:
        share = residual / math.sqrt(check.base) if check.base else math.inf
        change = f"MERGED holds ΔW (c = {c:.2f}) and another change of {share:.2g} ‖W‖"
        guess = "perhaps a different base, such as a quantized one, or further training"
        return Fault("other base", f"{change}: {guess}")
    cosine = check.inner / math.sqrt(check.expected * check.observed)
    likeness = f"cosine {cosine:.2f} with ΔW, c = {c:.2f}"
    return Fault("other", f"MERGED − BASE is a different update {place}: {likeness}")


def _describe_drift(trial: FaultTrial) -> Fault:
    """Return the fault of a scale where rounding explains every single entry but not all of them
    together.
    """
    c = trial.check.inner / trial.check.expected
    cause = "rounding explains each entry, but not all of them together"
    return Fault("wrong scale", f"c = {c:.6g} ± {trial.check.scale_error:.1g}: {cause}")


def _describe_place(trial: FaultTrial) -> str:
    """Return the rows with unexplained entries as text."""
    rows = trial.check.beyond[0] > 0
    if not trial.task.is_matrix or rows.all():
        return "in all rows"
    return f"in rows {format_ranges(rows)} of {len(rows)}"


def format_ranges(marked: Tensor) -> str:
    """Return the marked indices as text: the first ranges, and the number of further ones.

    >>> format_ranges(torch.tensor([True, True, False, True]))
    '0-1, 3'
    """
    edges = torch.nn.functional.pad(marked.to(torch.int8), (1, 1)).diff()
    starts = (edges == 1).nonzero().flatten().tolist()
    ends = (edges == -1).nonzero().flatten().tolist()
    texts = [str(a) if b == a + 1 else f"{a}-{b - 1}" for a, b in zip(starts, ends, strict=True)]
    suffix = f" and {len(texts) - MAX_RANGES} more ranges" if len(texts) > MAX_RANGES else ""
    return ", ".join(texts[:MAX_RANGES]) + suffix
