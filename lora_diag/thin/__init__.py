"""Thin factors → singular values and sketches, without torch.

What ``linalg`` does with torch, for the one input that needs neither torch nor a GPU: B ``(m, r)`` and A ``(r, n)`` of
a small rank. Importing torch takes ten times as long as measuring an adapter.
"""

from lora_diag.thin.sketch import BOTH, COLUMNS, LENGTH, ROWS, fold, join, mixed, row_major, sketch, transform
from lora_diag.thin.values import (
    MAX_GRAM_ERROR,
    MAX_RANK,
    Grams,
    ThinValues,
    compute_grams,
    thin_energies,
    thin_values,
    triangle,
)

__all__ = [
    "BOTH",
    "COLUMNS",
    "LENGTH",
    "MAX_GRAM_ERROR",
    "MAX_RANK",
    "ROWS",
    "Grams",
    "ThinValues",
    "compute_grams",
    "fold",
    "join",
    "mixed",
    "row_major",
    "sketch",
    "thin_energies",
    "thin_values",
    "transform",
    "triangle",
]
