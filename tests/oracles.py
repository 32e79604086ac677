"""Slow float64 references, written from the definitions; they share no code with the package."""

import math

import numpy as np


def spectrum(base: np.ndarray, tuned: np.ndarray) -> dict:
    """The values of a spectrum record, from numpy.linalg.svd in float64."""
    delta = tuned.astype(np.float64) - base.astype(np.float64)
    s = np.linalg.svd(delta, compute_uv=False)
    energy = s**2
    total = energy.sum()
    curve = np.array([energy[: r + 1].sum() for r in range(len(s))]) / total if total else None
    return {
        "fro": float(np.sqrt((delta**2).sum())),
        "base_fro": float(np.sqrt((base.astype(np.float64) ** 2).sum())),
        "s": s,
        "curve": curve,
    }


def energy_at(s: np.ndarray, rank: int) -> float:
    return float((s[:rank] ** 2).sum() / (s**2).sum())


def rank_at(s: np.ndarray, threshold: float) -> int:
    """Count up until enough energy is there."""
    total, kept = float((s**2).sum()), 0.0
    for rank, value in enumerate(s, 1):
        kept += float(value) ** 2
        if kept / total >= threshold:
            return rank
    return len(s)


def effective_rank(s: np.ndarray) -> float:
    p = s**2 / (s**2).sum()
    return float(np.exp(-sum(x * np.log(x) for x in p if x > 0)))


def best_approximation(delta: np.ndarray, rank: int) -> np.ndarray:
    u, s, vh = np.linalg.svd(delta.astype(np.float64), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def bf16(values: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16, ties to even, by its bits; returned as float32."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).astype(np.uint32)
    return rounded.view(np.float32)


def with_spectrum(s: np.ndarray, m: int, n: int, seed: int) -> np.ndarray:
    """A float64 m×n matrix with the given singular values and random singular vectors."""
    rng = np.random.default_rng(seed)
    k = min(m, n)
    u, _ = np.linalg.qr(rng.standard_normal((m, k)))
    v, _ = np.linalg.qr(rng.standard_normal((n, k)))
    full = np.zeros(k)
    full[: len(s)] = s
    return (u * full) @ v.T


def distance(d: np.ndarray, x: np.ndarray, rank: int | None) -> dict:
    """The distances of x from d in a residual record, from their definitions."""
    fro, other = np.sqrt((d**2).sum()), np.sqrt((x**2).sum())
    result = {
        "epsilon": float(np.sqrt(((d - x) ** 2).sum()) / fro),
        "norm_ratio": float(other / fro),
    }
    if rank is not None:
        best = best_approximation(d, rank) if rank else np.zeros_like(d)
        result["epsilon_min"] = float(np.sqrt(((d - best) ** 2).sum()) / fro)
        result["excess"] = result["epsilon"] ** 2 - result["epsilon_min"] ** 2
    if other:
        scale = float((d * x).sum() / (x**2).sum())
        result["cosine"] = float((d * x).sum() / fro / other)
        result["best_scale"] = scale
        result["epsilon_best_scale"] = float(np.sqrt(((d - scale * x) ** 2).sum()) / fro)
    return result


def subspace_overlap(d: np.ndarray, x: np.ndarray, rank: int) -> tuple[float, float]:
    """Mean squared cosine of the principal angles of the top-``rank`` column and row spaces."""
    (u, _, vh), (w, _, zh) = (np.linalg.svd(matrix, full_matrices=False) for matrix in (d, x))
    columns, rows = u[:, :rank].T @ w[:, :rank], vh[:rank] @ zh[:rank].T
    return float((columns**2).sum() / rank), float((rows**2).sum() / rank)


def square_root(c: np.ndarray) -> np.ndarray:
    """The symmetric square root C^½, by its eigenvectors."""
    eigenvalues, vectors = np.linalg.eigh(c)
    return (vectors * np.sqrt(np.clip(eigenvalues, 0, None))) @ vectors.T


def error_of_ratio(difference, counts) -> float:
    """The standard error of Σ difference / Σ counts (Cochran), of sequences with so many
    predictions.
    """
    apart = difference - difference.sum() / counts.sum() * counts
    return error_of_mean(apart) * len(counts) / counts.sum()


def error_of_mean(values) -> float:
    """Standard error of the mean of consecutive values, by the means of overlapping batches of ⌊√N⌋
    of them.

    Meketon and Schmeiser 1984: Σ(batch mean − mean)² over N − b + 1 batches, times b/((N − b + 1)(N
    − b)).
    """
    n = len(values)
    b = math.floor(math.sqrt(n))
    means = [math.fsum(values[start : start + b]) / b for start in range(n - b + 1)]
    squares = math.fsum((mean - math.fsum(values) / n) ** 2 for mean in means)
    return math.sqrt(b / ((n - b + 1) * (n - b)) * squares)
