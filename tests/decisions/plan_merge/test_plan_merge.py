"""``plan-merge`` against value tables and float64 NumPy, written from the definitions of the
formats.
"""

import json
import math
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import lora_diag
from lora_diag.decisions.plan_merge import measure as measuring
from lora_diag.decisions.plan_merge.measure import (
    GROUPS,
    PlanSettings,
    StorageTarget,
    StorageTask,
    quantize,
)
from lora_diag.decisions.plan_merge.record import (
    FormatEffect,
    PlannedMerge,
    conclude,
    conclude_together,
    is_no_worse_than_unmerged,
)
from lora_diag.deltas import FactoredDelta, Side
from lora_diag.errors import UsageError
from lora_diag.storage import open_checkpoint
from tests.adapters.making import lora
from tests.building import build
from tests.conftest import ROOT, save_model

SAMPLES = ROOT / "sample_checkpoints"
BASE, R4 = SAMPLES / "base", SAMPLES / "lora_r4"
Q = "model.layers.0.self_attn.q_proj.weight"
TARGETS = [
    *(
        StorageTarget(name, GROUPS.get(name, 0))
        for name in ("bf16", "fp16", "fp8", "mxfp4", "nvfp4")
    ),
    StorageTarget("fp8", 0, per_tensor=True),
    StorageTarget("int4", 32),
    *(StorageTarget(name, 32) for name in GROUPS if name.startswith("q")),
]


def table(exponent_bits, mantissa, largest):
    """Return the non-negative values of a float format in the order of their codes; infinity
    follows the largest.
    """
    bias, values = 2 ** (exponent_bits - 1) - 1, []
    for code in range(2 ** (exponent_bits + mantissa)):
        e, m = code >> mantissa, (code % 2**mantissa) / 2**mantissa
        values.append(m * 2.0 ** (1 - bias) if e == 0 else (1 + m) * 2.0 ** (e - bias))
    return np.array([v for v in values if v <= largest])


BF16, FP16 = table(8, 7, 3.4e38), table(5, 10, 65504)
E4M3, E2M1 = table(4, 3, 448), table(2, 1, 6)


def nearest(x, values, overflow=None):
    """Round to the nearest value, ties to the even code; beyond the largest saturate, or overflow
    from there on.
    """
    size = np.abs(x)
    above = np.clip(np.searchsorted(values, size), 1, len(values) - 1)
    low, high = size - values[above - 1], values[above] - size
    code = np.where((high < low) | ((high == low) & (above % 2 == 0)), above, above - 1)
    result = np.where(size >= values[-1], values[-1], values[code])
    if overflow is not None:
        result = np.where(size >= overflow, np.inf, result)
    return np.copysign(result, x)


def oracle(x, target):
    """Return codes and values of a float32 matrix, entry by entry and group by group."""
    f32 = np.float32
    x = x.astype(f32)
    if target.name == "bf16":
        return (nearest(x.astype(float), BF16),) * 2
    if target.name == "fp16":
        return (nearest(x.astype(float), FP16, overflow=65520),) * 2
    codes, values = np.zeros(x.shape), np.zeros(x.shape)
    peak = np.abs(x).max()
    for i, row in enumerate(x):
        size = target.group or len(row)
        for at in range(0, len(row), size):
            part = row[at : at + size]
            top = np.abs(part).max()
            if top == 0:
                continue
            if target.name == "fp8":
                s = f32((peak if target.per_tensor else top) / f32(448))
                code = nearest((part / s).astype(float), E4M3)
            elif target.name == "mxfp4":
                s = 2.0 ** min(127, max(-127, math.floor(math.log2(top)) - 2))
                code = nearest(part / s, E2M1)
            elif target.name == "nvfp4":
                g = f32(peak / f32(2688))
                s = float(nearest(np.array(float(f32(top / f32(f32(6) * g)))), E4M3)) * float(g)
                code = nearest(part / s, E2M1) if s else np.zeros(len(part))
            elif target.name == "int4":
                s = f32(top / f32(7))
                code = np.clip(np.round(part.astype(float) / float(s)), -7, 7)
            else:
                code, numbers = oracle_gguf(np.pad(part, (0, size - len(part))), target.name)
                codes[i, at : at + size], values[i, at : at + size] = (
                    code[: len(part)],
                    numbers[: len(part)],
                )
                continue
            codes[i, at : at + size], values[i, at : at + size] = code, code * float(s)
    return codes, values


def oracle_gguf(part, name):
    """Return codes and values of a block of llama.cpp: b bits, a scale in fp16, and in the types _1
    a minimum.
    """
    f32, half, bits = np.float32, lambda number: float(np.float16(number)), int(name[1])
    if name == "q8_0":
        s = np.abs(part).max() / f32(127)
        r = part * (f32(1) / s)
        code = np.array([int(abs(x) + 0.5) * (1 if x > 0 else -1) for x in r.astype(float)])
        return code, code * half(s)
    if name.endswith("_0"):
        s = part[np.abs(part).argmax()] / f32(-(2 ** (bits - 1)))
        r = part * (f32(1) / s) + f32(2 ** (bits - 1) + 0.5)
        code = np.array([min(int(x), 2**bits - 1) - 2 ** (bits - 1) for x in r])
        return code, code * half(s)
    s = (part.max() - part.min()) / f32(2**bits - 1)
    code = np.array(
        [int(x) for x in (part - part.min()) * (f32(1) / s if s else f32(0)) + f32(0.5)]
    )
    return code, code * half(s) + half(part.min())


def difficult():
    """Return a matrix with ties, zeros, a group of zeros, tiny and large numbers, and shorter last
    groups.
    """
    x = np.random.default_rng(1).standard_normal((4, 72)) * 3
    x[0, :14] = [
        6,
        0.25,
        0.75,
        1.25,
        -1.75,
        2.5,
        -3.5,
        5,
        0,
        -0.0,
        1 + 2**-8,
        1 + 3 * 2**-8,
        1 + 2**-11,
        7.9,
    ]
    x[1, :32], x[2] = 0, x[2] * 1e-6
    x[3, :10] = [7, 0.5, 1.5, -2.5, 3.5, 240, 224.0, 232, 2**-7, 3 * 2**-11]
    x[3, 64:] = np.ldexp(1.0, -30)
    return x.astype(np.float32)


def peaks(x, target):
    rows = np.abs(x).max(1, keepdims=True)
    return torch.tensor(
        np.full_like(rows, rows.max()) if target.per_tensor or target.name == "nvfp4" else rows
    )


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_quantize_rounds_as_the_format_is_defined(target):
    x = difficult()
    codes, values = quantize(torch.tensor(x), target, peaks(x, target))
    expected = oracle(x, target)
    np.testing.assert_array_equal(codes.numpy(), expected[0])
    np.testing.assert_array_equal(values.numpy(), expected[1])
    repeated = quantize(values.float(), target, peaks(values.float().numpy(), target))[1].numpy()
    np.testing.assert_allclose(
        repeated, expected[1], rtol=1e-6
    )  # what a format holds already is not rounded


@pytest.mark.parametrize("name", [name for name in GROUPS if name.startswith("q")])
def test_quantize_agrees_with_the_gguf_package(name):
    quants = pytest.importorskip("gguf.quants")
    x = np.random.default_rng(6).standard_normal((64, 96)).astype(np.float32)
    x[0], x[1, :32], x[2], x[3] = 0, 1, np.round(4 * x[2]), 1e-9 * x[3]
    x[4], x[5] = 1e-38 * x[4], 1e-42 * x[5]  # the inverse of the scale is infinite
    kind = getattr(quants.GGMLQuantizationType, name.upper())
    with np.errstate(over="ignore", invalid="ignore"), warnings.catch_warnings(action="ignore"):
        expected = quants.dequantize(quants.quantize(x, kind), kind)
    np.testing.assert_array_equal(
        quantize(torch.tensor(x), StorageTarget(name, 32))[1].float().numpy(), expected
    )


def test_fp16_overflows_and_zeros_stay_zero():
    x = torch.tensor([[65519.0, 65520.0, -7e4]])
    assert quantize(x, StorageTarget("fp16"))[1].tolist() == [[65504.0, math.inf, -math.inf]]
    for target in TARGETS:
        assert not quantize(torch.zeros(2, 5), target, torch.zeros(2, 1))[1].any()


def write(folder, w, b, a):
    """Write BASE and an adapter of scale 1 on it."""
    save_model(folder / "base", {Q: w})
    (folder / "base" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    lora(folder / "adapter", {Q: (b, a)})
    return folder / "base", folder / "adapter"


def options(target):
    given = {"group_size": target.group} if target.name == "int4" else {}
    return {"to": target.name, **given, **({"fp8_scale": "tensor"} if target.per_tensor else {})}


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_record_follows_from_the_definitions(target, tmp_path, monkeypatch):
    """In row blocks of seven rows; A has two equal rows, so that its row space is a plane."""
    monkeypatch.setattr(measuring, "BLOCK_ENTRIES", 7 * 72)
    rng = np.random.default_rng(2)
    w, b, a = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((16, 72), (16, 3), (3, 72))
    )
    a[2] = a[1]
    w[3, :40] = 0
    base, adapter = write(tmp_path, *map(torch.tensor, (w, b * 0.1, a)))
    (record,) = lora_diag.plan_merge(base, adapter, **options(target))
    w, u = w.astype(float), (b * np.float32(0.1)).astype(float) @ a.astype(float)
    before, after = oracle(w, target), oracle(w + u, target)
    fro, norm = np.linalg.norm(u), np.linalg.norm
    assert (record.layer, record.shape, record.to, record.overflow) == (Q, (16, 72), target.name, 0)
    assert record.fro == pytest.approx(fro)
    assert record.base_fro == pytest.approx(norm(w))
    assert record.arrived == pytest.approx(((after[1] - w) * u).sum() / fro**2, rel=1e-9)
    assert record.error == pytest.approx(norm(after[1] - w - u) / fro, rel=1e-9)
    assert record.moved == np.mean(before[0] != after[0])
    assert record.base_error == pytest.approx(norm(before[1] - w) / fro, rel=1e-9)
    plane = np.linalg.qr(a[:2].T.astype(float))[0]
    assert record.base_error_inside == pytest.approx(norm((before[1] - w) @ plane) / fro, rel=1e-7)
    for result, name in ((record.bf16, "bf16"), (record.fp16, "fp16")):
        stored = oracle(w + u, StorageTarget(name))[1]
        assert result.error == pytest.approx(norm(stored - w - u) / fro, rel=1e-9)
        assert result.arrived == pytest.approx(((stored - w) * u).sum() / fro**2, rel=1e-9)
    assert record.base_noise is None


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_update_on_the_grid_arrives_in_full(target, tmp_path):
    top, unit = {"fp8": (448, 1), "nvfp4": (2688, 448)}.get(target.name, (6, 1))
    top = {"int4": 7, "q8_0": 127, "q5_0": 16, "q4_0": 8, "q5_1": 16, "q4_1": 8}.get(
        target.name, top
    )
    w, a = torch.zeros(8, 64), torch.tensor([[0.0, 0, 2, 3, 0, -1, -2, 1] * 8]) * unit
    w[:, ::16], w[:, 1::16], a[:, ::16] = top, 1 - top if target.name.endswith("_1") else 0, 0
    base, adapter = write(tmp_path, w, torch.tensor([[1.0], [0]] * 4), a)
    (record,) = lora_diag.plan_merge(base, adapter, **options(target))
    assert (record.arrived, record.error, record.base_error, record.conclusion) == (
        1.0,
        0.0,
        0.0,
        "merge",
    )
    assert record.moved == float((a != 0).float().mean()) / 2


def mxfp4(folder):
    """Write one expert of 4 outputs and 64 inputs in MXFP4, as gpt-oss; return its decoded weight
    ``(in, out)``.
    """
    rng = np.random.default_rng(3)
    codes, scales = rng.integers(0, 16, (1, 4, 2, 32)), rng.integers(118, 124, (1, 4, 2))
    packed = (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8)
    name = "model.layers.0.mlp.experts.down_proj"
    tensors = {
        f"{name}_blocks": torch.tensor(packed),
        f"{name}_scales": torch.tensor(scales.astype(np.uint8)),
    }
    save_model(folder, tensors)
    config = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(config))
    signed = np.array([*E2M1, *-E2M1])[codes] * 2.0 ** (scales[..., None] - 127.0)
    return name, signed.reshape(4, 64).T


def test_quantized_base_loses_small_update(tmp_path):
    """Stored ``(in, out)``: groups run along the rows.

    Updates below half a step are lost where W is on the grid.
    """
    name, w = mxfp4(tmp_path / "base")
    a, b = np.ones((1, 4)), np.ones((64, 1)) * 1e-4
    base = open_checkpoint(tmp_path / "base")
    factors = torch.tensor(b), torch.tensor(a)
    delta = FactoredDelta(
        f"{name}[0]", (64, 4), lambda: factors, ("float32", "float32"), Side(base, name)
    )
    (record,) = measuring.measure(
        StorageTask(delta, in_out=True), PlanSettings(StorageTarget("mxfp4", 32))
    )
    fro = np.linalg.norm(b @ a)
    assert record.base_error == record.base_error_inside == record.moved == record.arrived == 0.0
    assert (record.error, record.conclusion) == (pytest.approx(1.0), "serve unmerged")
    steps = base.read_steps(name).double().numpy()
    assert record.base_noise == pytest.approx(np.sqrt((steps**2).sum() / 12) / fro)
    target = StorageTarget("int4", 32)
    (record,) = measuring.measure(StorageTask(delta, in_out=True), PlanSettings(target))
    off = oracle(w.T, target)[1].T - w
    assert record.base_error == pytest.approx(np.linalg.norm(off) / fro)
    inside = np.linalg.norm(b.T @ off) / np.linalg.norm(
        b
    )  # the input space is spanned by the columns of B
    assert record.base_error_inside == pytest.approx(inside / fro)


@pytest.mark.parametrize("lines", [7, 40])
def test_rows_that_are_inputs_are_grouped_as_inputs(lines, tmp_path, monkeypatch):
    """A weight stored ``(in, out)`` gives the numbers of the same weight stored ``(out, in)``."""
    monkeypatch.setattr(measuring, "BLOCK_ENTRIES", lines * 6)
    rng = torch.Generator().manual_seed(4)
    w, b, a = (torch.randn(*shape, generator=rng) for shape in ((6, 100), (6, 2), (2, 100)))
    save_model(tmp_path, {"a": w, "t": w.T})
    file = open_checkpoint(tmp_path)
    plain = FactoredDelta("w", (6, 100), lambda: (b, a), ("float32",) * 2, Side(file, "a"))
    turned = FactoredDelta("w", (100, 6), lambda: (a.T, b.T), ("float32",) * 2, Side(file, "t"))
    for target in TARGETS:
        (one,) = measuring.measure(StorageTask(plain), PlanSettings(target))
        (other,) = measuring.measure(StorageTask(turned, in_out=True), PlanSettings(target))
        for field in ("fro", "arrived", "error", "moved", "base_error", "base_error_inside"):
            assert getattr(other, field) == pytest.approx(getattr(one, field), rel=1e-9), (
                target,
                field,
            )


GOOD, BAD = FormatEffect(arrived=1.0, error=0.1), FormatEffect(arrived=0.5, error=0.9)
NONE = FormatEffect(arrived=None, error=None)


@pytest.mark.parametrize(
    ("to", "target", "sixteen", "base_error", "expected"),
    [
        ("mxfp4", GOOD, (BAD, BAD), 9.0, "merge"),
        ("mxfp4", BAD, (GOOD, BAD), 9.0, "merge into 16 bit"),
        ("mxfp4", BAD, (GOOD, GOOD), 0.0, "serve unmerged"),
        ("mxfp4", BAD, (BAD, NONE), 9.0, "serve unmerged"),
        ("bf16", BAD, (BAD, GOOD), 0.0, "merge into 16 bit"),
        ("fp16", NONE, (BAD, NONE), None, "serve unmerged"),
        ("bf16", FormatEffect(arrived=1.11, error=0.1), (BAD, BAD), 0.0, "serve unmerged"),
        ("bf16", FormatEffect(arrived=1.0, error=0.51), (BAD, BAD), 0.0, "serve unmerged"),
    ],
)
def test_conclude_follows_the_rules(to, target, sixteen, base_error, expected):
    assert conclude(to, target, sixteen, base_error) == expected


@pytest.mark.parametrize(
    ("arrived", "error", "base_error", "expected"),
    [
        (1.0, 9.0, 9.0, True),
        (1.0, 9.04, 9.0, True),  # 0.9% more energy
        (1.0, 9.06, 9.0, False),  # 1.3% and 1.08
        (1.0, 0.49, 0.0, True),
        (1.0, 0.51, 0.0, False),
        (
            1.0,
            0.6,
            0.45,
            False,
        ),  # the conclusion is that BASE in this format and the adapter lose nothing
        (1.0, 0.6, 0.55, True),
        (0.89, 9.0, 9.0, False),
        (None, None, 9.0, False),
        (1.0, 9.0, None, False),
    ],
)
def test_merge_is_compared_with_the_rounded_base(arrived, error, base_error, expected):
    assert (
        is_no_worse_than_unmerged(FormatEffect(arrived=arrived, error=error), base_error)
        is expected
    )


def test_conclusion_of_several_layers_weighs_them_by_energy():
    def layer(fro, found):
        fields = {
            "arrived": found.arrived,
            "error": found.error,
            "bf16": found,
            "fp16": found,
            "base_error": 9.0,
        }
        return build(PlannedMerge, to="int4", fro=fro, **fields)

    assert conclude_together([layer(1.0, GOOD), layer(0.1, BAD), layer(0.0, NONE)]) == "merge"
    assert conclude_together([layer(0.1, GOOD), layer(1.0, BAD)]) == "serve unmerged"
    assert (
        conclude_together([layer(1.0, GOOD), layer(1e-3, NONE)]) == "serve unmerged"
    )  # one overflows
    assert conclude_together([layer(0.0, NONE)]) is None


@pytest.mark.slow
def test_command_measures_the_samples(loradiag, tmp_path):
    for to in ("bf16", "mxfp4"):
        ran = loradiag(
            "plan-merge", BASE, R4, "--to", to, "--layers", "[03].*[qu]p?_proj", "-o", f"{to}.jsonl"
        )
        assert ran.code == 0, ran.err
    result = {to: lora_diag.read_results(tmp_path / f"{to}.jsonl") for to in ("bf16", "mxfp4")}
    assert len(result["bf16"]) == len(result["mxfp4"]) == 4
    for fine, coarse in zip(result["bf16"], result["mxfp4"], strict=True):
        assert fine.error < 0.01 < coarse.error
        assert fine.bf16 == coarse.bf16 == FormatEffect(arrived=fine.arrived, error=fine.error)
    compared = lora_diag.spectrum(BASE, R4, layers=r"0\..*q_proj")
    assert result["bf16"][Q].fro == pytest.approx(compared[Q].fro)
    (tmp_path / "p.toml").write_text(
        '[[rule]]\nname = "kept"\nrequire = "plan_merge.error <= 0.1"\n'
    )
    assert loradiag("gate", "p.toml", "mxfp4.jsonl").code == 1


def test_command_refuses_bad_input(loradiag, tmp_path):
    unknown = loradiag("plan-merge", BASE, R4, "--to", "fp3")
    assert (unknown.code, "fp3" in unknown.err, "nvfp4" in unknown.err) == (2, True, True)
    assert loradiag("plan-merge", BASE, R4).code == 2
    for swapped in ((R4, BASE), (BASE, BASE)):
        refused = loradiag("plan-merge", *swapped, "--to", "bf16")
        assert refused.code == 2
        assert "adapter" in refused.err
    lora(tmp_path / "other", {Q: (torch.ones(5, 1), torch.ones(1, 7))})
    ran = loradiag("plan-merge", BASE, "other", "--to", "bf16", "-o", "x.jsonl")
    assert ran.code == 3
    assert "q_proj" in ran.err
    assert not (tmp_path / "x.jsonl").exists()
    with pytest.raises(UsageError, match="group_size"):
        lora_diag.plan_merge(BASE, R4, to="fp8", group_size=32)
    with pytest.raises(UsageError, match="scale"):
        lora_diag.plan_merge(BASE, R4, to="int4", fp8_scale="row")


def test_overflow_and_non_finite_entries_are_reported(tmp_path):
    w, b, a = torch.full((3, 4), 65000.0), torch.full((3, 1), 1000.0), torch.ones(1, 4)
    b[0] = 0
    base, adapter = write(tmp_path, w, b, a)
    (record,) = lora_diag.plan_merge(base, adapter, to="fp16")
    assert (record.overflow, record.arrived, record.error) == (8, None, None)
    assert record.base_error == pytest.approx(
        8 * math.sqrt(12) / (1000 * math.sqrt(8))
    )  # 65000 rounds to 64992
    assert record.conclusion == "merge into 16 bit"
    w[1, 2] = math.nan
    save_model(base, {Q: w})
    result = lora_diag.plan_merge(base, adapter, to="bf16")
    assert not len(result)
    assert [item.reason for item in result.left_out] == ["non_finite"]
    assert "[1, 2]" in result.left_out[0].detail


def test_full_tensors_of_an_adapter_are_rounded_too(tmp_path):
    """A dense update is W_tuned − W_base, and has no input space."""
    w = torch.randn(4, 6, generator=torch.Generator().manual_seed(5))
    base, adapter = write(tmp_path, w, torch.ones(4, 1), torch.ones(1, 6))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(config | {"modules_to_save": ["lm_head"]})
    )
    save_model(base, {Q: w, "lm_head.weight": w.clone()})
    name = f"base_model.model.{Q.removesuffix('.weight')}"
    tensors = {f"{name}.lora_B.weight": torch.ones(4, 1), f"{name}.lora_A.weight": torch.ones(1, 6)}
    save_file(
        tensors | {"base_model.model.lm_head.weight": w * 2}, adapter / "adapter_model.safetensors"
    )
    record = lora_diag.plan_merge(base, adapter, to="bf16")["lm_head.weight"]
    stored = oracle((2 * w).numpy(), StorageTarget("bf16"))[1] - w.double().numpy()
    assert record.error == pytest.approx(
        np.linalg.norm(stored - w.double().numpy()) / float(w.double().norm())
    )
    assert record.base_error_inside is None
