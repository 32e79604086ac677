"""Residuals against float64 NumPy, their laws, and inputs that they cannot be taken from."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lora_diag
from lora_diag.errors import UsageError
from lora_diag.metrics.subspaces import compute_distances, find_limit, pool_distances
from lora_diag.storage import open_checkpoint
from tests import oracles
from tests.adapters import making
from tests.conftest import DATA, ROOT, as_numpy, save_model, weights
from tests.messages import assert_names, raises_naming

SAMPLES = ROOT / "sample_checkpoints"
lora = partial(making.lora, dtype=torch.float32)
FIELDS = (
    "epsilon",
    "epsilon_min",
    "excess",
    "norm_ratio",
    "cosine",
    "best_scale",
    "epsilon_best_scale",
)


def check(found, d, x, rank, tolerance=1e-6):
    """Hold a distance against the definitions."""
    truth = oracles.distance(d, x, rank)
    for field in FIELDS:
        value = getattr(found, field)
        if field in truth:
            assert value == pytest.approx(truth[field], rel=tolerance, abs=tolerance), field
        else:
            assert value is None, field


@pytest.mark.slow
def test_samples_against_numpy():
    base, tuned = SAMPLES / "base", SAMPLES / "full_ft"
    adapters = [SAMPLES / "lora_r4", SAMPLES / "lora_r16"]
    results = lora_diag.residual(base, tuned, adapters)
    stored = open_checkpoint(base), open_checkpoint(tuned)
    known = {str(path): making.changes(path, base)[0] for path in adapters}
    assert len(results) == 2 * len(stored[0])
    for record in results:
        before, after = (
            side.read(record.layer).double().numpy().reshape(side[record.layer].shape)
            for side in stored
        )
        d = after - before
        x = known[record.adapter].get(record.layer)
        assert record.fro == pytest.approx(np.linalg.norm(d), rel=1e-7)
        if x is None:
            assert (record.epsilon, record.limited_by, record.cosine) == (1.0, "not adapted", None)
            assert record.rank == (0 if d.ndim == 2 else None)
        else:
            rank = int(record.adapter.rpartition("_r")[2])
            assert record.rank == rank
            check(record, d, x, rank)
            for space, overlap in zip(
                (record.column_space, record.row_space),
                oracles.subspace_overlap(d, x, rank),
                strict=True,
            ):
                assert space.overlap == pytest.approx(overlap, abs=1e-6)
                assert np.mean(np.square(space.cosines)) == pytest.approx(overlap, abs=1e-5)
            assert record.column_space.random == rank / d.shape[0]
            assert record.row_space.random == rank / d.shape[1]


def test_whole_model_is_all_layers_as_one_vector():
    results = lora_diag.residual(SAMPLES / "base", SAMPLES / "full_ft", [SAMPLES / "lora_r16"])
    stored = open_checkpoint(SAMPLES / "base"), open_checkpoint(SAMPLES / "full_ft")
    known = making.changes(SAMPLES / "lora_r16", SAMPLES / "base")[0]
    d, x = [], []
    for name in stored[0]:
        d.append(stored[1].read(name).double().numpy() - stored[0].read(name).double().numpy())
        x.append(known[name].ravel() if name in known else np.zeros_like(d[-1]))
    result = pool_distances(results.layers)
    truth = oracles.distance(np.concatenate(d), np.concatenate(x), None)
    for field, value in truth.items():
        assert getattr(result, field) == pytest.approx(value, rel=1e-6)


@pytest.fixture
def model(tmp_path):
    """A base and a fine-tune in float64, and the ΔW of its first matrix."""
    before = {name: value.double() for name, value in weights(1).items()}
    after = {name: value + 0.1 * weights(2)[name].double() for name, value in before.items()}
    layer = "model.layers.0.mlp.up_proj.weight"
    d = as_numpy(after[layer]) - as_numpy(before[layer])
    return save_model(tmp_path / "base", before), save_model(tmp_path / "tuned", after), layer, d


@pytest.mark.parametrize("rank", [1, 3, 12])
def test_truncated_svd_is_at_floor(model, tmp_path, rank):
    base, tuned, layer, d = model
    u, s, vh = np.linalg.svd(d, full_matrices=False)
    adapter = lora(tmp_path / "a", {layer: (u[:, :rank] * s[:rank], vh[:rank])})
    record = lora_diag.residual(base, tuned, [adapter], layers=layer)[layer]
    floor = np.sqrt((s[rank:] ** 2).sum() / (s**2).sum())
    assert record.epsilon_min == pytest.approx(floor, abs=1e-7)
    assert record.epsilon == pytest.approx(floor, abs=1e-6)  # the factors are float32
    assert record.excess == pytest.approx(0, abs=1e-6)
    assert record.column_space.overlap == pytest.approx(1, abs=1e-6)
    assert record.limited_by == ("exact" if rank == 12 else "rank")


@pytest.fixture(scope="module")
def power_law(tmp_path_factory):
    """A full fine-tune that ``krylov`` resolves roughly, its ΔW, and its truncation to rank 8 as an
    adapter.
    """
    folder = tmp_path_factory.mktemp("power_law")
    d = oracles.with_spectrum(1 / np.arange(1, 257) ** 0.8, 256, 256, seed=3)
    layer = "model.layers.0.self_attn.q_proj.weight"
    base = save_model(folder / "base", {layer: torch.zeros(256, 256, dtype=torch.float64)})
    tuned = save_model(folder / "tuned", {layer: torch.from_numpy(d)})
    u, s, vh = np.linalg.svd(d)
    return base, tuned, lora(folder / "a", {layer: (u[:, :8] * s[:8], vh[:8])}), d


@pytest.mark.parametrize("method", ["krylov", "gram", "exact"])
def test_floor_is_lower_bound_for_every_method(power_law, method):
    base, tuned, adapter, d = power_law
    (record,) = lora_diag.residual(base, tuned, [adapter], svd=method, tol=0.05)
    truth = oracles.distance(d, oracles.best_approximation(d, 8), 8)["epsilon_min"]
    if method == "krylov":
        assert record.method.startswith("krylov")
        assert record.epsilon_min > truth + 1e-5  # by itself it is no lower bound
    assert record.least_epsilon <= truth + 1e-9
    assert record.epsilon_min**2 - truth**2 <= record.energy_error + 1e-9
    assert pool_distances([record]).epsilon_min == pytest.approx(record.least_epsilon, rel=1e-14)
    assert pool_distances([record]).excess >= 0


def test_copy_and_half_sized_copy_of_update(model, tmp_path):
    base, tuned, layer, d = model
    u, s, vh = np.linalg.svd(d, full_matrices=False)
    whole = lora(tmp_path / "whole", {layer: (u * s, vh)})
    half = lora(tmp_path / "half", {layer: (u * s / 2, vh)})
    merged = {name: value.clone() for name, value in load_file(base / "model.safetensors").items()}
    merged[layer] += torch.tensor(d)
    same = save_model(tmp_path / "merged", merged)
    results = lora_diag.residual(base, tuned, [whole, half, same], layers=layer)
    first, second, third = results.layers
    assert first.epsilon < 1e-6
    assert (second.epsilon, second.best_scale) == (
        pytest.approx(0.5, abs=1e-6),
        pytest.approx(2, abs=1e-6),
    )
    assert second.epsilon_best_scale < 1e-3
    assert second.limited_by == "scale"
    assert third.epsilon == 0
    assert (third.rank, third.epsilon_min, third.limited_by) == (None, None, "exact")


def test_small_epsilon_is_not_lost_to_cancellation(tmp_path):
    rng = np.random.default_rng(0)
    d = rng.standard_normal((40, 30))
    other = d * (1 + 1e-11)
    zero = {"w": torch.zeros(40, 30, dtype=torch.float64)}
    base = save_model(tmp_path / "base", zero)
    tuned = save_model(tmp_path / "tuned", {"w": torch.tensor(d)})
    copy = save_model(tmp_path / "copy", {"w": torch.tensor(other)})
    record = lora_diag.residual(base, tuned, [copy])["w"]
    assert record.epsilon == pytest.approx(np.linalg.norm(d - other) / np.linalg.norm(d), rel=1e-9)


def moments(path, matrices, **metadata):
    save_file(
        {name: torch.tensor(value) for name, value in matrices.items()},
        path,
        metadata or {"tokens": "640"},
    )
    return path


@pytest.mark.parametrize("in_out", [False, True])
def test_residual_in_data_metric_equals_numpy(tmp_path, in_out):
    rng = np.random.default_rng(1)
    inputs = rng.standard_normal((500, 12)) * np.arange(1, 13)
    c = inputs.T @ inputs / 500
    d, b, a = (rng.standard_normal(shape) for shape in ((20, 12), (20, 3), (3, 12)))
    b, a = b.astype(np.float32).astype(float), a.astype(np.float32).astype(float)
    name = "h.0.mlp.c_fc.weight"
    stored = d.T if in_out else d
    zero = {
        name: torch.zeros(stored.shape, dtype=torch.float64),
        "h.0.mlp.c_fc.bias": torch.zeros(20).double(),
    }
    base = save_model(tmp_path / "base", zero)
    tuned = save_model(tmp_path / "tuned", zero | {name: torch.tensor(stored)})
    adapter = lora(tmp_path / "a", {name: (b, a)}, fan_in_fan_out=in_out, target_modules=["c_fc"])
    file = moments(tmp_path / "c.safetensors", {name: c})
    results = lora_diag.residual(base, tuned, [adapter], activations=file)
    root = oracles.square_root(c)
    check(results[name].data, d @ root, b @ a @ root, 3, 1e-6)
    outputs, missed = (
        inputs @ d.T,
        inputs @ (d - b @ a).T,
    )  # the metric is the mean square of the change in the output
    assert results[name].data.epsilon == pytest.approx(
        np.sqrt((missed**2).sum() / (outputs**2).sum()), rel=1e-6
    )
    assert "recorded over 640 tokens" in results.run.inputs[-1].notes
    assert results["h.0.mlp.c_fc.bias"].data is None


def test_reference_is_compared_with_fine_tune(model, tmp_path):
    base, tuned, layer, d = model
    before = load_file(base / "model.safetensors")
    after = {name: value + 0.1 * weights(3)[name].double() for name, value in before.items()}
    second = save_model(tmp_path / "second", after)
    record = lora_diag.residual(base, tuned, [], reference=second, layers=layer)[layer]
    x = as_numpy(after[layer]) - as_numpy(before[layer])
    check(record, d, x, None)
    assert record.role == "reference"
    columns, rows = oracles.subspace_overlap(d, x, 8)
    assert record.column_space.overlap == pytest.approx(columns, abs=1e-6)
    assert record.row_space.overlap == pytest.approx(rows, abs=1e-6)


def test_zero_updates_have_no_distance(model, tmp_path):
    base, tuned, layer, d = model
    adapter = lora(tmp_path / "a", {layer: (d[:, :2], np.ones((2, 12)))})
    copy = save_model(tmp_path / "copy", load_file(base / "model.safetensors"))
    record = lora_diag.residual(base, copy, [adapter], layers=layer)[layer]
    assert (record.fro, record.epsilon, record.limited_by) == (0, None, None)
    assert record.adapter_fro > 0
    dead = lora(tmp_path / "dead", {layer: (np.zeros((16, 2)), np.ones((2, 12)))})
    record = lora_diag.residual(base, tuned, [dead], layers=layer)[layer]
    assert (record.epsilon, record.rank, record.limited_by) == (1.0, 2, "not adapted")


def test_adapter_update_of_unchanged_layer_counts_fully(model, tmp_path):
    base, _, layer, _ = model
    before = load_file(base / "model.safetensors")
    other = "model.layers.1.mlp.up_proj.weight"
    after = save_model(tmp_path / "after", before | {other: before[other] + 1})
    b = np.ones((16, 2), dtype=np.float32)
    adapter = lora(tmp_path / "a", {layer: (b, np.ones((2, 12), dtype=np.float32))})
    whole = pool_distances(lora_diag.residual(base, after, [adapter]).layers)
    d, x = np.ones(16 * 12), 2 * np.ones(16 * 12)  # in different layers
    assert whole.epsilon == pytest.approx(
        np.sqrt((d**2).sum() + (x**2).sum()) / np.linalg.norm(d), rel=1e-9
    )
    assert whole.cosine == 0


def test_unresolved_fine_tune_is_reported_as_noise(tmp_path):
    base = {"w.weight": torch.full((64, 64), 1.0, dtype=torch.bfloat16)}
    rng = torch.Generator().manual_seed(0)
    flips = torch.where(torch.rand(64, 64, generator=rng) < 0.02, 2**-7, 0.0)
    tuned = {"w.weight": (base["w.weight"].float() + flips).to(torch.bfloat16)}
    adapter = lora(tmp_path / "a", {"w.weight": (np.ones((64, 1)) * 1e-3, np.ones((1, 64)))})
    before, after = save_model(tmp_path / "b", base), save_model(tmp_path / "t", tuned)
    record = lora_diag.residual(before, after, [adapter])["w.weight"]
    assert record.resolution.verdict == "unresolved"
    assert record.limited_by == "noise"


@pytest.mark.parametrize(
    ("size", "words"), [(1e-40, "1.4e-79"), (1e38, "1.4e+77"), (1e100, "1.4e+201")]
)
def test_norm_with_overflowing_square_is_left_out(model, tmp_path, size, words):
    base, tuned, layer, _ = model
    path = lora(tmp_path / "a", {layer: (np.ones((16, 1)), np.ones((1, 12)))})
    tensors = load_file(path / "adapter_model.safetensors")
    save_file(
        {k: torch.full_like(v, size, dtype=torch.float64) for k, v in tensors.items()},
        path / "adapter_model.safetensors",
    )
    results = lora_diag.residual(base, tuned, [path], layers=r"layers\.0\.mlp\.up")
    (item,) = [item for item in results.left_out if item.reason == "non_finite"]
    assert_names(item.detail, path, words)


def test_deficient_adapter_has_directions_of_its_rank(model, tmp_path):
    base, tuned, layer, d = model
    path = lora(
        tmp_path / "a",
        {layer: (np.tile(d[:, :2], 2), np.random.default_rng(0).standard_normal((4, 12)))},
    )
    record = lora_diag.residual(base, tuned, [path])[layer]
    for space, size in ((record.column_space, 16), (record.row_space, 12)):
        assert len(space.cosines) == 2
        assert space.random == pytest.approx(
            4 / size
        )  # four of the fine-tune's, of which two are to be near these


def test_weights_only_in_adapter_are_listed(model, tmp_path):
    base, tuned, layer, d = model
    tensors = load_file(tuned / "model.safetensors")
    without = save_model(
        tmp_path / "without", {name: value for name, value in tensors.items() if name != layer}
    )
    adapter = lora(tmp_path / "a", {layer: (d[:, :2], np.ones((2, 12)))})
    results = lora_diag.residual(base, without, [adapter])
    assert {item.layer: item.reason for item in results.left_out} == {layer: "only_in_base"}


def test_empty_and_repeated_values_are_refused(model, tmp_path):
    base, tuned, layer, d = model
    with raises_naming(UsageError, "least", "ADAPTER"):
        lora_diag.residual(base, tuned, [])
    with pytest.raises(UsageError, match="TUNED itself"):
        lora_diag.residual(base, tuned, [tuned])
    adapter = lora(tmp_path / "a", {layer: (d[:, :2], np.ones((2, 12)))})
    with pytest.raises(UsageError, match="given twice"):
        lora_diag.residual(base, tuned, [adapter, f"{adapter}/"])


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5, 6])
def test_resume_keeps_non_finite_adapter(model, tmp_path, cut):
    base, tuned, layer, d = model
    path = tmp_path / "r.jsonl"
    good = lora(tmp_path / "good", {layer: (d[:, :2], np.ones((2, 12)))})
    bad = lora(tmp_path / "bad", {layer: (np.full((16, 2), np.nan), np.ones((2, 12)))})
    results = lora_diag.residual(base, tuned, [good, bad], layers=r"layers\.0\.", output=path)
    assert {record.adapter for record in results if record.layer == layer} == {str(good)}
    (item,) = [item for item in results.left_out if item.reason == "non_finite"]
    assert item.layer == layer
    assert_names(item.detail, bad, "lora_B", "nan at [0, 0]")
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:cut]) + b'{"record":"resid')
    lora_diag.residual(base, tuned, [good, bad], layers=r"layers\.0\.", output=path, resume=True)
    assert path.read_bytes() == whole


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    m=st.integers(1, 12),
    n=st.integers(1, 12),
    rank=st.integers(1, 12),
    scale=st.floats(-3, 3),
)
def test_residual_identities(seed, m, n, rank, scale):
    rng = np.random.default_rng(seed)
    d, x = (
        rng.standard_normal((m, n)),
        scale * rng.standard_normal((m, rank)) @ rng.standard_normal((rank, n)),
    )
    s = np.linalg.svd(d, compute_uv=False)
    floor = float(np.sqrt((s[rank:] ** 2).sum() / (s**2).sum()))
    result = compute_distances(
        float(np.linalg.norm(d)),
        float(np.linalg.norm(x)),
        float(np.linalg.norm(d - x)),
        float((d * x).sum()),
        floor,
    )
    assert result.epsilon >= floor - 1e-12  # Eckart–Young
    assert result.epsilon**2 == pytest.approx(floor**2 + result.excess)
    if result.cosine is not None:
        assert result.epsilon**2 == pytest.approx(
            1 - 2 * result.norm_ratio * result.cosine + result.norm_ratio**2
        )
        assert result.epsilon_best_scale <= min(1.0, result.epsilon) + 1e-9
        assert result.epsilon_best_scale**2 == pytest.approx(1 - result.cosine**2, abs=1e-9)
    assert find_limit(result) is not None


@pytest.mark.parametrize(
    "case", ["llama-lora", "gpt2-conv1d", "llama-dora", "moe-target-parameters", "loha", "vera"]
)
def test_shared_merges_equal_their_adapters(case):
    folder = DATA / "cases" / case
    results = lora_diag.residual(folder / "base", folder / "merged", [folder / "adapter"])
    moved = [record for record in results if record.fro > 0]
    assert moved
    for record in moved:
        assert record.epsilon < 1e-4, record.layer  # the merge is rounded to float32
        assert record.limited_by == "exact"


def test_directions_beyond_rank_are_not_in_subspaces(tmp_path):
    rng = np.random.default_rng(3)
    d = np.zeros((200, 150))
    d[:5] = rng.standard_normal((5, 150))  # five rows moved, as in a table of positions
    zero = {"w.weight": torch.zeros(200, 150)}
    base = save_model(tmp_path / "base", zero)
    tuned = save_model(tmp_path / "tuned", {"w.weight": torch.tensor(d, dtype=torch.float32)})
    u, s, vh = np.linalg.svd(d, full_matrices=False)
    adapter = lora(tmp_path / "a", {"w.weight": (u[:, :5] * s[:5], vh[:5])})
    record = lora_diag.residual(base, tuned, [adapter])["w.weight"]
    assert len(record.column_space.cosines) == 5
    assert record.column_space.overlap == pytest.approx(1)
    gradient = tmp_path / "g.safetensors"
    save_file({"w.weight": torch.randn(200, 150)}, gradient, {"step": "0"})
    assert {
        result.rank for result in lora_diag.overlap(base, tuned, [gradient], ranks=(4, 5, 8, 64))
    } == {4, 5}
