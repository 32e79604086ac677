"""Every method compared with its paper's formula in float64 NumPy, and the laws that methods claim
to keep.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_diag.decisions.merge import METHODS
from lora_diag.decisions.merge import methods as mergers
from lora_diag.decisions.merge.measure import (
    MergeSettings,
    MergeTask,
    _draw_update,
    choose_merger,
    estimate_bytes,
    merge_layer,
)
from lora_diag.decisions.merge.methods import Request
from lora_diag.deltas import FactoredDelta
from lora_diag.errors import MemoryLimitError
from lora_diag.running.updates import Update


def trim(matrix, density):
    keep = int(density * matrix.size)
    limit = np.sort(np.abs(matrix).ravel())[::-1][keep - 1] if keep else np.inf
    return np.where(np.abs(matrix) >= limit, matrix, 0.0)


def ties(updates, weights, density):
    """Yadav et al. 2023: trim, elect the sign of the larger total, average the entries
    that agree.
    """
    return elect([trim(update, density) for update in updates], weights)


def elect(trimmed, weights):
    merged = np.zeros_like(trimmed[0])
    for index in np.ndindex(merged.shape):
        values = [(update[index], weight) for update, weight in zip(trimmed, weights, strict=True)]
        positive = sum(value for value, _ in values) >= 0
        agreeing = [value * weight for value, weight in values if value and (value > 0) == positive]
        merged[index] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return merged


def tsv(updates, weights, density):
    """Gargiulo et al. 2025, ``compute_and_sum_svd_mem_reduction``; for updates of rank ≥ min(m,
    n)/K.
    """
    size = min(updates[0].shape)
    keep = size // len(updates)
    u, s, v = [], [], []
    for update, weight in zip(updates, weights, strict=True):
        left, values, right = np.linalg.svd(update, full_matrices=False)
        u.append(left[:, :keep])
        s.append(weight * values[:keep])
        v.append(right[:keep])
    (p, _, q), (a, _, b) = (
        np.linalg.svd(stacked, full_matrices=False)
        for stacked in (np.concatenate(u, 1), np.concatenate(v))
    )
    return p @ q @ np.diag(np.concatenate(s)) @ a @ b


def iso_c(updates, weights, density):
    """Marczak et al. 2025, ``iso_c``."""
    u, s, vh = np.linalg.svd(
        sum(w * x for w, x in zip(weights, updates, strict=True)), full_matrices=False
    )
    nonzero = s > 1e-9 * s[0]
    return s[nonzero].mean() * u[:, nonzero] @ vh[nonzero]


def knots_ties(updates, weights, density):
    """Stoica et al. 2025, ``SVDMerger``: TIES of ΣV_kᵀ."""
    u, s, vh = np.linalg.svd(np.concatenate(updates, 1), full_matrices=False)
    nonzero = s > 1e-9 * s[0]
    parts = np.split(s[nonzero, None] * vh[nonzero], len(updates), axis=1)
    return u[:, nonzero] @ ties(parts, weights, density)


ORACLES = {
    "mean": lambda updates, weights, density: sum(
        w * x for w, x in zip(weights, updates, strict=True)
    ),
    "sum": lambda updates, weights, density: sum(
        w * x for w, x in zip(weights, updates, strict=True)
    ),
    "ties": ties,
    "tsv": tsv,
    "iso_c": iso_c,
    "knots_ties": knots_ties,
}


def dense(matrix):
    return (matrix[0] @ matrix[1] if isinstance(matrix, tuple) else matrix).numpy()


def merge(name, parts, weights=None, density=1.0, seed="0"):
    names = [f"u{n}" for n in range(len(parts))]
    request = Request(weights or [1.0] * len(parts), density, seed, names, len(parts))
    return dense(choose_merger(METHODS[name], True)(parts, request))


def draw_factors(seed, count, m, n, rank):
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal((m, rank)), rng.standard_normal((rank, n))) for _ in range(count)]


def to_torch(pairs):
    return [tuple(map(torch.tensor, pair)) for pair in pairs]


def close(found, expected):
    return np.linalg.norm(found - expected) <= 1e-9 * max(np.linalg.norm(expected), 1e-300)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(2, 4),
    density=st.sampled_from([0.2, 0.7, 1.0]),
    scale=st.floats(0.1, 3),
)
@pytest.mark.parametrize("name", ORACLES)
def test_method_equals_formula_of_paper(name, seed, count, density, scale):
    """With dense updates, and with factors of at least the rank that TSV-Merge keeps."""
    rank = 12 // count
    pairs = draw_factors(seed, count, 12, 15, rank)
    weights = [1.0, scale, 1.0, 1.0][:count]
    products = [b @ a for b, a in pairs]
    expected = ORACLES[name](products, weights, density)
    assert close(merge(name, to_torch(pairs), weights, density), expected)
    full = [x + np.random.default_rng(seed + 1).standard_normal(x.shape) for x in products]
    expected = ORACLES[name](full, weights, density)
    assert close(merge(name, [torch.tensor(x) for x in full], weights, density), expected)


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_core_ties_equals_formula_of_paper(density):
    """Panariello et al. 2025, ``get_core_matrices``, of adapters of different ranks."""
    pairs = draw_factors(0, 2, 20, 16, 3) + draw_factors(1, 1, 20, 16, 2)
    u = np.linalg.svd(np.concatenate([b for b, _ in pairs], 1), full_matrices=False)[0]
    vh = np.linalg.svd(np.concatenate([a for _, a in pairs]), full_matrices=False)[2]
    expected = u @ ties([u.T @ b @ a @ vh.T for b, a in pairs], [1, 2, 1], density) @ vh
    assert close(merge("core_ties", to_torch(pairs), [1.0, 2.0, 1.0], density), expected)


@pytest.mark.parametrize("name", ["dare", "dare_ties"])
def test_dare_keeps_and_rescales_entries(name):
    """Each entry is 0 or ΔW/d; as many as d allows; the seed and the update decide which."""
    rng = np.random.default_rng(0)
    parts = [torch.tensor(rng.standard_normal((60, 50))) for _ in range(2)]
    alone = [merge("dare", [part], density=0.3, seed="a") for part in parts]
    for found, part in zip(alone, parts, strict=True):
        kept = found != 0
        assert np.allclose(found[kept], part.numpy()[kept] / 0.3)
        assert abs(kept.sum() - 900) < 4 * math.sqrt(3000 * 0.3 * 0.7)
    assert not np.array_equal(merge("dare", parts[:1], density=0.3, seed="b"), alone[0])
    request = Request([1.0, 0.5], 0.3, "a", ["u0", "u1"], 2)
    dropped = [x.numpy() for x in mergers._drop(parts, request)]
    assert not np.array_equal(dropped[0] != 0, dropped[1] != 0)
    expected = dropped[0] + dropped[1] / 2 if name == "dare" else elect(dropped, [1.0, 0.5])
    assert close(merge(name, parts, [1.0, 0.5], 0.3, "a"), expected)


def orthogonal_updates():
    """Two updates with orthogonal row and column spaces, and disjoint entries."""
    rng = np.random.default_rng(3)
    first, second = np.zeros((2, 24, 24))
    first[:12, :12] = rng.standard_normal((12, 4)) @ rng.standard_normal((4, 12))
    second[12:, 12:] = rng.standard_normal((12, 4)) @ rng.standard_normal((4, 12))
    return first, second


@pytest.mark.parametrize("name", ["sum", "ties", "tsv"])
def test_orthogonal_updates_are_kept_whole(name):
    first, second = orthogonal_updates()
    parts = [torch.tensor(first), torch.tensor(second)]
    assert close(merge(name, parts), first + second)


@pytest.mark.parametrize(
    "name", [name for name, method in METHODS.items() if not name.startswith("dare")]
)
def test_merge_of_equal_updates(name):
    """All but the sum return the update, Iso-C K times its isotropic form; copies add
    no direction.
    """
    pair = draw_factors(0, 1, 14, 18, 3)[0]
    weights = [0.5, 0.5] if METHODS[name].averages else [1.0, 1.0]
    found = merge(name, to_torch([pair, pair]), weights)
    product = pair[0] @ pair[1]
    expected = {"sum": 2 * product, "iso_c": iso_c([product], [2.0], 1)}.get(name, product)
    assert np.allclose(found, expected, atol=1e-7 * np.linalg.norm(expected))
    assert np.linalg.matrix_rank(found, tol=1e-6) == 3
    if not METHODS[name].needs_factors:
        whole = [torch.tensor(product)] * 2
        assert np.allclose(
            merge(name, whole, weights), expected, atol=1e-7 * np.linalg.norm(expected)
        )


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    name=st.sampled_from([n for n, m in METHODS.items() if not n.startswith("dare")]),
)
def test_merge_does_not_depend_on_order_or_units(seed, name):
    """A permutation of the inputs changes nothing, and c·ΔW_k for all k gives c·M."""
    parts = to_torch(draw_factors(seed, 3, 12, 10, 2))
    found = merge(name, parts, density=0.5)
    assert close(merge(name, parts[::-1], density=0.5), found)
    assert close(merge(name, [(b * 4, a) for b, a in parts], density=0.5), 4 * found)


@pytest.mark.parametrize("name", ["sum", "tsv", "iso_c", "knots_ties", "core_ties"])
def test_factors_are_merged_without_their_product(name):
    """A 300,000 × 200,000 update could not be formed: 240 GB in float32."""
    generator = torch.Generator().manual_seed(0)
    parts = [
        (torch.randn(300_000, 1, generator=generator), torch.randn(1, 200_000, generator=generator))
        for _ in range(2)
    ]
    request = Request([1.0, 1.0], 1.0, "0", ["a", "b"], 2)
    b, _ = choose_merger(METHODS[name], True)(parts, request)
    assert b.shape[1] == 2


def test_random_update_has_singular_values_of_another():
    """And random directions: the next draw differs."""
    (pair,) = to_torch(draw_factors(0, 1, 14, 18, 3))
    generator = mergers.make_generator("seed")
    first, second = (dense(_draw_update(pair, generator)) for _ in range(2))
    expected = np.linalg.svd(dense(pair), compute_uv=False)
    assert np.allclose(np.linalg.svd(first, compute_uv=False), expected)
    assert abs((first * second).sum()) < 0.5 * (expected**2).sum()


def test_memory_limit_leaves_large_layer_out(tmp_path):
    """TIES forms ΔW: a layer above the limit is named, and nothing is written for it."""
    delta = FactoredDelta(
        "w",
        (3000, 2000),
        lambda: tuple(map(torch.tensor, draw_factors(0, 1, 3000, 2000, 1)[0])),
        (None, "float64"),
    )
    task = MergeTask("w", delta.shape, (Update("a", 1.0, delta), Update("b", 1.0, delta)))
    ties_settings = MergeSettings(method="ties", count=2, rank=2, memory=2**26)
    assert (
        estimate_bytes(task, ties_settings)
        > 2**26
        > estimate_bytes(task, replace(ties_settings, method="mean"))
    )
    with pytest.raises(MemoryLimitError, match="3000x2000"):
        merge_layer(task, {"w": tmp_path / "w"}, ties_settings)
    assert not (tmp_path / "w").exists()
