"""Singular values, norms, angles and losses → numbers. NumPy and SciPy only.

Functions are independent of torch, names and files.
"""

from lora_diag.metrics.energy import (
    RANKS,
    THRESHOLDS,
    effective_rank,
    energy_curve,
    rank_at,
    ranks_at,
    spectral_error,
    stable_rank,
    truncation_error,
)
from lora_diag.metrics.resolution import Gain, Noise, signal_rank, verdict, weighted_edge
from lora_diag.metrics.subspaces import Distances, Parts, compute_distances, find_limit, pool_distances, split_epsilon

__all__ = [
    "RANKS",
    "THRESHOLDS",
    "Distances",
    "Gain",
    "Noise",
    "Parts",
    "compute_distances",
    "effective_rank",
    "energy_curve",
    "find_limit",
    "pool_distances",
    "rank_at",
    "ranks_at",
    "signal_rank",
    "spectral_error",
    "split_epsilon",
    "stable_rank",
    "truncation_error",
    "verdict",
    "weighted_edge",
]
