"""The ΔW of a delta as a NumPy matrix, for comparing."""

import pickle

import numpy as np

from lora_diag.deltas import DenseDelta, FactoredDelta, StoredDelta


def dense(delta) -> np.ndarray:
    """Return ΔW in float64; the delta makes the trip to another process first."""
    delta = pickle.loads(pickle.dumps(delta))
    if isinstance(delta, StoredDelta):
        rows = [(after.double() - before.double()).numpy() for before, after in delta.blocks()]
        return np.concatenate(rows)
    if isinstance(delta, FactoredDelta):
        b, a = delta.load()
        assert (b.shape[0], a.shape[1]) == delta.shape
        return b.double().numpy() @ a.double().numpy()
    assert isinstance(delta, DenseDelta)
    matrix = delta.load()
    assert tuple(matrix.shape) == delta.shape
    return matrix.double().numpy()
