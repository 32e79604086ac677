"""Adapters that are measured with NumPy alone, against torch's way to the same record."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_diag
from lora_diag.diagnostics.spectrum import run
from lora_diag.diagnostics.spectrum.measure import spectrum as with_torch
from lora_diag.diagnostics.spectrum.values import (
    SpectrumSettings,
    WeightedLayer,
    is_thin,
    thin_spectrum,
)
from lora_diag.running.inputs import compare
from tests.adapters.making import adapter, normal, write
from tests.messages import raises_naming
from tests.served import ROOT

LORA = {
    "a.lora_A.weight": normal(2, 130),
    "a.lora_B.weight": normal(90, 2, seed=1),
    "b.lora_A.weight": normal(2, 600, seed=2),
    "b.lora_B.weight": normal(40, 2, seed=3),
}
TABLE = {"t.lora_embedding_A": normal(2, 50), "t.lora_embedding_B": normal(30, 2, seed=1)}
CONVOLUTION = {"c.lora_A.weight": normal(2, 5, 3, 3), "c.lora_B.weight": normal(7, 2, 1, 1, seed=1)}
KOHYA = {
    "lora_unet_a.lora_down.weight": normal(2, 20),
    "lora_unet_a.lora_up.weight": normal(30, 2, seed=1),
    "lora_unet_a.alpha": np.array(3.0),
}
MLX = {"model.layers.0.a.lora_a": normal(20, 2), "model.layers.0.a.lora_b": normal(2, 30, seed=1)}


def mlx(folder, tensors):
    write(folder / "adapters.safetensors", tensors)
    settings = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 20.0}}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def both(path):
    """Return for every layer the record of NumPy and that of torch."""
    layers = [WeightedLayer(delta) for delta in compare(path, None).pairing.deltas]
    settings = SpectrumSettings(ranks=(1, 2, 4))
    assert all(is_thin(layer, settings) for layer in layers)
    return [(thin_spectrum(layer, settings), with_torch(layer.delta, settings)) for layer in layers]


@pytest.mark.parametrize(
    "make",
    [
        lambda path: adapter(path, LORA),
        lambda path: adapter(path, LORA, use_rslora=True, lora_alpha=-5),
        lambda path: adapter(path, TABLE),
        lambda path: adapter(path, CONVOLUTION),
        lambda path: write(path / "k.safetensors", KOHYA),
        lambda path: mlx(path, MLX),
        lambda path: ROOT / "sample_checkpoints" / "lora_r16",
    ],
)
def test_thin_record_equals_torch_record(tmp_path, make):
    for thin, dense in both(make(tmp_path)):
        one, other = thin.model_dump(), dense.model_dump()
        assert thin.s == pytest.approx(dense.s, rel=1e-8)
        for rank, share in thin.energy.items():
            assert abs(share - dense.energy[rank]) <= thin.energy_error + dense.energy_error
        for name in (
            "layer",
            "shape",
            "dtypes",
            "base_fro",
            "complete",
            "method",
            "rank_at",
            "blocks",
        ):
            assert one[name] == other[name]
        for name in ("fro", "stable_rank", "effective_rank"):
            assert one[name] == pytest.approx(other[name], rel=1e-8)
        assert thin.resolution == dense.resolution
        assert 0 < thin.energy_error <= dense.energy_error + 1e-12


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
)
def test_stored_numbers_are_measured_exactly(tmp_path, dtype):
    path = adapter(tmp_path, LORA)
    file = path / "adapter_model.safetensors"
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    for record in lora_diag.spectrum(path):
        a, b = (
            tensors[f"base_model.model.{record.layer.removesuffix('.weight')}.lora_{side}.weight"]
            .double()
            .numpy()
            for side in "AB"
        )
        due = np.linalg.svd(1.5 * b @ a, compute_uv=False)[:2]
        assert record.s == pytest.approx(due, rel=1e-8)
        assert record.dtypes == (None, dtype)


def test_bytes_are_independent_of_concurrent_layers(tmp_path, monkeypatch):
    """A layer's record depends on the layer: not on workers, on other layers, or on torch being
    imported.
    """
    path = adapter(tmp_path, LORA)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    for number, workers in enumerate((None, 1, 3)):
        lora_diag.spectrum(path, workers=workers, output=tmp_path / f"{number}.jsonl")
    files = [(tmp_path / f"{number}.jsonl").read_bytes() for number in range(3)]
    assert files[0] == files[1] == files[2]
    alone = lora_diag.spectrum(path, layers="b")
    assert list(alone) == [
        record for record in lora_diag.spectrum(path) if record.layer == "b.weight"
    ]


@pytest.mark.parametrize(
    ("value", "words"),
    [("nan", "lora_B holds nan at [3, 1]"), ("-inf", "lora_B holds -inf at [3, 1]")],
)
def test_non_finite_layer_is_left_out(tmp_path, value, words):
    tensors = {name: values.copy() for name, values in LORA.items()}
    tensors["a.lora_B.weight"][3, 1] = float(value)
    results = lora_diag.spectrum(adapter(tmp_path, tensors))
    assert [(item.layer, item.reason, item.detail) for item in results.left_out] == [
        ("a.weight", "non_finite", words)
    ]
    assert [record.layer for record in results] == ["b.weight"]


def test_overflowing_product_is_left_out(tmp_path):
    path = adapter(tmp_path, LORA)
    file = path / "adapter_model.safetensors"
    save_file({name: tensor.double() * 1e160 for name, tensor in load_file(file).items()}, file)
    results = lora_diag.spectrum(path)
    assert {item.reason for item in results.left_out} == {"non_finite"}
    assert not results.layers


def test_file_shrunk_during_read_is_named(tmp_path, monkeypatch):
    path = adapter(tmp_path, LORA)
    file = path / "adapter_model.safetensors"
    measure = run.thin_spectrum

    def cut(layer, settings):
        file.write_bytes(file.read_bytes()[:600])
        return measure(layer, settings)

    monkeypatch.setattr(run, "thin_spectrum", cut)
    with raises_naming(lora_diag.InputError, "ends inside base_model"):
        lora_diag.spectrum(path)
