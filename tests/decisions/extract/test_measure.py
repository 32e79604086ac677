"""The factors of one layer, compared with a singular value decomposition in float64 NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import lora_diag
from lora_diag import deltas
from lora_diag.decisions.extract.measure import ExtractionSettings, ExtractLayer, Rank, extract
from lora_diag.deltas import FactoredDelta, pair
from lora_diag.errors import InputError, UsageError
from lora_diag.storage import open_checkpoint
from tests.messages import raises_naming
from tests.oracles import best_approximation, with_spectrum
from tests.probes.making import SAMPLES


def layer_of(change, tmp_path, rank, transposed=False):
    rng = np.random.default_rng(0)
    base = (rng.standard_normal(change.shape) * 0.02).astype(np.float32)
    for name, weight in (("base", base), ("tuned", (base + change).astype(np.float32))):
        save_file({"q_proj.weight": torch.tensor(weight)}, tmp_path / f"{name}.safetensors")
    deltas = pair(
        *(open_checkpoint(tmp_path / f"{name}.safetensors") for name in ("base", "tuned"))
    ).deltas
    real = (base + change).astype(np.float32).astype(np.float64) - base.astype(np.float64)
    return ExtractLayer(deltas[0], "q_proj", "linear", transposed, rank), real


class RunRecords:
    """A store that keeps the factors in memory, as they would be in a file."""

    def __call__(self, b, a):
        self.b, self.a = b.clone(), a.clone()
        return self.b, self.a


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 14), columns=st.integers(1, 14), rank=st.integers(1, 20), transposed=st.booleans(),
    split=st.sampled_from(["both", "b"]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_best_update_of_rank_and_its_error(
    tmp_path_factory, rows, columns, rank, transposed, split, seed
):
    change = np.random.default_rng(seed).standard_normal((rows, columns)) * 0.1
    layer, real = layer_of(change, tmp_path_factory.mktemp("x"), Rank(rank), transposed)
    kept = RunRecords()
    record = extract(layer, ExtractionSettings(split=split), kept)
    s = np.linalg.svd(real, compute_uv=False)
    r = min(rank, rows, columns)
    b, a = kept.b.double().numpy(), kept.a.double().numpy()
    product = (b @ a).T if transposed else b @ a
    assert np.linalg.norm(product - best_approximation(real, r)) <= 1e-5 * np.linalg.norm(real)
    assert record.rank == r
    assert record.params == r * (rows + columns)
    assert record.epsilon == pytest.approx(
        np.linalg.norm(real - product) / np.linalg.norm(real), rel=1e-6, abs=3e-7
    )
    assert record.epsilon_min == pytest.approx(
        np.sqrt((s[r:] ** 2).sum() / (s**2).sum()), rel=1e-6, abs=3e-7
    )
    assert record.kept == pytest.approx((s[:r] ** 2).sum() / (s**2).sum(), abs=3e-7)
    if split == "both":
        assert np.allclose(np.linalg.norm(b, axis=0), np.linalg.norm(a, axis=1), rtol=1e-4)
    else:
        assert np.allclose(a @ a.T, np.eye(r), atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_lengthened_factors_have_norm_of_update(tmp_path, transposed):
    layer, real = layer_of(
        np.random.default_rng(3).standard_normal((11, 9)) * 0.1, tmp_path, Rank(2), transposed
    )
    kept = RunRecords()
    record = extract(layer, ExtractionSettings(match_norm=True), kept)
    product = (kept.b.double() @ kept.a.double()).numpy()
    product = product.T if transposed else product
    nearest = best_approximation(real, 2)
    factor = np.linalg.norm(real) / np.linalg.norm(nearest)
    assert np.allclose(product, factor * nearest, atol=1e-6 * np.linalg.norm(real))
    assert record.lengthened == pytest.approx(factor, rel=1e-6)
    assert record.epsilon == pytest.approx(
        np.sqrt(2 - 2 / factor), rel=1e-5
    )  # above the Eckart–Young minimum
    assert record.epsilon_min == pytest.approx(np.sqrt(1 - 1 / factor**2), rel=1e-5)


def test_match_norm_is_in_metadata_and_card(tmp_path):
    pair = SAMPLES / "base", SAMPLES / "full_ft"
    options = {"rank": 2, "layers": r"layers\.0\..*q_proj", "match_norm": True}
    found = lora_diag.extract(*pair, tmp_path / "adapter", **options)
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert "‖ΔW‖/‖ΔW_r‖" in file.metadata()["loradiag.match_norm"]
    assert "--match-norm" in (tmp_path / "adapter" / "README.md").read_text()
    norm = lora_diag.spectrum(pair[0], tmp_path / "adapter").layers[0].fro
    assert norm == pytest.approx(found.layers[0].fro, rel=1e-5)
    with raises_naming(UsageError, "match_norm", "activations"):
        lora_diag.extract(*pair, tmp_path / "other", activations=tmp_path / "none", **options)


def test_error_of_matrix_in_several_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(deltas, "BLOCK_ENTRIES", 27)
    layer, real = layer_of(
        np.random.default_rng(1).standard_normal((11, 9)) * 0.1, tmp_path, Rank(3)
    )
    s = np.linalg.svd(real, compute_uv=False)
    record = extract(layer, ExtractionSettings(), RunRecords())
    assert record.epsilon == pytest.approx(np.sqrt((s[3:] ** 2).sum() / (s**2).sum()), rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(share=st.floats(0.05, 1.0), seed=st.integers(0, 1000))
def test_energy_takes_smallest_rank_that_keeps_share(tmp_path_factory, share, seed):
    change = np.random.default_rng(seed).standard_normal((12, 9)) * 0.1
    layer, real = layer_of(change, tmp_path_factory.mktemp("x"), Rank(energy=share))
    record = extract(layer, ExtractionSettings(), RunRecords())
    energy = np.linalg.svd(real, compute_uv=False) ** 2
    curve = np.cumsum(energy) / energy.sum()
    assert curve[record.rank - 1] >= share - 1e-12
    assert record.rank == 1 or curve[record.rank - 2] < share + 1e-12


def rounded_layer(folder):
    """Return a layer in bfloat16 with an update of rank 3 above its rounding, which alone is to be
    kept.
    """
    rng = torch.Generator().manual_seed(0)
    base = (torch.randn(128, 96, generator=rng) * 0.02).bfloat16()
    planted = torch.tensor(
        with_spectrum(np.array([0.5, 0.4, 0.3]), 128, 96, seed=0), dtype=torch.float32
    )
    for name, weight in (("base", base), ("tuned", (base.float() + planted).bfloat16())):
        save_file({"q_proj.weight": weight}, folder / f"{name}.safetensors")
    delta = pair(
        *(open_checkpoint(folder / f"{name}.safetensors") for name in ("base", "tuned"))
    ).deltas[0]
    return ExtractLayer(delta, "q_proj", "linear", False, Rank(signal=True))


def test_signal_keeps_values_above_rounding(tmp_path):
    record = extract(rounded_layer(tmp_path), ExtractionSettings(), RunRecords())
    assert record.rank == record.resolution.signal_rank == 3


def test_error_refers_to_stored_factors(tmp_path):
    """ε comes from what the store returns, in its dtype: bfloat16 factors are farther away, a
    damaged file is seen.
    """
    layer, real = layer_of(
        with_spectrum(np.array([1.0, 0.5, 0.25]), 20, 16, seed=0), tmp_path, Rank(2)
    )
    coarse = RunRecords()
    record = extract(layer, ExtractionSettings(dtype="bfloat16"), coarse)
    product = (coarse.b.double() @ coarse.a.double()).numpy()
    assert coarse.b.dtype == torch.bfloat16
    assert record.epsilon == pytest.approx(
        np.linalg.norm(real - product) / np.linalg.norm(real), rel=1e-6
    )
    assert record.epsilon > record.epsilon_min * (1 + 1e-6)
    zeros = extract(layer, ExtractionSettings(), lambda b, a: (torch.zeros_like(b), a))
    assert zeros.epsilon == pytest.approx(1.0)


def test_factors_are_compressed_without_forming_their_product(tmp_path):
    """A 200,000 × 100,000 update could not be formed: 80 GB in float32."""
    rng = torch.Generator().manual_seed(0)
    b = torch.linalg.qr(torch.randn(200_000, 3, generator=rng, dtype=torch.float64))[0]
    a = torch.linalg.qr(torch.randn(100_000, 3, generator=rng, dtype=torch.float64))[0].T
    s = torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)
    delta = FactoredDelta(
        "q_proj.weight", (200_000, 100_000), lambda: (b * s, a), (None, "float64")
    )
    record = extract(
        ExtractLayer(delta, "q_proj", "linear", False, Rank(2)), ExtractionSettings(), RunRecords()
    )
    assert record.epsilon == pytest.approx(0.5 / np.sqrt(5.25), rel=1e-5)
    assert record.method == "factored"
    wide = extract(
        ExtractLayer(delta, "q_proj", "linear", False, Rank(64)), ExtractionSettings(), RunRecords()
    )
    assert wide.rank == 3
    assert wide.epsilon < 1e-6


@pytest.mark.parametrize(
    ("value", "rank"), [(0, Rank(4)), (0, Rank(energy=0.9)), (0, Rank(signal=True)), (1, Rank(0))]
)
def test_layer_of_rank_0_records_lost_norm(tmp_path, value, rank):
    layer, real = layer_of(np.full((6, 5), float(value)), tmp_path, rank)
    left_out = extract(layer, ExtractionSettings(), RunRecords())
    assert left_out.reason == "rank_0"
    assert left_out.fro == pytest.approx(np.linalg.norm(real))


def test_insufficient_dtype_for_factors_is_refused(tmp_path):
    layer, _ = layer_of(np.full((6, 5), 1e10), tmp_path, Rank(1))
    with raises_naming(InputError, "float16", "--adapter-dtype float32"):
        extract(layer, ExtractionSettings(dtype="float16", split="b"), RunRecords())
    layer, _ = layer_of(np.full((6, 5), 3e38), tmp_path, Rank(1))
    with raises_naming(InputError, "float32", "factors"):
        extract(layer, ExtractionSettings(split="b"), RunRecords())
