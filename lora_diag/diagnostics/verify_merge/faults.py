"""Diagnosis of a layer that is not a merge of W and ΔW: common faults, tested one by one.

A fault is a hypothesis "M is W + D', rounded" with another D' than the adapter's ΔW: c·ΔW, ΔWᵀ, another expert's ΔW. It
is accepted if it explains all but one entry in a thousand, or if ‖M − W − D'‖ is at most rounding plus 5% of ‖D'‖. The
failure itself was established entry by entry before; this module only gives the likely cause.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_diag.diagnostics.verify_merge.record import MergeStatus
from lora_diag.linalg.merge import Addend, Check, Product, Rounding, unit_roundoff
from lora_diag.linalg.rounding import LAYOUT

# Maximum fraction of entries that a fault may leave unexplained: roundings that differ from those of a correct merge.
MAX_UNEXPLAINED = 1e-3

# Maximum fraction of ‖D'‖, besides rounding, that a fault may leave unexplained.
MAX_DISTANCE = 0.05

# If less than this fraction of the entries is wrong, the others are taken as correct.
FEW_ENTRIES = 0.05

# Errors of a ΔW that was computed less precisely are of all sizes: in units of their bound their standard deviation is
# about 0.2/√r, so that with entries beyond LARGE_ERROR there are at least MIN_SPREAD times as many beyond SMALL_ERROR:
# on products in bf16 (16² to 256², r from 1 to 64, rows of zeros among them) 1.6 times or more. Only in matrices of
# MIN_ENTRIES or more, and where the largest error is above MIN_ULP spacings, so that small ones show, too.
LARGE_ERROR, SMALL_ERROR, MIN_SPREAD, MIN_ENTRIES, MIN_ULP = 1 / 8, 1 / 64, 1.25, 256, 32.0

# Unit roundoff of the coarsest arithmetic in which the ΔW of a right merge is computed, bfloat16.
BFLOAT16_ROUNDOFF = 2.0**-8

# Unit roundoff of float32, in which most merges compute ΔW for every dtype of the model.
FLOAT32_ROUNDOFF = 2.0**-24

# Minimum number of rows and columns with entries that a scale explains and 1 does not, and their minimum fraction.
MIN_LINES, MIN_COHERENCE = 32, 0.95

# Maximum number of steps to the scale; two or three are usual, more where ΔW is close to the spacing of M.
MAX_SECANT_STEPS = 12

# Minimum cosine of a layer's change with the ΔW of another layer that was added to it.
MIN_COSINE = 0.5

# Weights that join two layers, whose halves can be in the wrong order.
JOINED_WEIGHTS = ("gate_up", "gate_and_up", "up_gate", "w13", "kv_proj", "input_linear")

ADDED_TWICE = "it was added twice"
NOT_ADDED = "MERGED holds BASE's weight: the update was not added"

# Maximum number of row ranges named in a message.
MAX_RANGES = 3


@dataclass(frozen=True, slots=True)
class Fault:
    """The fault of a layer.

    Args:
        status: Status word.
        cause: Likely cause, as a sentence.
    """

    status: MergeStatus
    cause: str


@dataclass(frozen=True, slots=True)
class FailedLayer:
    """A failing layer, with functions to check hypotheses on it.

    Args:
        layer: Name of the layer.
        is_matrix: False for 1-D tensors.
        shape: ``(m, n)``.
        addend: The adapter's ΔW.
        rounding: Possible rounding of a correct merge.
        check: Result of the check with ΔW.
        recheck: The same check with a different D' or rounding.
        recheck_on_top: The check of MERGED as a merge of ΔW into W + ΔW, rounded, instead of W.
        rounded: fl(s)/s for s rounded to bfloat16 and to float16, where that is not 1.
        load_change: Returns the first rows of M − W.
        scale: s of the adapter; None if unknown.
        rank: r of the adapter; None if unknown.
        others: Names of layers of the same kind and shape.
        load_other: Takes one of them, returns its ΔW.
    """

    layer: str
    is_matrix: bool
    shape: tuple[int, int]
    addend: Addend
    rounding: Rounding
    check: Check
    recheck: Callable[[Addend, Rounding], Check]
    recheck_on_top: Callable[[], Check]
    rounded: tuple[float, ...]
    load_change: Callable[[], Tensor]
    scale: float | None
    rank: int | None
    others: tuple[str, ...]
    load_other: Callable[[str], Addend]


def find_fault(failed: FailedLayer) -> Fault:
    """Return the first common fault that explains a layer; without one, a description of the difference."""
    check = failed.check
    if check.moved == 0:
        return Fault("dropped", NOT_ADDED)
    return (
        _find_scale(failed)
        or find_precise_scale(failed)
        or _find_coarse_arithmetic(failed)
        or (_find_partial(failed) if check.count else None)
        or _choose_hypothesis(failed)
        or _find_uneven_scale(failed)
        or (_find_few_entries(failed) or _find_rounded_base(failed) or _describe_norms(failed) if check.count else None)
        or _describe_drift(failed)
    )


def _find_scale(failed: FailedLayer) -> Fault | None:
    """Test a scale other than 1 that leaves only rounding: no other cause is needed."""
    fit = fit_scale(failed)
    if fit is None or abs(fit.factor - 1) <= fit.limit or fit.check.drifted:
        return None
    if fit.check.count > MAX_UNEXPLAINED * failed.check.entries or fit.check.residual > fit.check.allowed:
        return None
    for factor, why in list_wrong_scales(failed.scale, failed.rank).items():
        if abs(fit.factor - factor) <= fit.limit + failed.rounding.roundoff * abs(factor):
            return Fault("wrong scale", f"ΔW was added times {factor:.4g}: {why}")
    if failed.rounding.roundoff < BFLOAT16_ROUNDOFF and any(
        abs(fit.factor - factor) <= fit.limit for factor in failed.rounded
    ):
        return Fault("coarse", f"ΔW was added times {fit}: the scaling s = {failed.scale:.4g} was rounded to 16 bits")
    return Fault("wrong scale", f"ΔW was added times {fit}, which is not a known fault")


def find_precise_scale(failed: FailedLayer) -> Fault | None:
    """Test a scale other than 1 that explains the entries if ΔW was computed in float32, where 1 does not.

    In a correct merge with coarser arithmetic, the entries that 1 does not explain deviate in both directions: by
    chance MIN_COHERENCE more in one than in the other, of MIN_LINES, with probability
    2·exp(−MIN_COHERENCE²·MIN_LINES/2) = 1e-6 (Hoeffding 1963), and no scale explains them.
    """
    precise_rounding = make_precise(failed.rounding)
    if precise_rounding == failed.rounding or not failed.check.expected:
        return None
    check = failed.recheck(failed.addend, precise_rounding)
    if count_distinct_lines(check) < MIN_LINES or not is_coherent(check):
        return None
    fit = fit_scale(replace(failed, rounding=precise_rounding, check=check))
    if fit is None or fit.check.count > (1 - MIN_COHERENCE) * check.count or fit.check.drifted:
        return None
    spacing = abs(fit.factor - 1) / check.count  # mean distance between entries that a scale changes
    fit = replace(fit, error=max(fit.error, (1 + fit.check.count) * spacing))
    if abs(fit.factor - 1) <= fit.limit + failed.check.common_error:
        return None
    return Fault(
        "wrong scale", f"ΔW was added times {fit}: this factor explains the entries to the last bit, 1 does not"
    )


def is_coherent(check: Check) -> bool:
    """Return whether nearly all differences of M from M* are in the direction of ΔW, or against it."""
    return abs(check.inner - check.ideal) > MIN_COHERENCE * check.apart


def count_distinct_lines(check: Check) -> int:
    """Return the number of rows, or of columns if these are fewer, with an unexplained entry."""
    return min(int((counts > 0).sum()) for counts in check.beyond)


def make_precise(rounding: Rounding) -> Rounding:
    """Return the same rounding of a ΔW computed at least in float32, from factors that were not cast."""
    return replace(rounding, roundoff=min(rounding.roundoff, FLOAT32_ROUNDOFF), cast=False)


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
        """Return the factor with the digits that its error permits, and the error."""
        digits = min(12, max(2, 1 - math.floor(math.log10(max(self.error, 1e-12)))))
        return f"{self.factor:.{digits}f} ± {self.error:.1g}"


def fit_scale(failed: FailedLayer) -> Fit | None:
    """Solve c*(γ) = c for the scale γ, c*(γ) being c of W + γ·ΔW rounded once, by chords from γ = 1.

    Where rounding swallows part of ΔW, c is not the scale that was applied.

    Returns:
        The fit; None where ΔW is zero, or c does not determine γ.
    """
    expected, inner = failed.check.expected, failed.check.inner
    if not expected or not math.isfinite(failed.check.scale_error):
        return None
    error = (inner - failed.check.ideal) / expected
    factor, fit = 1.0 + error, None
    for _ in range(MAX_SECANT_STEPS):
        if factor in {0.0, 1.0} or not math.isfinite(factor):
            break
        # a wrong scale is rarely a power of two, so a factor may be rounded once more than in a correct merge
        check = failed.recheck(failed.addend.times(factor), replace(failed.rounding, cast=True))
        new_error = (check.inner - check.ideal) / (factor * expected)
        slope = (error - new_error) / (factor - 1.0)
        if not slope > 0:
            break
        unit = abs(factor) / slope
        fit = Fit(factor, check.scale_error * unit, check.scale_limit * unit, check)
        if abs(new_error) <= 0.01 * check.scale_error * abs(factor) + 1e-15:
            break
        factor += new_error / slope
    return fit


def _find_coarse_arithmetic(failed: FailedLayer) -> Fault | None:
    """Test a merge in float32 or float16 whose ΔW was computed less precisely (bfloat16, TF32): correct, not exact."""
    if failed.rounding.roundoff >= BFLOAT16_ROUNDOFF:
        return None

    def check_coarse(fraction: float, addend: Addend) -> Check:
        """Return the check with a roundoff of this fraction of bfloat16's."""
        return failed.recheck(addend, replace(failed.rounding, roundoff=BFLOAT16_ROUNDOFF * fraction, cast=True))

    addends = [failed.addend, *(failed.addend.times(factor) for factor in failed.rounded)]
    if isinstance(failed.addend, Product):
        addends.append(failed.addend.truncate_factors(failed.scale or 1.0))
    for addend in addends:
        check = check_coarse(1.0, addend)
        if not check.count and not check.drifted:
            break
    else:
        return None
    visible = failed.check.entries >= MIN_ENTRIES and failed.check.worst > MIN_ULP
    if (
        visible
        and (large := check_coarse(LARGE_ERROR, addend).count)
        and check_coarse(SMALL_ERROR, addend).count < MIN_SPREAD * large
    ):
        return None  # a few entries are far off while others are correct to the last bit
    distance = math.sqrt(failed.check.residual / failed.check.expected) if failed.check.expected else 0.0
    dtype = str(failed.rounding.dtype).removeprefix("torch.")
    return Fault("coarse", f"right to {distance:.1g} of ‖ΔW‖: ΔW was computed less precisely than {dtype} allows")


def _find_partial(failed: FailedLayer) -> Fault | None:
    """Test whether some rows (or columns) have the update and all others have none."""
    for axis, word in enumerate(("rows", "columns")):
        differs, changed = failed.check.beyond[axis] > 0, failed.check.beyond_base[axis] > 0
        if differs.any() and changed.any() and not (differs & changed).any():
            text = f"{word} {format_ranges(differs)} of {len(differs)} have no update, the others have it"
            return Fault("partial", text)
    return None


def _choose_hypothesis(failed: FailedLayer) -> Fault | None:
    """Test every common fault; of those that explain the layer, return the one with the fewest unexplained entries."""
    fitting: list[tuple[int, float, Fault]] = []
    for fault, check in _list_hypotheses(failed):
        near = check.residual <= min(_limit_residual(check.expected, check.allowed), failed.check.residual / 2)
        if near or check.count <= min(MAX_UNEXPLAINED * check.entries, failed.check.count / 2):
            fitting.append((check.count, check.residual, fault))
    return min(fitting, key=lambda item: item[:2])[2] if fitting else None


def _limit_residual(squares: float, allowed: float) -> float:
    """Return the largest ‖M − W − D'‖² for which D' explains a layer: 5% of ‖D'‖ and the noise of two roundings.

    ``allowed`` is Σ(ulp/2)² or more; each rounding is expected to add a variance of ulp²/12.
    """
    return MAX_DISTANCE**2 * squares + allowed * 2 / 3


def _list_hypotheses(failed: FailedLayer) -> Iterator[tuple[Fault, Check]]:
    """Yield every common fault that a layer may have, with the check of its hypothesis."""

    def make_hypothesis(status: MergeStatus, cause: str, addend: Addend) -> tuple[Fault, Check]:
        """Return a fault, with the check of its D'."""
        return Fault(status, cause), failed.recheck(addend, failed.rounding)

    yield Fault("wrong scale", f"ΔW was added times 2: {ADDED_TWICE}, one after the other"), failed.recheck_on_top()
    for factor, why in list_wrong_scales(failed.scale, failed.rank).items():
        yield make_hypothesis("wrong scale", f"ΔW was added times {factor:.4g}: {why}", failed.addend.times(factor))
    if failed.is_matrix and failed.shape[0] == failed.shape[1]:
        yield make_hypothesis("transposed", "ΔWᵀ was added in the place of ΔW", failed.addend.transpose())
    if has_halves(failed.layer, failed.shape):
        why = "ΔW was added with its upper and lower half in each other's place"
        yield make_hypothesis("wrong order", why, failed.addend.swap_halves())
    if name := _find_nearest_layer(failed):
        yield make_hypothesis("wrong order", f"the ΔW of {name} was added here", failed.load_other(name))


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
    causes: list[tuple[float, str]] = [(2.0, ADDED_TWICE), (-1.0, "it was subtracted, or BASE and MERGED are swapped")]
    if s:
        causes += [(1 / s, f"the scaling s = {s:.4g} (lora_alpha) was left out"), (s, f"s = {s:.4g} was applied twice")]
    if rank is not None and rank > 1:
        causes += [
            (math.sqrt(rank), f"scaled by α/√r where the adapter says α/r (r = {rank})"),
            (1 / math.sqrt(rank), f"scaled by α/r where the adapter says α/√r, rsLoRA (r = {rank})"),
        ]
    cause_of: dict[float, str] = {}
    for factor, why in causes:
        same_factor = next((other for other in cause_of if math.isclose(other, factor, rel_tol=1e-6)), None)
        if same_factor is not None:
            cause_of[same_factor] += f", or {why}"
        elif not math.isclose(factor, 1.0, rel_tol=1e-6):
            cause_of[factor] = why
    return cause_of


def _find_nearest_layer(failed: FailedLayer) -> str | None:
    """Return the layer whose ΔW is nearest in direction to the change, by the first rows; None if none is near."""
    observed = failed.load_change()
    best, nearest = MIN_COSINE * float(torch.linalg.vector_norm(observed)), None
    for name in failed.others:
        rows = failed.load_other(name).rows(0, len(observed))
        along = float((observed * rows).sum()) / (float(torch.linalg.vector_norm(rows)) or 1.0)
        if along > best:
            best, nearest = along, name
    return nearest


def _find_few_entries(failed: FailedLayer) -> Fault | None:
    """Test whether few of the entries are wrong."""
    check = failed.check
    if check.count >= FEW_ENTRIES * check.entries:
        return None
    return Fault("other", f"{check.count} entries differ {_describe_place(failed)}, the others are right")


def _find_rounded_base(failed: FailedLayer) -> Fault | None:
    """Test a merge into a base that was loaded in a shorter dtype than MERGED's."""
    for dtype in (torch.bfloat16, torch.float16):
        if LAYOUT[dtype][2] >= LAYOUT[failed.rounding.dtype][2]:
            continue
        rounding = replace(failed.rounding, bases=(dtype,), roundoff=unit_roundoff(dtype), cast=True)
        check = failed.recheck(failed.addend, rounding)
        if check.count <= MAX_UNEXPLAINED * failed.check.entries and not check.drifted:
            return Fault("other base", f"ΔW was added to BASE rounded to {str(dtype).removeprefix('torch.')}")
    return None


def _find_uneven_scale(failed: FailedLayer) -> Fault | None:
    """Test whether scales fitted to each row, or column, explain the entries, where they differ between stretches."""
    stretches = failed.check.uneven
    if not stretches:
        return None
    axis = stretches[0].axis
    lines = failed.check.lines[axis]
    factors = 1 + torch.where(lines.energy > 0, lines.difference / lines.energy, 0.0)
    check = failed.recheck(failed.addend.scale_lines(factors, axis), failed.rounding)
    if check.count > MAX_UNEXPLAINED * failed.check.entries and check.residual > check.allowed:
        return None
    masks = torch.zeros(len(stretches), len(factors), dtype=torch.bool)
    for mask, stretch in zip(masks, stretches, strict=True):
        mask[stretch.first : stretch.last] = True
    parts = " and ".join(
        f"{100 * abs(stretch.off):.2g}% ± {100 * stretch.error:.1g}% {'more' if stretch.off > 0 else 'less'} in "
        f"{('rows', 'columns')[axis]} {format_ranges(mask)}"
        for mask, stretch in zip(masks, stretches, strict=True)
    )
    return Fault("wrong scale", f"the scale of ΔW is not the same everywhere: {parts} of {len(factors)}")


def _describe_norms(failed: FailedLayer) -> Fault:
    """Return the fault that the norms indicate if no common fault explains every entry."""
    check = failed.check
    if not check.expected:
        return Fault(
            "other", f"the adapter's update is zero here, but MERGED differs from BASE {_describe_place(failed)}"
        )
    c = check.inner / check.expected
    distance = check.observed - c * c * check.expected
    wrong_scale = abs(c - 1) > MAX_DISTANCE and distance <= min(
        _limit_residual(c * c * check.expected, check.allowed), check.observed / 2
    )
    if wrong_scale or (distance <= check.allowed and check.drifted):
        return Fault("wrong scale", f"ΔW was added times {c:.4g}, which is not a known fault")
    residual = math.sqrt(check.residual)
    # Four standard errors of c, if the rest is independent of ΔW.
    ambiguity = 4 * residual / math.sqrt(check.expected * check.entries)
    if abs(c - 1) <= 0.05 + ambiguity < 0.5:
        share = residual / math.sqrt(check.base) if check.base else math.inf
        return Fault(
            "other base",
            f"MERGED holds ΔW (c = {c:.2f}) and another change of {share:.2g} ‖W‖: perhaps a different base, such as a "
            "quantized one, or further training",
        )
    cosine = check.inner / math.sqrt(check.expected * check.observed)
    return Fault(
        "other",
        f"MERGED − BASE is a different update {_describe_place(failed)}: cosine {cosine:.2f} with ΔW, c = {c:.2f}",
    )


def _describe_drift(failed: FailedLayer) -> Fault:
    """Return the fault of a scale where rounding explains every single entry but not all of them together."""
    c, error = failed.check.inner / failed.check.expected, failed.check.scale_error
    return Fault(
        "wrong scale", f"c = {c:.6g} ± {error:.1g}: rounding explains each entry, but not all of them together"
    )


def _describe_place(failed: FailedLayer) -> str:
    """Return the rows with unexplained entries as text."""
    rows = failed.check.beyond[0] > 0
    return f"in rows {format_ranges(rows)} of {len(rows)}" if failed.is_matrix and not rows.all() else "in all rows"


def format_ranges(marked: Tensor) -> str:
    """Return the marked indices as text: the first ranges, and the number of further ones.

    >>> format_ranges(torch.tensor([True, True, False, True]))
    '0-1, 3'
    """
    edges = torch.nn.functional.pad(marked.to(torch.int8), (1, 1)).diff()
    starts, ends = (edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist()
    texts = [str(a) if b == a + 1 else f"{a}-{b - 1}" for a, b in zip(starts, ends, strict=True)]
    suffix = f" and {len(texts) - MAX_RANGES} more ranges" if len(texts) > MAX_RANGES else ""
    return ", ".join(texts[:MAX_RANGES]) + suffix
