"""Consistency of records: values that follow from one another by definition must agree.

Values derived from the stored singular values and norms are recomputed in float64; values bounded by a certificate must
satisfy the bound. This detects damage and careless edits, not forgeries: a file with consistently recomputed values and
hash passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

from lora_diag.diagnostics.residual.record import Distance, Residual
from lora_diag.diagnostics.spectrum.record import Spectrum
from lora_diag.records import Results, totals

# Relative difference of two float64 computations of one number: some 1e-16 an operation, over 1e5 singular values.
ROUNDING = 1e-9
# Relative difference of singular values before and after they are written with 9 digits.
DIGITS = 1e-8
# ε is ‖D − X‖/‖D‖ of a float32 difference, the cosine that of float64 products: their squares agree to some 1e-7.
FLOAT32 = 1e-5

# Thresholds of ``metrics.resolution``; restated, so that gate imports no NumPy, and compared with it by a test.
RESOLVED, UNRESOLVED = 0.01, 0.5


def find_contradictions(results: Results[Any]) -> Iterator[str]:
    """Yield contradictions in the records of a run, as ``layer: problem``."""
    bases: dict[str, float] = {}
    for record in results.layers:
        for problem in _check_record(record):
            yield f"{record.layer}: {problem}"
        base_fro = getattr(record, "base_fro", None)
        if base_fro is not None and not _is_close(bases.setdefault(record.layer, base_fro), base_fro):
            yield f"{record.layer}: base_fro is {bases[record.layer]:.9g} in one record and {base_fro:.9g} in another"
    yield from _check_between_adapters(results)
    yield from _check_totals(results)


def _check_record(record: object) -> Iterator[str]:
    if isinstance(record, Spectrum):
        yield from _check_spectrum(record)
    elif isinstance(inner := getattr(record, "spectrum", None), Spectrum):
        yield from _check_spectrum(inner)
    if isinstance(record, Residual):
        yield from _check_residual(record)


def _check_totals(results: Results[Any]) -> Iterator[str]:
    if results.end is None or not results.layers:
        return
    expected, actual = results.end, totals(results.layers, results.left_out)
    for name in ("fro", "base_fro"):
        before, now = getattr(expected, name), getattr(actual, name)
        if (before is None) != (now is None) or (before is not None and not _is_close(before, now)):
            yield f"end: {name} is {_format(before)}, but {_format(now)} by the records of the layers"


def _check_between_adapters(results: Results[Any]) -> Iterator[str]:
    """Yield contradictions of ‖D‖ between records of one layer."""
    norms: dict[str, float] = {}
    for record in results.layers:
        if isinstance(record, Residual) and not _is_close(norms.setdefault(record.layer, record.fro), record.fro):
            yield f"{record.layer}: fro is {norms[record.layer]:.9g} in one record and {record.fro:.9g} in another"


def _check_spectrum(record: Spectrum) -> Iterator[str]:
    s, fro = record.s, record.fro
    if len(s) > min(record.shape):
        yield f"{len(s)} singular values of a {record.shape[0]} × {record.shape[1]} matrix"
    if any(first < second for first, second in pairwise(s)):
        yield "singular values are not in descending order"
    if fro == 0 or not s or s[0] == 0:
        derived = (record.stable_rank, record.effective_rank, *record.energy.values())
        if fro != 0 or any(s) or any(value is not None for value in derived):
            yield f"fro is {fro:.9g}, which the rest of the record contradicts"
        return
    curve = list(accumulate((value / fro) ** 2 for value in s))
    tails = [*accumulate((value / fro) ** 2 for value in reversed(s))][::-1] if record.complete else []
    tolerance = record.energy_error + DIGITS
    if curve[-1] > 1 + tolerance or (record.complete and curve[-1] < 1 - tolerance):
        yield f"Σσ² is {curve[-1]:.9g} of fro², a difference above energy_error = {record.energy_error:.2g}"
    if record.complete:
        curve[-1] = 1.0
    yield from _check_curve(record, curve)
    yield from _check_tails(record, tails)
    if record.stable_rank is None or not _is_close(record.stable_rank, max(1.0, (fro / s[0]) ** 2)):
        yield f"stable_rank is {_format(record.stable_rank)}, but fro²/σ_1² is {(fro / s[0]) ** 2:.9g}"
    effective = _compute_effective_rank(s) if record.complete else None
    if (record.effective_rank is None) != (effective is None) or (
        effective is not None and not _is_close(record.effective_rank or 0.0, effective)
    ):
        yield f"effective_rank is {_format(record.effective_rank)}, but {_format(effective)} by the singular values"
    yield from _check_resolution(record)


def _check_curve(record: Spectrum, curve: Sequence[float]) -> Iterator[str]:
    for rank, value in record.energy.items():
        r = int(rank) if rank.isdecimal() else 0
        expected = curve[r - 1] if 0 < r <= len(curve) else 1.0 if record.complete else None
        if (value is None) != (expected is None) or (
            value is not None and expected is not None and abs(value - min(expected, 1.0)) > ROUNDING
        ):
            yield f"energy.{rank} is {_format(value)}, but {_format(expected)} by the singular values"
    for share, rank_at in record.rank_at.items():
        threshold = float(share)
        reached = rank_at is not None and 0 < rank_at <= len(curve) and curve[rank_at - 1] >= threshold - ROUNDING
        is_first = rank_at is None or rank_at <= 1 or (reached and curve[rank_at - 2] < threshold + ROUNDING)
        if not (is_first and (reached or (rank_at is None and curve[-1] < threshold + ROUNDING))):
            yield f"rank_at.{share} is {_format(rank_at)}, which the singular values contradict"


def _check_tails(record: Spectrum, tails: Sequence[float]) -> Iterator[str]:
    """Yield truncation errors that contradict the singular values; ``tails`` has Σ_{i>r}σ² of a complete spectrum."""
    s, fro = record.s, record.fro
    for rank, tail in record.tail.items():
        r = int(rank) if rank.isdecimal() else 0
        if tail is None:
            if record.complete or r <= len(s):
                yield f"tail.{rank} is null, but the singular values determine it"
            continue
        if record.complete:
            square = tails[r] if r < len(s) else 0.0
        else:
            square = max(0.0, 1 - math.fsum((value / fro) ** 2 for value in s[:r]))
        spectral = s[r] if r < len(s) else 0.0 if record.complete else None
        if abs((tail.fro / fro) ** 2 - square) > ROUNDING or tail.spectral != spectral:
            yield f"tail.{rank} is {tail.fro:.9g} and {_format(tail.spectral)}, which the singular values contradict"


def _compute_effective_rank(s: Sequence[float]) -> float:
    energies = [(value / s[0]) ** 2 for value in s]
    total = math.fsum(energies)
    return math.exp(-math.fsum(e / total * math.log(e / total) for e in energies if e))


def _check_resolution(record: Spectrum) -> Iterator[str]:
    resolution, s = record.resolution, record.s
    above = [sum(value > resolution.edge * factor for value in s) for factor in (1 + DIGITS, 1 - DIGITS)]
    if resolution.signal_rank is None:
        agrees = not record.complete and above[1] == len(s)
    else:
        agrees = above[0] <= resolution.signal_rank <= above[1]
    if not agrees:
        yield f"resolution.signal_rank is {_format(resolution.signal_rank)}, but {above[0]} singular values exceed edge"
    if record.metric == "weights" and record.source == "update":
        # Even noise ends first (Marchenko and Pastur), and no later than its norm; none of three roundings exceeds 3σ.
        lowest = resolution.noise_fro * min(1.0, sum(size**-0.5 for size in record.shape))
        if not lowest * (1 - DIGITS) <= resolution.edge <= 3 * resolution.noise_fro * (1 + DIGITS):
            highest = 3 * resolution.noise_fro
            yield f"resolution.edge is {resolution.edge:.9g}, but {lowest:.9g} to {highest:.9g} by noise_fro"
    noise = (resolution.noise_fro / record.fro) ** 2
    verdicts = [
        "unresolved" if resolution.signal_rank == 0 or share >= UNRESOLVED else "resolved" if share <= RESOLVED else ""
        for share in (noise * (1 - ROUNDING), noise * (1 + ROUNDING))
    ]
    if resolution.verdict not in [verdict or "floor-limited" for verdict in verdicts]:
        relative = resolution.noise_fro / record.fro
        yield f"resolution.verdict is {resolution.verdict}, but noise_fro is {relative:.3g} of fro"


def _check_residual(record: Residual) -> Iterator[str]:
    if record.epsilon is None:
        return  # which is never a pass
    if record.fro == 0:
        yield f"fro is 0 and epsilon is {record.epsilon:.9g}"
        return
    if record.norm_ratio is None or not _is_close(record.norm_ratio, record.adapter_fro / record.fro):
        yield f"norm_ratio is {_format(record.norm_ratio)}, but {record.adapter_fro / record.fro:.9g} by the norms"
    yield from _check_distance(record, "")
    if record.data is not None:
        yield from _check_distance(record.data, "data.")


def _check_distance(distance: Distance, prefix: str) -> Iterator[str]:
    """Yield contradictions to ε² = 1 + ρ² − 2ρ·cos and its consequences."""
    epsilon, ratio, cosine = distance.epsilon, distance.norm_ratio, distance.cosine
    if epsilon is None or ratio is None:
        return
    square = 1.0 if cosine is None else 1 + ratio**2 - 2 * ratio * cosine
    if (cosine is None) != (ratio == 0) or (cosine is not None and abs(cosine) > 1):
        yield f"{prefix}cosine is {_format(cosine)} with a norm_ratio of {ratio:.9g}"
    elif abs(epsilon**2 - square) > FLOAT32 * (1 + ratio**2):
        yield f"{prefix}epsilon is {epsilon:.9g}, but {math.sqrt(max(0.0, square)):.9g} by norm_ratio and cosine"
    if cosine is not None:
        scale, best = distance.best_scale, distance.epsilon_best_scale
        if scale is None or best is None or abs(scale * ratio - cosine) > ROUNDING:
            yield f"{prefix}best_scale is {_format(scale)}, but {cosine / ratio:.9g} by cosine and norm_ratio"
        elif abs(best**2 - max(0.0, epsilon**2 - ((1 - scale) * ratio) ** 2)) > ROUNDING * (1 + epsilon**2):
            yield f"{prefix}epsilon_best_scale is {best:.9g}, which epsilon and best_scale contradict"
    excess = None if distance.epsilon_min is None else epsilon**2 - distance.epsilon_min**2
    if (excess is None) != (distance.excess is None) or (
        excess is not None
        and distance.excess is not None
        and abs(excess - distance.excess) > ROUNDING * (1 + epsilon**2)
    ):
        yield f"{prefix}excess is {_format(distance.excess)}, but {_format(excess)} by epsilon and epsilon_min"


def _is_close(first: float, second: float) -> bool:
    return abs(first - second) <= ROUNDING * max(abs(first), abs(second))


def _format(value: float | None) -> str:
    return "null" if value is None else f"{value:.9g}"
