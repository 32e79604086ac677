"""Intruder dimensions against float64 NumPy, PEFT's own count, planted directions, and chance."""

import math
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_diag
from lora_diag.errors import UsageError
from tests import oracles
from tests.conftest import ROOT, save_model

SAMPLES = ROOT / "sample_checkpoints"
NAME = "model.layers.0.mlp.up_proj.weight"


def oracle(before, after, k, epsilon, window):
    """The definitions, vector by vector."""
    u0, s0, _ = np.linalg.svd(before, full_matrices=False)
    u1, s1, _ = np.linalg.svd(after, full_matrices=False)
    result = []
    for j in range(min(k, len(s1))):
        cosines = np.abs(u0.T @ u1[:, j])
        near = [i for i in range(len(s0)) if abs(s0[i] - s1[j]) <= window * s1[j]]
        p2, c = float((cosines[near] ** 2).sum()), len(near) / len(u0)
        if cosines.max() >= epsilon:
            kind = "kept"
        else:
            kind = "rotated" if c < 1 and (p2 - c) / (1 - c) >= epsilon**2 else "intruder"
        result.append((s1[j], cosines.max(), len(near), math.sqrt(p2), math.sqrt(c), kind))
    return result


def check(record, before, after, k=10, epsilon=0.5, window=0.1):
    truth = oracle(before, after, k, epsilon, window)
    assert record.k == len(truth) == len(record.directions)
    for direction, (sigma, similarity, near, projection, by_chance, kind) in zip(
        record.directions, truth, strict=True
    ):
        assert direction.sigma == pytest.approx(sigma, rel=1e-5)
        assert direction.similarity == pytest.approx(similarity, abs=1e-4)
        assert direction.window == near
        assert direction.projection == pytest.approx(projection, abs=1e-4)
        assert direction.projection_random == pytest.approx(by_chance)
        assert direction.kind == kind
    kinds = [kind for *_, kind in truth]
    assert record.intruders == kinds.count("intruder")
    assert record.rotated == kinds.count("rotated")
    assert record.count == record.intruders + record.rotated
    assert record.share == record.intruders / len(truth)
    assert record.similarity_lowest == pytest.approx(min(t[1] for t in truth), abs=1e-4)


def measured(tmp_path, before, after, **options):
    paths = [
        save_model(tmp_path / name, {NAME: torch.tensor(value)})
        for name, value in (("b", before), ("t", after))
    ]
    return lora_diag.intruders(*paths, **options).layers[0]


def test_parameter_count_equals_peft(tmp_path):
    peft = pytest.importorskip("peft")
    intruders = pytest.importorskip("peft.tuners.lora.intruders")
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=3, lora_alpha=12, target_modules=["up_proj"], init_lora_weights=False
    )
    tiny = torch.nn.Sequential(OrderedDict(up_proj=torch.nn.Linear(40, 48, bias=False)))
    before = tiny.up_proj.weight.detach().clone()
    model = peft.get_peft_model(tiny, config)
    model.save_pretrained(tmp_path / "adapter")
    message = []
    intruders.reduce_intruder_dimension(
        model, top_k=10, threshold_epsilon=0.5, logging_sink=message.append
    )
    (line,) = [text for text in message if "ntruders" in text]
    base = save_model(tmp_path / "base", {"up_proj.weight": before})
    (record,) = lora_diag.intruders(base, tmp_path / "adapter")
    assert record.count > 0
    assert line.endswith(f"Intruders: {record.count}")


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    m=st.integers(1, 20),
    n=st.integers(1, 20),
    size=st.floats(0.01, 3.0),
    k=st.integers(1, 12),
    epsilon=st.sampled_from([0.3, 0.5, 0.8]),
    window=st.sampled_from([0.0, 0.1, 0.5]),
)
def test_any_matrix_against_numpy(tmp_path_factory, seed, m, n, size, k, epsilon, window):
    rng = np.random.default_rng(seed)
    before, after = rng.standard_normal((m, n)), rng.standard_normal((m, n))
    after = before + size * after
    record = measured(
        tmp_path_factory.mktemp("x"),
        before,
        after,
        directions=k,
        epsilon=epsilon,
        window=window,
        svd="exact",
    )
    check(record, before, after, k, epsilon, window)


def test_planted_direction_is_intruder_and_others_are_kept(tmp_path):
    rng = np.random.default_rng(2)
    s = np.linspace(10.0, 1.0, 60)
    before = oracles.with_spectrum(s, 200, 60, 2)
    q = np.linalg.svd(before, full_matrices=False)[0]
    new = rng.standard_normal(200)
    new -= q @ (q.T @ new)
    new /= np.linalg.norm(new)
    right = np.linalg.qr(rng.standard_normal((60, 1)))[0][:, 0]
    record = measured(tmp_path, before, before + 30 * np.outer(new, right))
    assert record.intruders == record.count == 1
    assert record.directions[0].kind == "intruder"
    assert record.directions[0].similarity < 0.1


def test_directions_of_equal_value_may_rotate(tmp_path):
    """Six equal singular values: a small update turns their vectors, the span stays."""
    rng = np.random.default_rng(3)
    s = np.concatenate([np.full(6, 5.0), np.linspace(1.0, 0.1, 34)])
    before = oracles.with_spectrum(s, 80, 40, 3)
    u, s0, vh = np.linalg.svd(before, full_matrices=False)
    # a rotation of the six, all of whose entries are about 1/√6, and values just far enough apart
    # to fix the vectors
    turn = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    after = (u[:, :6] @ turn * np.linspace(5.1, 5.0, 6)) @ (turn.T @ vh[:6]) + (
        u[:, 6:] * s0[6:]
    ) @ vh[6:]
    record = measured(tmp_path, before, after, directions=6, epsilon=0.95)
    assert record.count >= 4  # no single match
    assert record.intruders == 0
    assert all(direction.projection > 0.999 for direction in record.directions)
    narrow = measured(tmp_path, before, after, directions=6, epsilon=0.95, window=0.0)
    assert narrow.intruders == narrow.count == record.count


def test_unchanged_layer_has_no_intruders_and_needs_no_svd(tmp_path):
    before = np.random.default_rng(4).standard_normal((12, 9))
    record = measured(tmp_path, before, before)
    assert (record.count, record.directions, record.similarity_lowest) == (0, (), None)
    assert record.base_fro == pytest.approx(np.linalg.norm(before))


def test_non_finite_weight_is_left_out(tmp_path):
    before = np.random.default_rng(6).standard_normal((12, 9))
    after = before.copy()
    after[3, 4] = np.nan
    paths = [
        save_model(tmp_path / name, {NAME: torch.tensor(value)})
        for name, value in (("b", before), ("t", after))
    ]
    result = lora_diag.intruders(*paths)
    assert not result.layers
    assert [item.reason for item in result.left_out] == ["non_finite"]


def test_invalid_options_are_rejected():
    for options in ({"epsilon": 1.0}, {"epsilon": 0.0}, {"window": 1.0}, {"directions": 0}):
        with pytest.raises(UsageError):
            lora_diag.intruders(SAMPLES / "base", SAMPLES / "full_ft", **options)
