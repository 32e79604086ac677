"""Records against float64 NumPy, from files of every dtype and layout."""

import json

import numpy as np
import pytest
import torch

import lora_diag
import lora_diag.diagnostics.spectrum.measure as diagnostic
from lora_diag.deltas import FactoredDelta
from lora_diag.diagnostics.spectrum.show import summary_lines
from tests import oracles
from tests.adapters import making
from tests.conftest import DATA, as_numpy, save_model, save_sharded, weights
from tests.linalg.test_rounding import dequantized
from tests.messages import assert_names
from tests.probes.making import SAMPLES, tensors


def pair(tmp_path, base: np.ndarray, tuned: np.ndarray):
    """Write BASE and TUNED, of one matrix."""
    return [
        save_model(tmp_path / name, {"w": torch.from_numpy(w)})
        for name, w in (("a", base), ("b", tuned))
    ]


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def check(record, base: np.ndarray, tuned: np.ndarray) -> None:
    """Hold a record against an independent float64 computation from the stored numbers."""
    truth = oracles.spectrum(base, tuned)
    s, curve = truth["s"], truth["curve"]
    assert record.fro == pytest.approx(truth["fro"], rel=1e-6)
    assert record.base_fro == pytest.approx(truth["base_fro"], rel=1e-6)
    assert np.abs(np.array(record.s) - s[: len(record.s)]).max() <= 1e-6 * s[0]
    for rank, share in record.energy.items():
        if share is not None:
            assert share == pytest.approx(oracles.energy_at(s, int(rank)), abs=1e-6)
    for threshold, rank in record.rank_at.items():
        expected = oracles.rank_at(s, float(threshold))
        near = abs(curve[expected - 1] - float(threshold)) < 1e-6
        assert rank is None or rank == expected or near
        assert rank is not None or expected > len(record.s)
    for rank, tail in record.tail.items():
        if tail is not None:
            assert tail.fro == pytest.approx(
                np.sqrt((s[int(rank) :] ** 2).sum()), abs=1e-6 * truth["fro"]
            )
            if tail.spectral is not None:
                assert tail.spectral == pytest.approx(
                    s[int(rank)] if int(rank) < len(s) else 0, abs=1e-6 * s[0]
                )
    assert record.stable_rank == pytest.approx(truth["fro"] ** 2 / s[0] ** 2, rel=1e-5)
    if record.complete:
        assert record.effective_rank == pytest.approx(oracles.effective_rank(s), rel=1e-5)
    assert record.resolution.unchanged == np.mean(base == tuned)
    largest = np.linalg.norm(base, 2)
    assert (
        truth["base_fro"] / min(base.shape) ** 0.5 * (1 - 1e-6)
        <= record.base_sigma
        <= largest * (1 + 1e-9)
    )
    assert record.sigma_to_base >= s[0] / largest * (1 - 1e-6)


# Every pair of dtypes once, and the options with pairs that widen, narrow and stay.
PAIRS = [(before, after, {}) for before in DTYPES for after in DTYPES]
PAIRS += [
    (before, after, options)
    for options in ({"svd": "gram"}, {"svd": "exact"}, {"top": 5})
    for before, after in (
        (torch.float64, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.bfloat16,) * 2,
    )
]


@pytest.mark.parametrize(("before", "after", "options"), PAIRS, ids=str)
def test_records_of_every_dtype_and_method(tmp_path, before, after, options):
    base = {name: value for name, value in weights(1, before).items() if "layers.0" in name}
    moves = weights(2)
    tuned = {
        name: (value.double() + 0.2 * moves[name].double()).to(after)
        for name, value in base.items()
    }
    results = lora_diag.spectrum(
        save_model(tmp_path / "base", base),
        save_sharded(tmp_path / "tuned", tuned),
        ranks=(1, 4, 9, 50),
        **options,
    )
    matrices = [name for name, value in base.items() if value.ndim == 2]
    assert {record.layer for record in results} == set(matrices)
    for record in results:
        check(record, as_numpy(base[record.layer]), as_numpy(tuned[record.layer]))
    for item in results.left_out:
        expected = as_numpy(tuned[item.layer]) - as_numpy(base[item.layer])
        assert item.reason == "vector"
        assert item.fro == pytest.approx(np.linalg.norm(expected), rel=1e-6)


@pytest.mark.parametrize("method", ["krylov", "gram", "exact"])
def test_tail_errors_bound_distance_to_numpy(tmp_path, method):
    d = oracles.with_spectrum(1 / np.arange(1, 257) ** 0.8, 256, 256, seed=3)
    (record,) = lora_diag.spectrum(
        *pair(tmp_path, np.zeros((256, 256)), d), svd=method, top=8, tol=0.05, ranks=(1, 4, 7, 8)
    )
    s = np.linalg.svd(d, compute_uv=False)
    seen = 0.0
    for rank, tail in record.tail.items():
        if tail is not None and tail.spectral is not None:
            error = abs(tail.spectral - (s[int(rank)] if int(rank) < 256 else 0.0))
            assert error <= tail.spectral_error + 1e-12
            seen = max(seen, error)
            assert (
                abs(tail.fro**2 - (s[int(rank) :] ** 2).sum())
                <= record.energy_error * record.fro**2 + 1e-12
            )
    if method == "krylov":
        assert record.method.startswith("krylov")
        assert seen > 1e-4
    assert record.tail["8"].spectral_error is None  # σ_9 was not computed


def test_zero_update_has_no_shares_and_needs_no_rank(tmp_path):
    model = save_model(tmp_path / "m", weights(1))
    for record in lora_diag.spectrum(model, model):
        assert record.fro == 0
        assert set(record.energy.values()) == {None}
        assert set(record.rank_at.values()) == {0}
        assert all(tail.fro == 0 for tail in record.tail.values())
        assert record.stable_rank is None
        assert record.effective_rank is None
        assert record.resolution.unchanged == 1


def test_ranks_beyond_kept_values_are_null_beyond_matrix_one(tmp_path, pair_of_models):
    base, tuned, *_ = pair_of_models
    (record,) = lora_diag.spectrum(base, tuned, layers="0.*k_proj", ranks=(2, 5, 99), top=3)
    assert len(record.s) == 3
    assert not record.complete
    assert record.energy["2"] is not None
    assert record.energy["5"] is record.energy["99"] is record.tail["5"] is None
    assert record.rank_at["0.99"] is None
    assert record.effective_rank is None
    (record,) = lora_diag.spectrum(base, tuned, layers="0.*k_proj", ranks=(2, 5, 99))
    assert record.energy["99"] == 1
    assert record.tail["99"].fro == 0


def test_weights_with_coarse_spacing_are_left_out(tmp_path):
    sides = [{"w.weight": torch.randn(4, 4).double() * 1e200} for _ in range(2)]
    paths = [
        save_model(tmp_path / name, side)
        for name, side in zip(("base", "tuned"), sides, strict=True)
    ]
    (item,) = lora_diag.spectrum(*paths).left_out
    assert (item.layer, item.reason) == ("w.weight", "non_finite")
    assert_names(item.detail, "spacing", "float64")


def test_non_finite_layer_is_named_and_others_measured(tmp_path, pair_of_models):
    base, _, _, after = pair_of_models
    after["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    after["model.layers.0.input_layernorm.weight"][2] = torch.inf
    results = lora_diag.spectrum(base, save_model(tmp_path / "nan", after))
    bad = {item.layer: item.detail for item in results.left_out if item.reason == "non_finite"}
    assert bad == {
        "model.layers.1.mlp.up_proj.weight": "TUNED holds nan at [3, 4]",
        "model.layers.0.input_layernorm.weight": "TUNED holds inf at [2]",
    }
    assert len(results) == 9
    assert "nan" not in json.dumps([record.model_dump() for record in results]).lower()


@pytest.mark.parametrize("method", ["exact", "gram"])
def test_bound_holds_for_digits_of_record(tmp_path, method):
    """Nine digits of each value are coarser than the methods' own bounds."""
    base = np.zeros((60, 48))
    tuned = oracles.with_spectrum(1.0 + np.pi * np.arange(48) / 500, 60, 48, seed=2)
    folders = pair(tmp_path, base, tuned)
    (record,) = lora_diag.spectrum(*folders, ranks=range(1, 48), svd=method)
    s = oracles.spectrum(base, tuned)["s"]
    written = np.cumsum(np.array(record.s) ** 2) / record.fro**2
    errors = [abs(written[r - 1] - oracles.energy_at(s, r)) for r in range(1, 48)]
    errors += [abs(record.energy[str(r)] - oracles.energy_at(s, r)) for r in range(1, 48)]
    assert 1e-12 < max(errors) <= record.energy_error < 1e-8


@pytest.mark.parametrize("n", [3, 8, 40])
def test_subtraction_in_float32_changes_energy_within_bound(tmp_path, n):
    """Entries that are not within a factor of 2 of each other: beyond ``energy_error``, within what
    the page says.
    """
    rng = np.random.default_rng(n)
    base, update = (rng.standard_normal((n, n)).astype(np.float32) for _ in range(2))
    tuned = base + update
    (record,) = lora_diag.spectrum(*pair(tmp_path, base, tuned), ranks=range(1, n))
    s = oracles.spectrum(base.astype(np.float64), tuned.astype(np.float64))["s"]
    errors = [abs(record.energy[str(r)] - oracles.energy_at(s, r)) for r in range(1, n)]
    assert 1e-12 < max(errors) <= record.energy_error + 4 * 2.0**-24
    assert record.fro == pytest.approx(
        np.linalg.norm(tuned.astype(np.float64) - base), rel=2.0**-24
    )


def test_dequantized_4_bit_pair_in_float32_is_unresolved(loradiag, tmp_path):
    """Small changes move the minima of whole groups, which looks like a low rank."""
    rng = np.random.default_rng(8)
    w = rng.standard_normal((128, 256)) * 0.02
    t = w + 1e-4 * rng.standard_normal(w.shape)
    for name, side in (("base", w), ("tuned", t)):
        save_model(
            tmp_path / name,
            {"model.layers.0.mlp.up_proj.weight": torch.tensor(dequantized(side, "Q4_1")).float()},
        )
    assert loradiag("spectrum", "base", "tuned", "-o", "run.jsonl").code == 0
    (record,) = lora_diag.read_results(tmp_path / "run.jsonl")
    assert record.resolution.verdict == "unresolved"
    assert record.resolution.signal_rank == 0


def test_resolution_of_bf16_pair(tmp_path):
    rng = np.random.default_rng(0)
    base = torch.from_numpy(rng.standard_normal((96, 80)) * 0.02).bfloat16()
    small = rng.standard_normal((96, 2)) @ rng.standard_normal((2, 80)) * 2e-4
    tuned = (base.double() + torch.from_numpy(small)).bfloat16()
    (record,) = lora_diag.spectrum(
        save_model(tmp_path / "a", {"w": base}), save_model(tmp_path / "b", {"w": tuned})
    )
    result = record.resolution
    assert (result.verdict, result.mantissa, result.signal_rank) == ("floor-limited", (7, 7), 2)
    assert np.linalg.norm(as_numpy(tuned) - as_numpy(base) - small) <= result.rounding_fro
    even = result.noise_fro / np.sqrt(96 * 80) * (np.sqrt(96) + np.sqrt(80))
    assert (
        even < result.edge < 1.25 * even
    )  # Gaussian weights: rows and columns of nearly the same variance
    assert result.start == "rounded"


def test_non_finite_added_rows_and_adapter_base_are_named(tmp_path):
    before, after = weights(1), weights(1)
    after["lm_head.weight"] = torch.cat([before["lm_head.weight"], torch.zeros(2, 12)])
    after["lm_head.weight"][21, 3] = torch.nan
    results = lora_diag.spectrum(
        save_model(tmp_path / "a", before), save_model(tmp_path / "b", after)
    )
    (bad,) = [item for item in results.left_out if item.reason == "non_finite"]
    assert bad.layer == "lm_head.weight"
    assert "nan at [1, 3]" in bad.detail
    before["lm_head.weight"][5, 3] = torch.inf
    adapter = making.lora(
        tmp_path / "adapter", {"lm_head.weight": (np.ones((20, 1)), np.ones((1, 12)))}
    )
    (bad,) = [
        item
        for item in lora_diag.spectrum(save_model(tmp_path / "inf", before), adapter).left_out
        if item.reason == "non_finite"
    ]
    assert bad.detail == "BASE holds inf at [5, 3]"


def test_factors_whose_product_overflows_are_left_out():
    huge = torch.full((3, 1), 1e300, dtype=torch.float64)
    delta = FactoredDelta("w", (3, 3), lambda: (huge, huge.T), (None, "float64"))
    result = diagnostic.spectrum(delta, diagnostic.SpectrumSettings())
    assert (result.reason, result.detail) == (
        "non_finite",
        "the product of its factors overflows float64",
    )


def test_gpu_out_of_memory_moves_layer_to_cpu(pair_of_models, monkeypatch):
    base, tuned, *_ = pair_of_models
    real = diagnostic.load_change
    failed = []

    def load(delta, device, **options):
        if not failed:
            failed.append(delta.layer)
            raise torch.cuda.OutOfMemoryError("out of memory")
        return real(delta, device, **options)

    monkeypatch.setattr(diagnostic, "load_change", load)
    results = lora_diag.spectrum(base, tuned, workers=1)
    plain = [record.layer for record in results if "out of memory" not in record.method]
    assert len(plain) == len(results) - 1
    assert_names(results[failed[0]].method, "CPU", "memory")
    (statement,) = (each for each in summary_lines(results) if each.key == "device")
    assert_names(statement.lead, failed[0].removesuffix(".weight"), "--workers 1")


def cases():
    """Real pairs made with PEFT and transformers, with truth computed elsewhere."""
    for folder in sorted((DATA / "cases").glob("*")):
        tuned = next(
            (folder / name for name in ("merged", "tuned") if (folder / name).is_dir()), None
        )
        if (
            tuned is not None
            and (folder / "truth.json").exists()
            and folder.name not in {"bnb-nf4-double", "fp8-block-scaled"}
        ):
            yield pytest.param(folder, tuned, id=folder.name)


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "tuned"), cases())
def test_shared_merges_have_true_status(folder, tuned):
    truth = json.loads((folder / "truth.json").read_text())
    results = lora_diag.spectrum(folder / "base", tuned)
    seen = 0
    for name, expected in truth.items():
        if name.startswith("_") or not isinstance(expected, dict) or not expected.get("s"):
            continue
        stack = isinstance(expected["s"][0], list)
        for index, s in enumerate(expected["s"] if stack else [expected["s"]]):
            record = results[f"{name}[{index}]" if stack else name]
            assert (
                np.abs(np.array(record.s[: len(s)]) - s[: len(record.s)]).max()
                <= 1e-6 * max(s[0], 1e-12) + 1e-12
            )
            if not stack:
                assert record.fro == pytest.approx(expected["fro"], rel=1e-6)
            seen += 1
    assert seen or folder.name in {"identical", "bitfit-like"}


def test_adapter_has_ratio_of_largest_values_with_base_only():
    name, base, adapter = "model.layers.0.mlp.up_proj.weight", SAMPLES / "base", SAMPLES / "lora_r4"
    (record,) = lora_diag.spectrum(base, adapter, layers=name)
    largest = np.linalg.norm(tensors(base)[name], 2)
    assert 0.8 * largest <= record.base_sigma <= largest
    assert record.s[0] / largest <= record.sigma_to_base <= 1.25 * record.s[0] / largest
    assert lora_diag.spectrum(adapter, layers=name).layers[0].sigma_to_base is None
