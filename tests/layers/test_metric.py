"""Spectra of ΔW·C^½ and G^½·ΔW·C^½ against float64 NumPy, and second moments that are none."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lora_diag
from lora_diag.errors import InputError, NothingComparedError, UsageError
from lora_diag.layers.metric import Root
from lora_diag.metrics.resolution import weighted_edge
from tests import oracles
from tests.conftest import ROOT, as_numpy, save_model, weights
from tests.diagnostics.residual.test_measure import lora
from tests.messages import raises_naming
from tests.probes.making import gpt2, moved, some_text, tensors

SAMPLES = ROOT / "sample_checkpoints"
UP = "model.layers.0.mlp.up_proj.weight"  # 16×12
PREFIX = "output_gradients."


def moments(n, seed, rank=None, scale=1.0):
    x = (
        np.random.default_rng(seed).standard_normal((rank or 4 * n, n))
        * np.linspace(0.1, 2, n)
        * scale
    )
    return x.T @ x / len(x)


def store(path, **matrices):
    save_file({name: torch.tensor(value).float() for name, value in matrices.items()}, path)
    return path


def as_stored(path):
    return {name: as_numpy(value) for name, value in load_file(path).items()}


def check(record, d, base, left, right):
    """Hold a record against NumPy's SVD of the product."""
    product = left @ d @ right
    s = np.linalg.svd(product, compute_uv=False)
    assert record.fro == pytest.approx(np.linalg.norm(product), rel=1e-6)
    assert record.base_fro == pytest.approx(np.linalg.norm(left @ base @ right), rel=1e-6)
    assert record.weights_fro == pytest.approx(np.linalg.norm(d), rel=1e-7)
    assert np.allclose(record.s, s[: len(record.s)], atol=1e-6 * s[0])
    assert np.all(s[len(record.s) :] <= 1e-9 * s[0])
    assert 0 < record.energy_error < 1e-4
    for rank, share in record.energy.items():
        assert abs(share - oracles.energy_at(s, int(rank))) <= record.energy_error + 1e-12
        assert record.tail[rank].fro == pytest.approx(
            np.sqrt((s[int(rank) :] ** 2).sum()), rel=1e-4, abs=1e-6 * s[0]
        )
    for share, rank in record.rank_at.items():
        assert rank == oracles.rank_at(s, float(share))
    assert record.effective_rank == pytest.approx(oracles.effective_rank(s), rel=1e-5)


@pytest.mark.parametrize("method", ["exact", "gram"])
def test_energies_equal_update_times_root_of_c(pair_of_models, tmp_path, method):
    base, tuned, before, after = pair_of_models
    c, g = moments(12, 3), moments(16, 4, scale=1e-3)
    file = store(tmp_path / "a.safetensors", **{UP: c, PREFIX + UP: g})
    stored = as_stored(file)
    d = as_numpy(after[UP] - before[UP])  # float32, as it is subtracted
    right, left = oracles.square_root(stored[UP]), oracles.square_root(stored[PREFIX + UP])
    options = {"activations": file, "ranks": (1, 3, 8), "svd": method, "layers": "mlp"}
    result = lora_diag.spectrum(base, tuned, **options)
    assert result[UP].metric == "data"
    check(result[UP], d, as_numpy(before[UP]), np.eye(16), right)
    both = lora_diag.spectrum(base, tuned, kfac=True, **options)
    assert both[UP].metric == "kfac"
    check(both[UP], d, as_numpy(before[UP]), left, right)
    assert [item.layer for item in result.left_out if item.reason == "no_activations"] == [
        item.layer for item in both.left_out if item.reason == "no_activations"
    ]
    assert {item.layer for item in result.left_out if item.reason == "no_activations"} == {
        name for name in before if "mlp" in name and name != UP
    }
    assert result.run.settings["metric"] == "data"
    assert both.run.settings["metric"] == "kfac"


@pytest.mark.parametrize("rank", [1, 5])
def test_adapter_metric_uses_factors(tmp_path, monkeypatch, rank):
    rng = np.random.default_rng(0)
    base = save_model(tmp_path / "base", weights(1))
    b, a = rng.standard_normal((16, rank)), rng.standard_normal((rank, 12))
    adapter = lora(tmp_path / "adapter", {UP: (b, a)}, target_modules=["up_proj"])
    file = store(tmp_path / "a.safetensors", **{UP: moments(12, 3)})
    b, a = (value.astype(np.float32).astype(np.float64) for value in (b, a))
    monkeypatch.setattr("lora_diag.layers.change.decompose", None)  # what is dense would need it
    record = lora_diag.spectrum(base, adapter, activations=file, ranks=(1, 3, 5))[UP]
    assert record.method == "factored"
    check(
        record,
        b @ a,
        as_numpy(weights(1)[UP]),
        np.eye(16),
        oracles.square_root(as_stored(file)[UP]),
    )
    assert record.resolution.verdict == "resolved"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_recorded_gradients_and_their_spectra_equal_autograd(tmp_path, kind):
    base = SAMPLES / "base" if kind == "llama" else gpt2(tmp_path / "base")
    tuned = SAMPLES / "full_ft" if kind == "llama" else moved(base, tmp_path / "tuned")
    file, text = tmp_path / "a.safetensors", some_text(tmp_path, windows=4)
    chosen = r"(layers|h)\.1\."
    message = lora_diag.probe_activations(
        tuned, text, file, output_gradients=True, length=32, batch=3, layers=chosen
    )
    assert message.gradients == "data"
    inputs, outputs = caught(tuned, text.read_bytes(), 32)
    stored = as_stored(file)
    names = {item.layer for item in message.layers}
    assert stored.keys() == names | {PREFIX + name for name in names}
    for name in names:
        g = outputs[name]
        assert (
            np.abs(stored[PREFIX + name] - g.T @ g / len(g)).max()
            <= 1e-4 * np.abs(g.T @ g / len(g)).max()
        )
    assert any("not a checkpoint" in note for note in lora_diag.inspect(file).notes)
    with raises_naming(UsageError, "activations"):
        lora_diag.spectrum(base, file)
    result = lora_diag.spectrum(base, tuned, activations=file, layers=chosen)
    both = lora_diag.spectrum(base, tuned, activations=file, kfac=True, layers=chosen)
    before, after = tensors(base), tensors(tuned)
    for name in names:
        d = after[name].astype(np.float32) - before[name].astype(np.float32)
        d = (d.T if kind == "gpt2" else d).astype(np.float64)
        x, g = inputs[name], outputs[name]
        assert result[name].fro ** 2 == pytest.approx(((x @ d.T) ** 2).sum(1).mean(), rel=1e-4)
        c, g = x.T @ x / len(x), g.T @ g / len(g)
        assert both[name].fro ** 2 == pytest.approx(np.trace(g @ d @ c @ d.T), rel=1e-4)


def caught(folder, content, length):
    """Inputs and output gradients of the linear layers, one row a token, one window at a time, by
    autograd.
    """
    import json

    import transformers

    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()
    inputs, outputs, held = {}, {}, {}
    for name, module in model.named_modules():
        if type(module).__name__ in {"Linear", "Conv1D"}:

            def hook(module, args, out, name=name):
                out.retain_grad()
                held[name + ".weight"] = (args[0], out)

            module.register_forward_hook(hook)
    for start in range(0, len(content) - length + 1, length):
        ids = torch.tensor([list(content[start : start + length])])
        out = model(input_ids=ids, labels=ids)
        (out.loss * (length - 1)).backward()  # the sum over the predictions
        for name, (x, y) in held.items():
            inputs.setdefault(name, []).append(x.detach()[0])
            outputs.setdefault(name, []).append(y.grad[0])
    return tuple(
        {k: torch.cat(v).double().numpy() for k, v in each.items()} for each in (inputs, outputs)
    )


def test_labels_drawn_from_model_repeat_with_seed(tmp_path):
    text, base = some_text(tmp_path), gpt2(tmp_path / "base")
    files = {}
    for name, more in {
        "data": {},
        "one": {"seed": 1},
        "again": {"seed": 1},
        "two": {"seed": 2},
    }.items():
        labels = "data" if name == "data" else "model"
        files[name] = tmp_path / f"{name}.safetensors"
        lora_diag.probe_activations(
            base, text, files[name], output_gradients=True, labels=labels, layers="c_fc", **more
        )
    key = PREFIX + "transformer.h.0.mlp.c_fc.weight"
    result = {name: as_stored(file)[key] for name, file in files.items()}
    assert np.array_equal(result["one"], result["again"])
    assert not np.allclose(result["one"], result["two"], rtol=1e-3)
    assert not np.allclose(result["one"], result["data"], rtol=1e-3)


@settings(max_examples=30, deadline=None)
@given(
    m=st.integers(1, 9),
    n=st.integers(1, 9),
    seen=st.integers(1, 12),
    rank=st.integers(0, 4),
    seed=st.integers(0, 999),
)
def test_truncated_product_is_nearest_in_output(m, n, seen, rank, seed):
    """Σ_{i>r}σ_i² of ΔW·C^½ is min E‖(ΔW − X)x‖² over rank r, C singular or not; U_rU_rᵀΔW reaches
    it.
    """
    from lora_diag.layers.change import Change
    from lora_diag.layers.metric import fro_of, times
    from lora_diag.linalg.distance import factor_moments

    rng = np.random.default_rng(seed)
    d, x = rng.standard_normal((m, n)), rng.standard_normal((seen, n))
    lower, negative = factor_moments(torch.tensor(x.T @ x / seen))
    assert negative < 1e-12
    weighted = times(Change(None, None, matrix=torch.tensor(d)), lower, on_rows=False)
    factors = weighted.decompose("exact", vectors=True)
    floor = float((factors.s[rank:] ** 2).sum())

    def loss(candidate):
        return (((d - candidate) @ x.T) ** 2).sum() / seen

    u = factors.u[:, :rank].numpy()
    assert loss(u @ u.T @ d) == pytest.approx(floor, rel=1e-6, abs=1e-9)
    assert fro_of(weighted) ** 2 == pytest.approx(loss(np.zeros_like(d)), rel=1e-9)
    for other in (
        oracles.best_approximation(d, rank),
        rng.standard_normal((m, rank)) @ rng.standard_normal((rank, n)),
        (u + 0.01 * rng.standard_normal(u.shape)) @ (u.T @ d),
    ):
        assert loss(other) >= floor - 1e-9


def test_rounding_in_data_metric_is_change_by_rounding(tmp_path):
    """Norm, bound and edge of the rounding error E·C^½, against the E of a fine-tune that was
    rounded to bf16.
    """
    rng = np.random.default_rng(0)
    w = (rng.standard_normal((200, 160)) * 0.02).astype(np.float32)
    trained = w + (rng.standard_normal(w.shape) * 3e-3).astype(np.float32)
    rounded = oracles.bf16(trained)
    layer = "layers.0.up_proj.weight"
    base = save_model(tmp_path / "base", {layer: torch.tensor(w)})
    tuned = save_model(tmp_path / "tuned", {layer: torch.tensor(rounded).bfloat16()})
    file = store(tmp_path / "a.safetensors", **{layer: moments(160, 1)})
    record = lora_diag.spectrum(base, tuned, activations=file)[layer]
    error = (rounded.astype(np.float64) - trained) @ oracles.square_root(as_stored(file)[layer])
    assert record.resolution.noise_fro == pytest.approx(np.linalg.norm(error), rel=0.1)
    assert np.linalg.norm(error) < record.resolution.rounding_fro
    assert np.linalg.svd(error, compute_uv=False)[0] < record.resolution.edge
    plain = lora_diag.spectrum(base, tuned).layers[0]
    spectral = np.sqrt(np.linalg.eigvalsh(as_stored(file)[layer])[-1])
    assert record.resolution.rounding_fro == pytest.approx(
        plain.resolution.rounding_fro * spectral, rel=1e-6
    )
    assert plain.resolution.noise_fro != pytest.approx(record.resolution.noise_fro, rel=0.1)


def test_bound_covers_bf16_storage_of_moments(pair_of_models, tmp_path):
    base, tuned, before, after = pair_of_models
    c, g = moments(12, 3), moments(16, 4)
    matrices = {UP: torch.tensor(c).bfloat16(), PREFIX + UP: torch.tensor(g).bfloat16()}
    save_file(matrices, tmp_path / "a.safetensors")
    d = as_numpy(after[UP] - before[UP])
    for kfac, left in ((False, np.eye(16)), (True, oracles.square_root(g))):
        record = lora_diag.spectrum(
            base,
            tuned,
            activations=tmp_path / "a.safetensors",
            ranks=(1, 3),
            layers="mlp",
            kfac=kfac,
        )[UP]
        s = np.linalg.svd(left @ d @ oracles.square_root(c), compute_uv=False)
        moved = max(
            abs(share - oracles.energy_at(s, int(rank))) for rank, share in record.energy.items()
        )
        assert 1e-6 < moved <= record.energy_error < 0.2


def test_float32_rounding_directions_are_not_inverted():
    lower = torch.diag(
        torch.tensor([2.0, 1e-3, 1e-4], dtype=torch.float64)
    )  # C's eigenvalues: 4, 1e-6 and 1e-8
    root = Root(lower, on_rows=False, error=0.0, fro=2.0, spectral=2.0)
    assert torch.allclose(
        root.inverse, torch.diag(torch.tensor([0.5, 1e3, 0.0], dtype=torch.float64))
    )
    assert Root(lower * 0, False, 0.0, 0.0, 0.0).inverse.eq(0).all()


def test_edge_of_weighted_noise_is_above_noise():
    rng = np.random.default_rng(0)
    right = rng.standard_normal((40, 40)) * np.linspace(0.1, 2, 40)
    tops = [np.linalg.norm(rng.standard_normal((60, 40)) @ right, 2) for _ in range(200)]
    edge = weighted_edge(
        (60**0.5, 1.0), (float(np.linalg.norm(right)), float(np.linalg.norm(right, 2)))
    )
    assert max(tops) < edge < 1.7 * np.median(tops)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: -c, "has negative eigenvalues"),
        (lambda c: c + np.triu(np.ones_like(c)), "not symmetric"),
        (lambda c: np.where(np.eye(12) > 0, np.nan, c), r"holds nan at \[0, 0\]"),
        (lambda c: c[:, :5], "not a square"),
        (lambda c: c[:5, :5], "no second moment for a compared weight"),
    ],
)
def test_invalid_second_moments_are_refused(pair_of_models, tmp_path, change, words):
    file = store(tmp_path / "a.safetensors", **{UP: np.ascontiguousarray(change(moments(12, 3)))})
    with pytest.raises(InputError, match=words):
        lora_diag.spectrum(*pair_of_models[:2], activations=file)


def test_invalid_options_are_refused(pair_of_models, tmp_path, loradiag):
    base, tuned, *_ = pair_of_models
    file = store(tmp_path / "a.safetensors", **{UP: moments(12, 3)})
    adapter = lora(
        tmp_path / "adapter", {UP: (np.ones((16, 1)), np.ones((1, 12)))}, target_modules=["up_proj"]
    )
    for words, options in (
        ("needs BASE", {"base": adapter, "activations": file}),
        ("needs activations", {"base": base, "tuned": tuned, "kfac": True}),
        (
            "has no output gradients",
            {"base": base, "tuned": tuned, "activations": file, "kfac": True},
        ),
        ("not to gradients", {"base": base, "activations": file, "gradients": [tmp_path]}),
    ):
        with pytest.raises(UsageError, match=words):
            lora_diag.spectrum(**options)
    with pytest.raises(UsageError, match="needs output_gradients"):
        lora_diag.probe_activations(base, file, tmp_path / "new", labels="model")
    with pytest.raises(NothingComparedError, match="none is compared"):
        lora_diag.spectrum(base, tuned, activations=file, layers="norm")


def test_update_outside_data_has_no_energy(tmp_path):
    before = weights(1)
    after = {name: value.clone() for name, value in before.items()}
    after[UP][:, 3] += 1.0
    base, tuned = save_model(tmp_path / "base", before), save_model(tmp_path / "tuned", after)
    x = np.ones(12)
    x[3] = 0
    file = store(tmp_path / "a.safetensors", **{UP: np.diag(x)})
    record = lora_diag.spectrum(base, tuned, activations=file, layers="layers.0.mlp.up")[UP]
    assert record.fro == 0
    assert record.weights_fro == pytest.approx(4.0)
    assert set(record.energy.values()) == {None}
