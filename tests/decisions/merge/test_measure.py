"""What one layer of a merge writes: its truncation compared with float64 NumPy, and that no order
changes it.
"""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_diag.decisions.merge import METHODS
from lora_diag.decisions.merge.measure import MergeSettings, MergeTask, merge_layer
from lora_diag.deltas import DenseDelta, FactoredDelta
from lora_diag.running.updates import Update
from lora_diag.storage import open_checkpoint


def make_update(name, values, weight=1.0):
    """An update given by factors (a pair) or by its matrix."""
    dtypes = (None, "float64")
    if isinstance(values, tuple):
        load = partial(lambda pair: tuple(map(torch.tensor, pair)), values)
        delta = FactoredDelta("w", (len(values[0]), values[1].shape[1]), load, dtypes)
    else:
        delta = DenseDelta("w", values.shape, partial(torch.tensor, values), dtypes)
    return Update(name, weight, delta)


def merge_updates(updates, folder, method, **options):
    """The ΔW that is written for one layer, and its records."""
    folder.mkdir(exist_ok=True)
    file = folder / "w.safetensors"
    file.unlink(missing_ok=True)
    task = MergeTask("w", updates[0].delta.shape, tuple(updates))
    chosen = {"count": len(updates), "dtype": "float64", **options}
    records = merge_layer(task, {"w": file}, MergeSettings(method=method, **chosen))
    stored = open_checkpoint(file)
    b, a = (stored.read(name).view(stored[name].shape).double().numpy() for name in ("B", "A"))
    return b @ a, records


def draw(seed, count, rank=3, m=24, n=18):
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal((m, rank)), rng.standard_normal((rank, n))) for _ in range(count)]


def distance(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def cut_iso_c(updates, weights, rank):
    """The leading ``rank`` directions of the sum, each with the mean of its nonzero singular
    values.
    """
    total = sum(weight * update for weight, update in zip(weights, updates, strict=True))
    u, s, vh = np.linalg.svd(total, full_matrices=False)
    return s[s > 1e-10 * s[0]].mean() * u[:, :rank] @ vh[:rank]


@pytest.mark.parametrize(
    ("rank_of_each", "options", "rank"),
    [
        (3, {"rank": 4}, 4),
        (3, {"rank": 4, "scale": -1.5}, 4),
        (3, {"energy": 0.5}, 5),
        (None, {"rank": 4}, 4),
        (None, {"energy": 0.25}, 5),
    ],
)
def test_iso_c_keeps_leading_directions_of_sum(rank_of_each, options, rank, tmp_path):
    """All its singular values are equal, so that an SVD of it leaves the choice to rounding; None:
    no factors.
    """
    pairs = draw(0, 3, rank_of_each or 18)
    products = [b @ a for b, a in pairs]
    weights = [1.0, 0.5, 2.0]
    values = pairs if rank_of_each else products
    updates = [make_update(f"u{n}", value, weights[n]) for n, value in enumerate(values)]
    expected = options.get("scale", 1.0) * cut_iso_c(products, weights, rank)
    for ordered in (updates, updates[::-1]):
        found, records = merge_updates(ordered, tmp_path / "a", "iso_c", **options)
        assert distance(found, expected) < 1e-9
        assert {record.rank for record in records} == {rank}


def test_tsv_cuts_equal_values_by_the_sum(tmp_path):
    """An isotropic update keeps the directions that the sum has most of, whatever the order and the
    bases.
    """
    rng = np.random.default_rng(1)
    left, right = (np.linalg.qr(rng.standard_normal((12, 12)))[0] for _ in range(2))
    isotropic = make_update("a", (left, right.T))
    values, span = np.arange(7.0, 1.0, -1), slice(4, 10)
    inside = make_update("b", (left[:, span] * values, right[:, span].T))
    found = [
        merge_updates(order, tmp_path / "a", "tsv")[0]
        for order in ((isotropic, inside), (inside, isotropic))
    ]
    assert distance(found[1], found[0]) < 1e-9
    expected = (left[:, span] * (1 + values) / 2) @ right[:, span].T
    assert distance(found[0], expected) < 1e-6


def test_tsv_counts_updates_that_lack_the_layer(tmp_path):
    """K of ⌊min(m, n)/K⌋ is the number of updates of the merge, as in the authors' code."""
    b, a = draw(0, 1, rank=18)[0]
    absent = make_update("b", (np.zeros((24, 1)), np.zeros((1, 18))))
    found, records = merge_updates(
        [make_update("a", (b, a)), absent], tmp_path / "a", "tsv", count=3
    )
    assert records[0].rank == 18 // 3
    u, s, vh = np.linalg.svd(b @ a, full_matrices=False)
    assert distance(found, (u[:, :6] * s[:6]) @ vh[:6]) < 1e-9


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    method=st.sampled_from(sorted(METHODS)),
    dense=st.booleans(),
    limit=st.sampled_from([{"rank": 2}, {"rank": 5}, {"energy": 0.6}, {"energy": 0.95}]),
    order=st.permutations(range(3)),
)
def test_order_of_updates_changes_no_merge(seed, method, dense, limit, order, tmp_path_factory):
    pairs = draw(seed, 3)
    dense = dense and not METHODS[method].needs_factors
    values = [b @ a for b, a in pairs] if dense else pairs
    density = 0.4 if METHODS[method].density is not None else 1.0
    updates = [make_update(f"u{index}", each, 0.5 + index) for index, each in enumerate(values)]
    folder = tmp_path_factory.mktemp("merge")
    found, records = merge_updates(updates, folder, method, density=density, **limit)
    again, reordered = merge_updates(
        [updates[index] for index in order], folder, method, density=density, **limit
    )
    assert distance(again, found) < 1e-9
    kept = {record.update: record.kept for record in records}
    assert kept == pytest.approx(
        {record.update: record.kept for record in reordered}, rel=1e-9, abs=1e-12
    )
