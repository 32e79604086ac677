"""Factors that are best in E‖(ΔW − BA)x‖²: no other of their rank is better, on the inputs
themselves.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lora_diag
from lora_diag.decisions.extract.measure import ExtractionSettings, Rank, extract
from lora_diag.deltas import Side
from lora_diag.errors import UsageError
from lora_diag.layers.metric import MomentLocation, Weighting
from lora_diag.storage import open_checkpoint
from tests import oracles
from tests.adapters.making import product
from tests.conftest import ROOT
from tests.decisions.extract.test_measure import RunRecords, layer_of, rounded_layer
from tests.messages import assert_names
from tests.probes.making import gpt2, moved, some_text, tensors

pytestmark = pytest.mark.slow

SAMPLES = ROOT / "sample_checkpoints"


def weighting(folder, x, on_rows):
    """Store E[xxᵀ] of inputs in the columns of x in float64, so that the file is exact."""
    c = torch.tensor(x @ x.T / x.shape[1])
    save_file({"q_proj.weight": c}, folder / "c.safetensors")
    return Weighting(
        MomentLocation(
            Side(open_checkpoint(folder / "c.safetensors"), "q_proj.weight"), len(c), on_rows
        )
    )


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 10), columns=st.integers(1, 10), rank=st.integers(1, 6), seen=st.integers(1, 20),
    on_rows=st.booleans(), transposed=st.booleans(), kfac=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
def test_output_error_is_minimal(
    tmp_path_factory, rows, columns, rank, seen, on_rows, transposed, kfac, seed
):
    """In E‖(ΔW − BA)x‖² on the inputs themselves, or with K-FAC between the roots of both second
    moments.
    """
    folder, rng = tmp_path_factory.mktemp("x"), np.random.default_rng(seed)
    layer, real = layer_of(rng.standard_normal((rows, columns)), folder, Rank(rank), transposed)
    n, other = (rows, columns) if on_rows else (columns, rows)
    x = (
        rng.standard_normal((n, seen)) * np.linspace(0.1, 3, n)[:, None]
    )  # with few inputs, C is singular
    weights, k, near = weighting(folder, x, on_rows), np.eye(other), 1e-5
    if kfac:
        g = rng.standard_normal((other, seen))
        save_file({"g": torch.tensor(g @ g.T / seen)}, folder / "g.safetensors")
        gradients = MomentLocation(
            Side(open_checkpoint(folder / "g.safetensors"), "g"), other, not on_rows
        )
        weights, k, near = (
            Weighting(weights.inputs, gradients),
            oracles.square_root(g @ g.T / seen),
            1e-3,
        )

    def loss(d):
        outputs = (d.T if on_rows else d) @ x
        return float(((k @ outputs) ** 2).sum() / seen)

    kept = RunRecords()
    record = extract(replace(layer, weighting=weights), ExtractionSettings(), kept)
    b, a = kept.b.double().numpy(), kept.a.double().numpy()
    product, c = (b @ a).T if transposed else b @ a, oracles.square_root(x @ x.T / seen)
    s = np.linalg.svd(c @ real @ k if on_rows else k @ real @ c, compute_uv=False)
    whole, result, floor = loss(real), loss(real - product), (s[rank:] ** 2).sum()
    assert record.data.metric == ("kfac" if kfac else "data")
    assert record.data.fro**2 == pytest.approx(whole, rel=near)
    assert record.data.epsilon**2 == pytest.approx(result / whole, rel=near, abs=0.1 * near)
    assert result == pytest.approx(floor, rel=near, abs=0.1 * near * whole)
    assert record.data.epsilon_min**2 == pytest.approx(floor / whole, rel=near, abs=0.1 * near)
    assert record.data.kept == pytest.approx(1 - floor / whole, abs=0.1 * near)
    assert record.epsilon == pytest.approx(
        np.linalg.norm(real - product) / np.linalg.norm(real), rel=1e-5, abs=1e-6
    )
    assert record.epsilon >= record.epsilon_min - 1e-6
    others = [oracles.best_approximation(real, rank)]
    for _ in range(3):
        others.append(rng.standard_normal((rows, rank)) @ rng.standard_normal((rank, columns)))
        nearby = product + 0.01 * rng.standard_normal(product.shape)
        others.append(oracles.best_approximation(nearby, rank))
    assert all(loss(real - other) >= result - 0.1 * near * whole for other in others)


def test_bound_includes_rounding_of_moments(tmp_path):
    layer, _ = layer_of(np.random.default_rng(0).standard_normal((8, 6)), tmp_path, Rank(2))
    save_file({"q_proj.weight": torch.eye(6).bfloat16()}, tmp_path / "c.safetensors")
    moments = MomentLocation(
        Side(open_checkpoint(tmp_path / "c.safetensors"), "q_proj.weight"), 6, False
    )
    record = extract(
        replace(layer, weighting=Weighting(moments)), ExtractionSettings(), RunRecords()
    )
    assert (
        2**-8 < record.data.energy_error < 0.1
    )  # bf16's roundoff times ‖C‖_F, above and below the line


def test_signal_compares_update_and_rounding_in_metric(tmp_path):
    """With C = α²·1 both sizes shrink by α, so that as many singular values stand above the edge as
    without C.
    """
    layer = replace(
        rounded_layer(tmp_path), weighting=weighting(tmp_path, np.eye(96) * 1e-3, on_rows=False)
    )
    assert extract(layer, ExtractionSettings(), RunRecords()).rank == 3


@pytest.mark.parametrize("rule", [{"energy": 0.7}, {"params": 300}, {"rank": 3}])
def test_factors_alone_are_compressed_in_metric_too(tmp_path, rule):
    base = gpt2(tmp_path / "base")
    tuned = moved(base, tmp_path / "tuned")
    big = tmp_path / "big"
    lora_diag.extract(base, tuned, big, rank=12, layers="c_fc")
    file = tmp_path / "a.safetensors"
    lora_diag.probe_activations(base, some_text(tmp_path), file)
    result = lora_diag.extract(base, big, tmp_path / "small", activations=file, **rule)
    for record in result:
        d = product(big, record.layer)  # (out, in) as PEFT has it
        c = load_file(file)[record.layer].double().numpy()
        s = np.linalg.svd(d @ oracles.square_root(c), compute_uv=False)
        assert record.data.fro == pytest.approx(np.linalg.norm(s), rel=1e-5)
        assert record.data.kept == pytest.approx(oracles.energy_at(s, record.rank), abs=1e-5)
        assert record.data.epsilon == pytest.approx(record.data.epsilon_min, rel=1e-3)
        if "energy" in rule:
            assert record.rank == oracles.rank_at(s, rule["energy"])


def test_extract_writes_adapter_that_it_reports(tmp_path, loradiag):
    file = tmp_path / "a.safetensors"
    text = some_text(tmp_path, windows=4)
    lora_diag.probe_activations(SAMPLES / "full_ft", text, file, length=32, layers=r"layers\.0\.")
    words = (
        "extract",
        SAMPLES / "base",
        SAMPLES / "full_ft",
        "--rank",
        4,
        "--layers",
        r"layers\.[01]\.mlp",
    )
    ran = loradiag(*words, "--activations", file, "-o", tmp_path / "new")
    assert ran.code == 0, ran.err
    assert f"--activations {file}" in (tmp_path / "new" / "README.md").read_text()
    records = lora_diag.read_results(tmp_path / "new" / "extraction.jsonl").layers
    assert {".0." in record.layer for record in records if record.data} == {True}
    assert {".1." in record.layer for record in records if not record.data} == {True}
    before, after = tensors(SAMPLES / "base"), tensors(SAMPLES / "full_ft")
    for record in records:
        d, written = (
            after[record.layer] - before[record.layer],
            product(tmp_path / "new", record.layer),
        )
        assert record.epsilon == pytest.approx(
            np.linalg.norm(d - written) / np.linalg.norm(d), rel=1e-5
        )
        if record.data:
            c = load_file(file)[record.layer].double().numpy()
            gap = np.sqrt(np.trace((d - written) @ c @ (d - written).T) / np.trace(d @ c @ d.T))
            assert record.data.epsilon == pytest.approx(gap, rel=1e-4)


def test_kfac_needs_recorded_gradients(tmp_path, loradiag):
    base, file = gpt2(tmp_path / "base"), tmp_path / "a.safetensors"
    tuned, text = moved(base, tmp_path / "tuned"), some_text(tmp_path)
    lora_diag.probe_activations(tuned, text, file)
    for more in ({}, {"activations": file}):
        with pytest.raises(UsageError, match="kfac: "):
            lora_diag.extract(base, tuned, tmp_path / "out", rank=2, kfac=True, **more)
    both = tmp_path / "b.safetensors"
    lora_diag.probe_activations(tuned, text, both, output_gradients=True)
    ran = loradiag(
        "extract", base, tuned, "--rank", 2, "--activations", both, "--kfac", "-o", tmp_path / "new"
    )
    assert ran.code == 0, ran.err
    assert "by K-FAC" in ran.out
    assert "--kfac" in (tmp_path / "new" / "README.md").read_text()
    records = lora_diag.read_results(tmp_path / "new" / "extraction.jsonl").layers
    assert {record.data.metric for record in records if record.data} == {"kfac"}
    for record in records:
        if record.data:
            assert record.data.epsilon == pytest.approx(record.data.epsilon_min, rel=1e-3)


def test_update_outside_text_gets_no_factors(tmp_path):
    layer, _ = layer_of(np.eye(6)[:, :1] @ np.eye(6)[:1], tmp_path, Rank(2))
    x = np.ones((6, 3))
    x[0] = 0
    weighted = replace(layer, weighting=weighting(tmp_path, x, False))
    left_out = extract(weighted, ExtractionSettings(), RunRecords())
    assert left_out.reason == "rank_0"
    assert_names(left_out.detail, "change", "output")
    assert left_out.fro == pytest.approx(1, rel=1e-5)
