"""The rounding floor against its definition, and its bound against rounding itself."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_diag.layers.resolution import noise_of
from lora_diag.linalg.difference import difference
from lora_diag.linalg.rounding import (
    LAYOUT,
    Energies,
    Spacing,
    find_steps,
    is_dequantized,
    write_spacings,
)
from lora_diag.metrics.resolution import signal_rank, verdict
from tests.conftest import as_numpy
from tests.standin import GPU, StandIn

CPU = torch.device("cpu")
SHORT = [torch.bfloat16, torch.float16]


def ulp(value: float, dtype: torch.dtype) -> float:
    """The distance to the next larger stored magnitude, found by stepping the bits."""
    integer = LAYOUT[dtype][0]
    stored = torch.tensor([abs(value)], dtype=dtype)
    after = (stored.view(integer) + 1).view(dtype)
    return float(after.double() - stored.double())


def of(values: torch.Tensor) -> torch.Tensor:
    """The spacing of every entry, float64."""
    out = torch.empty_like(
        values, dtype=torch.float64 if values.dtype == torch.float64 else torch.float32
    )
    mantissa = write_spacings(values, out)
    return out.double() * 2.0**-mantissa


@pytest.mark.parametrize("dtype", LAYOUT, ids=str)
@settings(max_examples=80, deadline=None)
@given(value=st.floats(-60000, 60000))
def test_spacing_is_distance_to_next_number(dtype, value):
    stored = torch.tensor([value], dtype=dtype)
    long = torch.tensor([1 / 3, 1 / 7, 1 / 11], dtype=torch.float64).to(
        dtype
    )  # so that most fit no shorter dtype
    expected = ulp(float(stored.double()), dtype)
    assert float(of(torch.cat([stored, long]))[0]) == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", SHORT, ids=str)
@settings(max_examples=30, deadline=None)
@given(scale=st.floats(1e-4, 10), seed=st.integers(0, 1000))
def test_bound_holds_for_real_rounding_of_both_sides(dtype, scale, seed):
    rng = torch.Generator().manual_seed(seed)
    base = torch.randn(20, 30, generator=rng, dtype=torch.float64) * 0.02
    tuned = base + torch.randn(20, 30, generator=rng, dtype=torch.float64) * 1e-4 * scale
    stored = base.to(dtype), tuned.to(dtype)
    result = difference([stored], (20, 30), CPU)
    error = np.linalg.norm((as_numpy(stored[1]) - as_numpy(stored[0])) - (tuned - base).numpy())
    assert error <= result.rounding.bound
    by_definition = sum(
        math.sqrt(sum((ulp(float(w), dtype) / 2) ** 2 for w in side.reshape(-1))) for side in stored
    )
    assert result.rounding.bound == pytest.approx(by_definition, rel=3e-6)


def test_finer_tuned_dtype_makes_base_exact():
    base = torch.randn(20, 30).bfloat16()
    tuned = base.float() + torch.randn(20, 30) * 1e-5
    result = difference([(base, tuned)], (20, 30), CPU)
    assert result.mantissa == (7, 23)
    assert result.rounding.bound < 1e-6 * result.base_fro
    coarse = difference([(base, tuned.bfloat16())], (20, 30), CPU)
    assert coarse.rounding.bound > 1e-3 * result.base_fro


STORED = [
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float64),
    (torch.bfloat16, torch.float16),
    (torch.float16, torch.float32),
    (torch.float32, torch.float64),
]


@pytest.mark.parametrize(("short", "long"), STORED, ids=str)
def test_short_numbers_in_long_file_are_recognised(short, long):
    values = torch.randn(40, 50, dtype=torch.float64).to(short)
    one, two, three = (Spacing.of((40, 50)) for _ in range(3))
    one.add(values)
    two.add(values.to(long))
    assert two.squares == pytest.approx(one.squares, rel=1e-6)
    assert two.mantissa == one.mantissa
    edited = values.to(long)
    edited[0, 0] = 1 / 3  # one entry that was not rounded changes nothing about the others
    three.add(edited)
    assert three.squares == pytest.approx(one.squares, rel=0.02)
    assert three.mantissa == one.mantissa


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_full_precision_values_are_unchanged(dtype):
    values = torch.randn(40, 50, dtype=torch.float64).to(dtype)
    out = torch.empty(40, 50, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    assert write_spacings(values, out) == LAYOUT[dtype][2]


def test_one_column_does_not_decide():
    values = torch.randn(256, 4096).bfloat16().float()
    values[:, 0] = torch.rand(256)
    result = of(values)
    assert torch.equal(result[:, 1:], of(values[:, 1:].bfloat16()))
    assert float((result[:, 0] / values[:, 0]).max()) < 2.0**-22


def test_quantized_side_uses_step_of_its_format():
    base, tuned = torch.randn(6, 5), torch.randn(6, 5)
    step = torch.rand(6, 5)
    halves = [(base[:3], tuned[:3]), (base[3:], tuned[3:])]
    steps = [(step[:3].reshape(-1), None), (step[3:].reshape(-1), None)]
    result = difference(halves, (6, 5), CPU, steps=steps)
    plain = difference(halves, (6, 5), CPU)
    expected = np.linalg.norm(as_numpy(step)) / 2
    assert result.rounding.bound == pytest.approx(expected, rel=1e-4)
    assert result.rounding.bound > 1000 * plain.rounding.bound
    assert result.mantissa == (0, 23)
    assert torch.equal(result.matrix, plain.matrix)


def noise(found):
    return noise_of(found.rounding.noise, found.rounding.sides)


def planted(rank: int, rms: float, n: int = 512):
    """A planted update to bf16 weights: what the files hold, and what was true."""
    rng = np.random.default_rng(0)
    base = torch.from_numpy(rng.standard_normal((n, n)) * 0.02).bfloat16()
    delta = rng.standard_normal((n, rank)) @ rng.standard_normal((rank, n))
    delta *= rms * n / np.linalg.norm(delta)
    return base, (base.double() + torch.from_numpy(delta)).bfloat16(), delta


@pytest.mark.parametrize(
    ("rms", "expected"),
    [
        (1e-2, "resolved"),
        (1e-3, "resolved"),
        (3e-4, "floor-limited"),
        (1e-4, "floor-limited"),
        (3e-5, "unresolved"),
        (1e-5, "unresolved"),
    ],
)
def test_verdicts_on_planted_updates(rms, expected):
    base, tuned, delta = planted(8, rms)
    result = difference([(base, tuned)], base.shape, CPU)
    s = np.linalg.svd(as_numpy(tuned) - as_numpy(base), compute_uv=False)
    signal = signal_rank(s, noise(result).edge, complete=True)
    noise_fro = noise(result).fro
    assert verdict(noise_fro, result.fro, signal) == expected
    if rms >= 3e-5:
        assert signal == 8
    error = np.linalg.norm(as_numpy(tuned) - as_numpy(base) - delta)
    assert error <= result.rounding.bound
    if rms >= 3e-4:  # few entries unchanged: the error is noise, and one side of two was rounded
        assert noise_fro / math.sqrt(2) == pytest.approx(error, rel=0.05)


def test_full_rank_float32_update_stays_resolved():
    rng = np.random.default_rng(0)
    base = torch.from_numpy(rng.standard_normal((100, 80)).astype(np.float32))
    tuned = base + torch.from_numpy((rng.standard_normal((100, 80)) * 1e-3).astype(np.float32))
    result = difference([(base, tuned)], (100, 80), CPU)
    s = np.linalg.svd(as_numpy(tuned) - as_numpy(base), compute_uv=False)
    signal = signal_rank(s, noise(result).edge, complete=True)
    assert signal == 80
    assert verdict(noise(result).fro, result.fro, signal) == "resolved"


def test_signal_rank_of_part_of_spectrum():
    s = np.array([3.0, 2.0, 1.0])
    assert signal_rank(s, 1.5, complete=False) == 2
    assert signal_rank(s, 0.5, complete=False) is None
    assert signal_rank(s, 0.5, complete=True) == 3
    assert verdict(0.0, 1.0, None) == "resolved"
    assert verdict(0.0, 0.0, 0) == "unresolved"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_energies_are_histograms_of_changed_entries(dtype):
    rng = np.random.default_rng(0)
    base = (rng.normal(size=(300, 400)) * 0.02).astype(np.float32)
    change = rng.normal(size=base.shape).astype(np.float32) * (rng.random(base.shape) < 0.6)
    energies, block = Energies.of(CPU), torch.from_numpy(change).to(dtype)
    energies.add(block, torch.from_numpy(base).to(dtype))
    bits, moved = (base.view(np.int32) >> 16) & (2**15 - 1), change != 0
    for power, sums in enumerate(energies.sums):
        expected = np.bincount(bits[moved], np.float64(change[moved]) ** (2 * power), 2**15)
        np.testing.assert_allclose(sums.numpy(), expected, rtol=1e-12)
    np.testing.assert_array_equal(block.numpy(), change)  # not overwritten


NF4 = np.array(
    [
        -1,
        -0.6962,
        -0.5251,
        -0.3949,
        -0.2844,
        -0.1848,
        -0.0911,
        0,
        0.0796,
        0.1609,
        0.2461,
        0.3379,
        0.4407,
        0.5626,
        0.723,
        1,
    ]
)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
# Levels of a group with its largest entry scaled to 1, and inputs of a group; None: 16 levels from
# minimum to maximum.
FOUR_BITS = {
    "Q4_1": (None, 32),
    "int4": (np.arange(-7, 8) / 7, 128),
    "NF4": (NF4, 64),
    "MXFP4": (np.concatenate([-E2M1, E2M1]) / 6, 32),
}


def dequantized(x: np.ndarray, kind: str) -> np.ndarray:
    """Round each group of inputs to the nearest level of a 4-bit format."""
    levels, size = FOUR_BITS[kind]
    result = np.empty_like(x)
    for i, row in enumerate(x):
        for at in range(0, len(row), size):
            group = row[at : at + size]
            values = (
                np.linspace(group.min(), group.max(), 16)
                if levels is None
                else levels * np.abs(group).max()
            )
            result[i, at : at + size] = values[np.abs(group[:, None] - values).argmin(axis=1)]
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", FOUR_BITS)
def test_dequantized_4_bit_values_are_recognized(kind, dtype):
    x = np.random.default_rng(1).standard_normal((40, 256))
    stored = torch.tensor(dequantized(x, kind)).to(dtype)
    assert is_dequantized(stored)
    stored[::9, ::70] += 1  # some edited by hand
    assert is_dequantized(stored)


@pytest.mark.parametrize("scale", [1e-200, 1e150])
def test_float64_beyond_float32_is_no_4_bit_format(scale):
    x = np.random.default_rng(1).standard_normal((40, 256)) * scale
    assert not is_dequantized(torch.tensor(x))
    stored = torch.tensor(dequantized(x, "int4"))
    assert is_dequantized(stored)
    assert torch.allclose(find_steps(stored) / scale, find_steps(stored / scale), rtol=1e-9)


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x,
        lambda x: x.bfloat16(),
        lambda x: x.half(),
        lambda x: x.to(torch.float8_e4m3fn).float(),
        lambda x: (x / x.abs().max() * 127).round() / 127,
        lambda x: (x / x.abs().amax(dim=1, keepdim=True) * 31).round(),
        lambda x: torch.zeros_like(x),
        lambda x: torch.ones_like(x),
        lambda x: x[:, :72].sign(),  # no groups of 32
        lambda x: x[:0],
    ],
    ids=[
        "float32",
        "bfloat16",
        "float16",
        "float8",
        "int8",
        "6 bits",
        "zeros",
        "ones",
        "72 columns",
        "no rows",
    ],
)
def test_other_values_are_not_taken_for_4_bits(convert):
    assert not is_dequantized(
        convert(torch.randn(40, 256, generator=torch.Generator().manual_seed(2)))
    )


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), levels=st.integers(1, 16))
def test_step_is_distance_to_nearest_other_level(seed, levels):
    rng = np.random.default_rng(seed)
    table = np.sort(rng.choice(1000, levels, replace=False)) / 64  # exact in float32
    x = table[rng.integers(0, levels, (3, 64))]
    found = find_steps(torch.tensor(x)).numpy().reshape(3, 64)
    for i, j in np.ndindex(x.shape):
        group = np.unique(x[i, j // 32 * 32 : (j // 32 + 1) * 32])
        others = [abs(x[i, j] - y) for y in group if y != x[i, j]]
        assert found[i, j] == min([*others, *(4 * np.diff(group))], default=0.0)


@pytest.mark.parametrize("kind", FOUR_BITS)
@pytest.mark.parametrize("base_too", [True, False])
def test_noise_of_dequantized_values_is_that_of_4_bits(kind, base_too):
    """Stored in float32, both sides or TUNED alone; the update is as large as a step."""
    rng = np.random.default_rng(3)
    w = rng.standard_normal((96, 256))
    t = w + 0.3 * rng.standard_normal(w.shape)
    stored = [dequantized(w, kind) if base_too else w, dequantized(t, kind)]
    result = difference([tuple(map(torch.tensor, np.float32(stored)))], w.shape, CPU)
    error = np.linalg.norm((stored[1] - stored[0]) - (t - w))
    assert result.mantissa[1] == 0
    assert result.rounding.fro == pytest.approx(error, rel=0.2)
    assert error < result.rounding.bound


def prune(x: np.ndarray, fraction: float) -> np.ndarray:
    """Return x with a fraction of its entries, the same for every x of its shape, set to zero."""
    return x * (np.random.default_rng(7).random(x.shape) >= fraction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("fraction", [0.5, 0.65, 0.8, 0.95])
def test_pruned_values_are_not_taken_for_4_bits(fraction, dtype):
    x = np.random.default_rng(6).standard_normal((64, 256))
    assert not is_dequantized(torch.tensor(prune(x, fraction)).to(dtype).float())


@pytest.mark.parametrize("base_too", [True, False])
@pytest.mark.parametrize("fraction", [0.65, 0.8, 0.95])
def test_pruned_pair_has_the_noise_of_its_dtype(fraction, base_too):
    rng = np.random.default_rng(6)
    w = rng.standard_normal((64, 256))
    t = prune(w + 0.01 * rng.standard_normal(w.shape), fraction)
    stored = [prune(w, fraction) if base_too else w, t]
    result = difference([tuple(map(torch.tensor, np.float32(stored)))], w.shape, CPU)
    assert result.rounding.fro < 0.01 * result.fro


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("fraction", [0.0, 0.6, 0.95])
def test_zeros_do_not_make_float32_values_bfloat16(fraction, on_gpu):
    """TUNED was trained in float32 from a pruned BASE in bfloat16, whose rounding is no noise."""
    rng = np.random.default_rng(8)
    w = torch.tensor(prune(rng.standard_normal((128, 256)), fraction)).bfloat16().float()
    t = w + 1e-3 * torch.tensor(prune(rng.standard_normal(w.shape), fraction)).float()
    with StandIn():
        result = difference([(w, t)], w.shape, GPU if on_gpu else CPU)
        assert result.rounding.fro < 0.001 * result.fro
    assert result.mantissa == (7, 23)


@pytest.mark.parametrize("kind", FOUR_BITS)
@pytest.mark.parametrize("trained", ["few rows", "few entries"])
def test_few_changes_of_a_dequantized_base_are_resolved(kind, trained):
    """TUNED keeps nearly all values of BASE, which is the start of training."""
    rng = np.random.default_rng(4)
    w = dequantized(rng.standard_normal((64, 256)), kind)
    chosen = np.arange(64)[:, None] >= 62 if trained == "few rows" else rng.random(w.shape) < 0.03
    t = w + chosen * 0.01 * rng.standard_normal(w.shape)
    assert is_dequantized(torch.tensor(t))
    stored = [
        (torch.tensor(w[rows]).float(), torch.tensor(t[rows]).float())
        for rows in (slice(40), slice(40, 64))
    ]
    result = difference(stored, w.shape, CPU)
    assert result.rounding.fro < 0.01 * result.fro


def test_dequantized_tuned_is_recognized_after_unchanged_rows():
    rng = np.random.default_rng(3)
    w = dequantized(rng.standard_normal((64, 256)), "int4")
    t = np.concatenate([w[:32], dequantized(w[32:] + 0.3 * rng.standard_normal((32, 256)), "int4")])
    stored = [
        (torch.tensor(w[rows]).float(), torch.tensor(t[rows]).float())
        for rows in (slice(32), slice(32, 64))
    ]
    assert difference(stored, w.shape, CPU).mantissa == (23, 23)  # of the first block
    assert difference(stored[1:], (32, 256), CPU).mantissa == (0, 0)
    result = difference(stored, w.shape, CPU).rounding
    with StandIn():
        on_gpu = difference(stored, w.shape, GPU).rounding
    assert result.fro > 0.1 * np.linalg.norm(t - w)
    assert on_gpu.fro == pytest.approx(result.fro)


def test_outlier_does_not_spread_the_levels():
    """Without an upper limit the spacing of the outlier would be 14 of 15 levels."""
    x = np.zeros((1, 32))
    x[0, :4] = 15, 1, 1, 2
    assert find_steps(torch.tensor(x)).tolist()[:5] == [4, 1, 1, 1, 1]


def test_dequantized_base_may_be_the_start_of_training():
    """BASE was dequantized from 4 bits, TUNED was trained from it in float32: its own rounding is
    all that counts.
    """
    rng = np.random.default_rng(4)
    w = dequantized(rng.standard_normal((64, 256)), "Q4_1")
    t = w + 1e-4 * rng.standard_normal(w.shape)
    result = difference([(torch.tensor(w).float(), torch.tensor(t).float())], w.shape, CPU)
    assert result.rounding.fro < 1e-3 * result.fro
