"""Fraction of entries that one optimizer step moves in a 16-bit format, from sampled entries of
BASE.

An optimizer that adds lr to a stored entry w, in float32 arithmetic and with rounding to nearest,
ties to even, changes w iff lr > u/2, or lr = u/2 and the mantissa of w is odd, where u is the
distance of w to its neighbour in the direction of the step. u = 2^(e − p) for p bits of the
mantissa and the exponent e of w; towards zero it is half of that where w is a power of two. A
format of 16 bits has 65,536 codes, so all of this is one table per lr.

Adam's first step is lr·g/(|g| + ε): lr for all entries with |g| ≫ ε (1e-8 by default). Later steps
are smaller.

References: Kingma and Ba 2015, section 2.1 (|Δ| ≲ lr); arXiv 2602.03839 (a bf16 weight absorbs
updates below |w|/256).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_diag.linting.record import StepShare
from lora_diag.records.names import module_type_of, type_order
from lora_diag.storage import Checkpoint
from lora_diag.storage.file_bytes import decode
from lora_diag.storage.remote import RemotePath

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Codes = NDArray[np.uint16]

# Bits of the mantissa, and exponent bias.
FORMATS = {"bfloat16": (7, 127), "float16": (10, 15)}

# Contiguous ranges that are read of each module type, one at random in each of as many equal parts,
# and their entries.
RANGES, ENTRIES = 64, 1024

# Entries and steps of a simulated path: 0.3 s.
PATH_ENTRIES, PATH_STEPS = 4096, 2000


def encode(values: Any, dtype: str) -> Codes:
    """Return numbers as codes of a 16-bit format, rounded to nearest, ties to even.

    >>> [hex(code) for code in encode([1.0, 1.00390625, 1.01171875], "bfloat16")]
    ['0x3f80', '0x3f80', '0x3f82']
    """
    numbers = np.asarray(values, np.float32)
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return numbers.astype(np.float16).view(np.uint16)
    bits = numbers.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def moving_table(dtype: str, step: float) -> NDArray[np.float64]:
    """Return for every code the fraction of the two directions in which a step changes it; 0 if it
    is not finite.

    >>> table = moving_table("bfloat16", 2.0**-9)
    >>> [float(table[code]) for code in encode([1.0, 1.0078125, 0.25], "bfloat16")]
    [0.0, 0.0, 1.0]
    """
    bits, bias = FORMATS[dtype]
    codes = np.arange(1 << 16)
    mantissa, exponent = codes & ((1 << bits) - 1), (codes >> bits) & ((1 << (15 - bits)) - 1)
    gap = np.ldexp(1.0, np.maximum(exponent, 1) - bias - bits)  # to the neighbour away from zero
    gap[exponent == (1 << (15 - bits)) - 1] = np.inf
    gaps = gap, np.where((mantissa == 0) & (exponent > 1), gap / 2, gap)
    up, down = ((step > gap / 2) | ((step == gap / 2) & (codes & 1 == 1)) for gap in gaps)
    return np.asarray((up + down.astype(np.float64)) / 2)


@dataclass(frozen=True, slots=True)
class TypeSample:
    """Entries of the weights of one module type.

    Args:
        name: The module type.
        entries: Number of entries of its weights.
        ranges: Codes of the sampled ranges; all entries if ``entries`` is their number.
    """

    name: str
    entries: int
    ranges: tuple[Codes, ...]

    @property
    def sampled(self) -> int:
        """Number of sampled entries."""
        return sum(map(len, self.ranges))

    def mean(self, table: NDArray[np.float64]) -> tuple[float, float]:
        """Return the mean over entries of a value per code, and its standard error.

        The error is √(Σ(y_i − y_{i+1})² / 2(n − 1)n) over the means y of successive ranges, since
        each is a stratum (Wolter 2007, Introduction to Variance Estimation, section 8.2); 0 if all
        entries were read.
        """
        pairs = [(float(np.mean(table[codes])), len(codes)) for codes in self.ranges]
        mean = sum(value * size for value, size in pairs) / self.sampled
        if self.sampled == self.entries or len(pairs) < 2:
            return mean, 0.0
        return mean, math.sqrt(
            float(np.mean(np.diff([value for value, _ in pairs]) ** 2)) / 2 / len(pairs)
        )


def sample_entries(
    checkpoint: Checkpoint, names: Sequence[str], dtype: str, seed: int = 0
) -> list[TypeSample]:
    """Return sampled entries of weights by module type, as codes of a format; only these ranges are
    read.

    Args:
        checkpoint: BASE.
        names: The weights; stored as floating-point numbers.
        dtype: The format in which they are trained.
        seed: Seed of the positions.
    """
    types: dict[str, list[str]] = {}
    for name in sorted(names, key=type_order):
        types.setdefault(module_type_of(name), []).append(name)
    random = np.random.default_rng(seed)
    places: dict[str, list[tuple[str, int, int]]] = {}
    totals = {kind: sum(checkpoint[name].numel for name in own) for kind, own in types.items()}
    for kind, own in types.items():
        if totals[kind] <= RANGES * ENTRIES:
            places[kind] = [(name, 0, checkpoint[name].numel) for name in own]
            continue
        ends = np.cumsum([checkpoint[name].numel for name in own])
        for at in (totals[kind] * (np.arange(RANGES) + random.random(RANGES)) / RANGES).astype(
            np.int64
        ):
            index = int(np.searchsorted(ends, at, side="right"))
            size = checkpoint[own[index]].numel
            start = max(0, min(int(at - ends[index]) + size, size - ENTRIES))
            places.setdefault(kind, []).append((own[index], start, min(start + ENTRIES, size)))
    flat = [place for each in places.values() for place in each]
    reader: Any = map
    if isinstance(checkpoint.files[0].path, RemotePath):
        from lora_diag.storage.addresses import (
            map_concurrently as reader,
        )  # imported only for remote files
    codes = reader(lambda place: encode(checkpoint.read_range(*place), dtype), flat)
    return [
        TypeSample(kind, totals[kind], tuple(next(codes) for _ in each))
        for kind, each in places.items()
    ]


def measure_shares(samples: Sequence[TypeSample], dtype: str, lr: float) -> list[StepShare]:
    """Return the fraction of entries that a step of size ``lr`` moves: one record for all, then one
    per module type.
    """
    table = moving_table(dtype, lr)
    rows = [
        (sample.name, sample.entries, sample.sampled, *sample.mean(table)) for sample in samples
    ]
    total = sum(entries for _, entries, *_ in rows)
    pooled = sum(entries / total * moved for _, entries, _, moved, _ in rows)
    error = math.hypot(*(entries / total * error for _, entries, _, _, error in rows))
    rows.insert(0, ("all", total, sum(sampled for _, _, sampled, *_ in rows), pooled, error))
    names = ("name", "entries", "sampled", "moved", "error")
    return [StepShare(dtype=dtype, lr=lr, **dict(zip(names, row, strict=True))) for row in rows]


def simulate_path(
    samples: Sequence[TypeSample], dtype: str, lr: float, steps: int, seed: int = 0
) -> Mapping[str, float]:
    """Return the fraction c = ⟨Q − w, d⟩/‖d‖² of a path d that weights in a 16-bit format follow.

    The model: every entry of a sample gets ``steps`` steps of size ``lr``, and is rounded after
    each. All steps of an entry have one direction (``one direction``), or each an independent
    random sign (``random signs``): real paths lie between the two. c = 1 if nothing is lost; it can
    exceed 1, since a step that moves an entry moves it by u.
    """
    random = np.random.default_rng(seed)
    total = sum(sample.entries for sample in samples)
    parts = []
    for sample in samples:
        codes = np.concatenate(sample.ranges)
        parts.append(random.choice(codes, max(1, round(PATH_ENTRIES * sample.entries / total))))
    start = np.concatenate(parts)
    start = start[np.isfinite(decode(start.view(np.uint8), dtype))]
    kept = {}
    for name, draws in (("one direction", 1), ("random signs", steps)):
        signs = random.choice([-1.0, 1.0], (draws, len(start))).astype(np.float32)
        now, path = start, signs.sum(axis=0, dtype=np.float64) * (steps / draws)
        for step in range(steps):
            now = encode(
                decode(now.view(np.uint8), dtype) + signs[step % draws] * np.float32(lr), dtype
            )
        moved = (
            decode(now.view(np.uint8), dtype).astype(np.float64)
            - decode(start.view(np.uint8), dtype)
        ) / lr
        kept[name] = float(moved @ path) / max(float(path @ path), 1.0)
    return kept


def share_of_uniform(bound: float, dtype: str, lr: float) -> float:
    """Return the fraction of uniform entries within ± ``bound`` that a step moves."""
    return float(moving_table(dtype, lr)[encode(np.linspace(-bound, bound, 1 << 20), dtype)].mean())


def estimate_rounding(
    base: Checkpoint, factors: Mapping[str, Any], dtype: str, seed: int = 0
) -> float:
    """Return ‖Q(W + ΔW) − W − ΔW‖_F / ‖ΔW‖_F of a merge, estimated from sampled entries of W.

    Entries of ΔW are taken as normal, with the norm of ΔW in the module type, and independent of W.

    Args:
        base: BASE.
        factors: B, A and s of each adapted weight.
        dtype: The 16-bit dtype of these weights, to which Q rounds.
        seed: Seed of the entries of ΔW.
    """
    squares = Counter[str]()
    for layer, thin in factors.items():
        b, a = thin.read_b().astype(np.float64), thin.read_a().astype(np.float64)
        squares[module_type_of(layer)] += thin.read_scale() ** 2 * float(
            ((b.T @ b) * (a @ a.T)).sum()
        )
    random, error = np.random.default_rng(seed), 0.0
    for sample in sample_entries(base, list(factors), dtype, seed):
        w = decode(np.concatenate(sample.ranges).view(np.uint8), dtype).astype(np.float64)
        x = w + random.normal(0, math.sqrt(squares[sample.name] / sample.entries), len(w))
        error += sample.entries * float(
            np.nanmean((decode(encode(x, dtype).view(np.uint8), dtype) - x) ** 2)
        )
    return math.sqrt(error / squares.total()) if squares.total() else 0.0
