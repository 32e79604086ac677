"""Where updates lie in W, against float64 NumPy and planted movements; the baselines against what
they must explain.
"""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_diag
from lora_diag.diagnostics.geometry.nulls import add_stored, permute, undo_rounding
from tests import oracles
from tests.conftest import ROOT, save_model

SAMPLES = ROOT / "sample_checkpoints"
NAME = "model.layers.0.mlp.up_proj.weight"


def angles(u, v):
    """Principal angles in degrees from the definition: cosines are singular values of UᵀV."""
    return np.degrees(np.arccos(np.clip(np.linalg.svd(u.T @ v, compute_uv=False), 0, 1)))


def oracle(w, t, k, eta=1e-3):
    """Every statistic from its definition, in float64."""
    d = t - w
    (u, s, vh), (u1, s1, vh1) = (
        np.linalg.svd(w, full_matrices=False),
        np.linalg.svd(t, full_matrices=False),
    )
    changed = np.abs(d) > eta * np.maximum(np.abs(w), np.abs(t))
    order = np.argsort(np.abs(w).ravel(), kind="stable")
    core = u[:, :k].T @ d @ vh[:k].T
    rest = d - u[:, :k] @ core @ vh[:k]
    total = (d**2).sum()
    found = {
        "unchanged": 1 - changed.mean(),
        "row_spread": changed.mean(1).std(),
        "column_spread": changed.mean(0).std(),
        "shift": np.linalg.norm(s1 - s) / np.linalg.norm(s),
        "scaling": (np.diag(core) ** 2).sum() / total,
        "mixing": ((core - np.diag(np.diag(core))) ** 2).sum() / total,
        "outside": (rest**2).sum() / total,
        "energy_left": ((u[:, :k].T @ d) ** 2).sum() / total,
        "energy_right": ((d @ vh[:k].T) ** 2).sum() / total,
        "spectral_ratio": np.linalg.norm(d, 2) / s[0],
        "stable_rank": total / np.linalg.norm(d, 2) ** 2,
    }
    large = np.argsort(-np.abs((u[:, :k] * s[:k]) @ vh[:k]).ravel())
    for alpha in (0.3, 0.1):
        size = int(alpha * d.size)
        low, principal = set(order[: math.ceil(alpha * d.size)]), set(large[: max(1, size)])
        places = np.flatnonzero(changed)
        for name, mask in (("low", low), ("principal", principal)):
            found[f"{name}_{round(100 * alpha)}"] = (
                sum(p in mask for p in places) / len(places) if len(places) else None
            )
    return found, angles(u[:, :k], u1[:, :k]), angles(vh[:k].T, vh1[:k].T)


def measured(tmp_path, w, t, **options):
    paths = [
        save_model(tmp_path / name, {NAME: torch.as_tensor(value)})
        for name, value in (("b", w), ("t", t))
    ]
    return lora_diag.geometry(*paths, **options).layers[0]


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    m=st.integers(4, 24),
    n=st.integers(4, 24),
    size=st.floats(1e-3, 1.0),
)
def test_every_statistic_against_numpy(tmp_path_factory, seed, m, n, size):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((m, n))
    t = w + size * rng.standard_normal((m, n)) * (rng.random((m, n)) < 0.5)
    record = measured(tmp_path_factory.mktemp("x"), w, t, top=3, draws=1)
    k = min(3, min(m, n) // 2)
    assert record.k == k
    if record.moved is None:
        assert np.array_equal(w, t)
        return
    truth, left, right = oracle(w, t, k)
    for name, value in truth.items():
        assert getattr(record.moved, name) == pytest.approx(value, rel=1e-7, abs=1e-9), name
    assert record.moved.left_angles == pytest.approx(left, abs=2e-6)
    assert record.moved.right_angles == pytest.approx(right, abs=2e-6)
    assert record.moved.scaling + record.moved.mixing + record.moved.outside == pytest.approx(
        1, abs=1e-14
    )
    assert record.rank == np.linalg.matrix_rank(t - w, tol=1e-7 * np.linalg.norm(t - w, 2))


def test_rotation_within_the_span_is_found_as_an_angle(tmp_path):
    """The last leading and the first other left direction turn by 25°; nothing else changes."""
    s = np.linspace(9.0, 2.0, 24)
    w = oracles.with_spectrum(s, 60, 24, 5)
    u, s, vh = np.linalg.svd(w, full_matrices=False)
    c, d = math.cos(math.radians(25)), math.sin(math.radians(25))
    turned = u.copy()
    turned[:, 7], turned[:, 8] = c * u[:, 7] + d * u[:, 8], c * u[:, 8] - d * u[:, 7]
    record = measured(tmp_path, w, (turned * s) @ vh, top=8)
    moved = record.moved
    assert moved.left_angles == pytest.approx([0] * 7 + [25.0], abs=1e-5)
    assert max(moved.right_angles) < 1e-5
    assert moved.shift < 1e-9
    assert record.angle_error < 1e-6


def test_scaling_of_directions_neither_mixes_nor_turns(tmp_path):
    s = np.linspace(9.0, 2.0, 24)
    w = oracles.with_spectrum(s, 60, 24, 6)
    u, s, vh = np.linalg.svd(w, full_matrices=False)
    moved = measured(tmp_path, w, w + 0.1 * (u[:, :8] * s[:8]) @ vh[:8], top=8).moved
    assert moved.scaling == pytest.approx(1, abs=1e-9)
    assert max(moved.left_angles + moved.right_angles) < 1e-5
    assert moved.shift == pytest.approx(0.1 * np.linalg.norm(s[:8]) / np.linalg.norm(s))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [2e-3, 1e-2])
def test_rounding_null_explains_an_independent_update(tmp_path, size, dtype):
    """Rounding alone puts the changes in small weights; the null has as many there, a plain
    permutation has not.
    """
    source = torch.Generator().manual_seed(3)
    w = torch.randn(300, 400, generator=source).to(dtype)
    t = (w.float() + size * torch.randn(300, 400, generator=source)).bfloat16()
    record = measured(tmp_path, w, t, top=16)
    moved, null = record.moved, record.rounding
    assert record.stored == "bfloat16"
    assert moved.low_30 > 0.33 if dtype == torch.bfloat16 or size < 5e-3 else True
    assert null.low_30 == pytest.approx(moved.low_30, abs=0.01)
    assert null.unchanged == pytest.approx(moved.unchanged, abs=0.01)
    assert null.principal_30 == pytest.approx(moved.principal_30, abs=0.01)
    assert null.shift == pytest.approx(moved.shift, rel=0.15)
    if dtype == torch.bfloat16:
        assert moved.unchanged == pytest.approx(
            float((w == t).double().mean()), abs=1e-15
        )  # η = 1e-3 is bit identity
        if size == 2e-3:
            again = permute(t.double() - w.double(), source)
            plain = add_stored(w.double(), again, torch.bfloat16) != w.double()
            small = w.abs() <= w.abs().float().quantile(0.3)
            assert float(plain[small].double().sum() / plain.sum()) < moved.low_30 - 0.05


def test_undone_rounding_stays_within_what_the_file_determines():
    source = torch.Generator().manual_seed(4)
    w = torch.randn(200, 300, generator=source).bfloat16().double()
    x = 3e-3 * torch.randn(200, 300, generator=source, dtype=torch.float64)
    t = add_stored(w, x, torch.bfloat16)
    again = undo_rounding(w, t - w, torch.bfloat16, source)
    spacing = 2.0 ** (np.floor(np.log2(np.abs(t.numpy()))) - 7)
    assert (np.abs((again - (t - w)).numpy()) <= spacing / 2 * (1 + 1e-12)).all()
    for share in (0.25, 0.5, 0.9):
        quantiles = [float(each.abs().quantile(share)) for each in (x, again)]
        assert quantiles[1] == pytest.approx(quantiles[0], rel=0.1)


def test_rank_beside_that_of_the_same_support(tmp_path):
    """A sparse random update has the rank of its support; an update of low rank has less."""
    rng = np.random.default_rng(7)
    w, support = rng.standard_normal((60, 80)), rng.random((60, 80)) < 0.1
    sparse = measured(tmp_path / "s", w, w + 0.1 * support * rng.standard_normal((60, 80)))
    assert abs(sparse.rank_90 - sparse.rank_90_random) <= 2
    low = measured(
        tmp_path / "l", w, w + 0.1 * np.outer(rng.standard_normal(60), rng.standard_normal(80))
    )
    assert (low.rank, low.rank_90) == (1, 1)
    assert low.rank_90_random > 10


def test_chance_of_a_random_update_is_the_update_itself(tmp_path):
    rng = np.random.default_rng(8)
    w = rng.standard_normal((120, 90))
    record = measured(tmp_path, w, w + 0.05 * rng.standard_normal((120, 90)), top=10, draws=4)
    for name, tolerance in (
        ("angle", 0.1),
        ("shift", 0.2),
        ("stable_rank", 0.1),
        ("energy_left", 0.2),
    ):
        assert getattr(record.moved, name) == pytest.approx(
            getattr(record.chance, name), rel=tolerance
        ), name
    assert record.chance.mixing == pytest.approx(90 / (120 * 90), rel=0.5)
    assert record.chance.draws == record.rounding.draws == 4
    assert 0 < record.chance.errors["shift"] < 0.1 * record.chance.shift


def test_adapter_is_measured_unrounded(tmp_path):
    pattern = r"layers\.1\.self_attn\.v_proj"
    (record,) = lora_diag.geometry(SAMPLES / "base", SAMPLES / "lora_r4", layers=pattern, top=4)
    (spectrum,) = lora_diag.spectrum(SAMPLES / "base", SAMPLES / "lora_r4", layers=pattern)
    assert record.fro == pytest.approx(spectrum.fro, rel=1e-6)
    assert (record.rank, record.rank_random, record.stored, record.rounding) == (
        4,
        None,
        None,
        None,
    )
    assert record.moved.stable_rank == pytest.approx((record.fro / spectrum.s[0]) ** 2, rel=1e-6)
    assert record.chance.unchanged > 0


def test_unchanged_layer_has_no_movement(tmp_path):
    w = np.random.default_rng(9).standard_normal((12, 9))
    record = measured(tmp_path, w, w)
    assert (record.fro, record.moved, record.chance, record.rounding, record.null) == (
        0,
        None,
        None,
        None,
        None,
    )


def test_non_finite_weight_is_left_out(tmp_path):
    w = np.random.default_rng(6).standard_normal((12, 9))
    t = w.copy()
    t[3, 4] = np.nan
    paths = [
        save_model(tmp_path / name, {NAME: torch.tensor(value)})
        for name, value in (("b", w), ("t", t))
    ]
    result = lora_diag.geometry(*paths)
    assert [item.reason for item in result.left_out] == ["non_finite"]


@pytest.mark.slow
def test_command_gives_same_records_on_any_number_of_workers(loradiag, tmp_path):
    words = (
        "geometry",
        SAMPLES / "base",
        SAMPLES / "full_ft",
        "--layers",
        r"0\.self_attn\.[qv]_proj",
    )
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    for file, workers in zip(files, "12", strict=True):
        assert loradiag(*words, "-o", file, "--workers", workers).code == 0
    rows = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    assert [row for row in rows[0] if row["record"] == "geometry"] == [
        r for r in rows[1] if r["record"] == "geometry"
    ]
    assert loradiag("geometry", *words[1:3], "--top", "0").code == 2


@pytest.mark.parametrize("tuned", ["full_ft", "lora_r4"])
def test_intruders_are_those_of_the_command(tuned):
    sides, only = (
        (SAMPLES / "base", SAMPLES / tuned),
        {"layers": r"layers\.0\.(mlp\.up|self_attn\.k)"},
    )
    for record, alone in zip(
        lora_diag.geometry(*sides, draws=1, **only),
        lora_diag.intruders(*sides, **only),
        strict=True,
    ):
        part = record.intruders
        assert (part.layer, part.count, part.intruders) == (
            alone.layer,
            alone.count,
            alone.intruders,
        )
        for first, second in zip(part.directions, alone.directions, strict=True):
            assert (first.kind, first.nearest, first.window) == (
                second.kind,
                second.nearest,
                second.window,
            )
            assert first.similarity == pytest.approx(second.similarity, abs=1e-6)
            assert first.projection == pytest.approx(second.projection, abs=1e-6)
