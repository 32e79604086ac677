"""Thin factors → singular values, with NumPy alone.

What ``linalg`` does with torch, for the one input that needs neither torch nor a GPU: B ``(m, r)`` and A ``(r, n)`` of
a small rank. Importing torch takes ten times as long as measuring an adapter.
"""

from lora_diag.thin.sketch import BOTH, COLUMNS, LENGTH, ROWS, fold, join, mixed, sketch, transform
from lora_diag.thin.values import MAX_RANK, ThinValues, Triangles, gram, thin_values, triangle, triangles

__all__ = [
    "BOTH",
    "COLUMNS",
    "LENGTH",
    "MAX_RANK",
    "ROWS",
    "ThinValues",
    "Triangles",
    "fold",
    "gram",
    "join",
    "mixed",
    "sketch",
    "thin_values",
    "transform",
    "triangle",
    "triangles",
]
