"""Moved entries against exact rational arithmetic, a normal distribution in closed form, and
torch's AdamW.
"""

import math
from bisect import bisect_left
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lora_diag.adapters import open_adapter
from lora_diag.linting.moves import (
    FORMATS,
    TypeSample,
    encode,
    estimate_rounding,
    measure_shares,
    moving_table,
    sample_entries,
    share_of_uniform,
    simulate_path,
)
from lora_diag.running.inputs import pair_update
from lora_diag.storage import open_checkpoint
from lora_diag.storage.file_bytes import READING
from tests.conftest import save_model
from tests.linting.making import make_adapter, make_base

TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def finite_numbers(dtype):
    """All finite numbers of a format, ascending, each once, with its code: torch decodes them."""
    codes = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    values = codes.view(TYPES[dtype]).double().numpy()
    pairs = sorted(
        (value, code)
        for code, value in enumerate(values)
        if math.isfinite(value) and code != 0x8000
    )
    return [value for value, _ in pairs], [code for _, code in pairs]


NUMBERS = {dtype: finite_numbers(dtype) for dtype in FORMATS}


def moves(dtype, code, step):
    """Whether w + step rounds to another number than w: by distances to both neighbours, ties to
    the even code.
    """
    values, codes = NUMBERS[dtype]
    at = codes.index(code)
    exact = Fraction(values[at]) + Fraction(step)
    above = bisect_left(values, exact)
    if above == len(values) or values[above] == exact:
        return above != at
    low, high = exact - Fraction(values[above - 1]), Fraction(values[above]) - exact
    nearest = above - 1 if low < high or (low == high and codes[above - 1] % 2 == 0) else above
    return nearest != at


@given(
    dtype=st.sampled_from(sorted(FORMATS)), code=st.integers(0, 0x7BFE), step=st.floats(1e-9, 1e-2)
)
@example(dtype="bfloat16", code=0x3F80, step=2.0**-9)  # 1: half of the spacing below
@example(dtype="bfloat16", code=0x3F81, step=2.0**-8)  # odd: a tie moves
@example(dtype="bfloat16", code=0x3F82, step=2.0**-8)  # even: it stays
@example(dtype="bfloat16", code=0x0000, step=1e-9)
@example(dtype="float16", code=0x0001, step=2.0**-25)  # subnormal tie
@example(dtype="float16", code=0x0400, step=2.0**-25)  # the smallest normal number
def test_moving_table_equals_exact_rounding(dtype, code, step):
    wanted = (moves(dtype, code, step) + moves(dtype, code, -step)) / 2
    assert moving_table(dtype, step)[code] == wanted


@pytest.mark.parametrize("lr", [5e-7, 1e-6, 1e-5, 5e-5])
def test_share_of_normal_entries_is_closed_form(lr):
    """Half of the spacing of bf16 is 2^(e − 8): entries below 2^k move, k the next whole number
    above log2(lr) + 8.
    """
    entries = np.random.default_rng(0).normal(0, 0.02, 400_000)
    wanted = math.erf(2.0 ** math.ceil(math.log2(lr) + 8) / (0.02 * math.sqrt(2)))
    found = moving_table("bfloat16", lr)[encode(entries, "bfloat16")].mean()
    assert found == pytest.approx(wanted, abs=4 * math.sqrt(wanted / 400_000))
    published = {5e-7: 0.010, 1e-6: 0.020, 1e-5: 0.16, 5e-5: 0.57}[lr]
    assert found == pytest.approx(published, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("lr", [1e-6, 1e-5, 5e-5, 1e-3])
def test_share_equals_step_of_torch_adamw(lr):
    torch.manual_seed(0)
    weight = torch.nn.Parameter((torch.randn(300_000) * 0.02).to(torch.bfloat16))
    before, weight.grad = weight.detach().clone(), torch.randn_like(weight)
    predicted = moving_table("bfloat16", lr)[encode(before.float().numpy(), "bfloat16")].mean()
    torch.optim.AdamW([weight], lr=lr, weight_decay=0.0).step()
    assert (weight != before).double().mean().item() == pytest.approx(predicted, rel=0.05)


def test_encoding_equals_torch():
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * torch.logspace(
        -8, 4, 10_000
    )
    for dtype, kind in TYPES.items():
        assert (encode(values.numpy(), dtype) == values.to(kind).view(torch.uint16).numpy()).all()


def test_sample_is_within_error_and_reads_little(tmp_path):
    torch.manual_seed(0)
    rows = torch.logspace(-3, 0, 2048)[:, None]  # rows of unequal size: neighbours are alike
    big = {
        f"model.layers.{i}.mlp.up_proj.weight": (torch.randn(2048, 512) * rows).bfloat16()
        for i in range(2)
    }
    save_model(
        tmp_path / "b",
        {**big, "model.norm.weight": torch.tensor([1.0, 1e-6, float("nan")]).bfloat16()},
    )
    base = open_checkpoint(tmp_path / "b")
    READING.clear()
    samples = sample_entries(base, list(base), "bfloat16")
    assert READING.total()[0] < 0.1 * READING.total()[2]
    whole, *rest = measure_shares(samples, "bfloat16", 1e-5)
    exact = {
        name: moving_table("bfloat16", 1e-5)[encode(t.float().numpy(), "bfloat16")]
        for name, t in big.items()
    }
    wanted = np.concatenate([values.ravel() for values in exact.values()]).mean()
    found = {share.name: share for share in rest}
    assert abs(found["mlp.up_proj"].moved - wanted) < 4 * found["mlp.up_proj"].error
    assert 0 < found["mlp.up_proj"].error < 0.3 * wanted
    assert (found["norm"].moved, found["norm"].error) == (
        pytest.approx(1 / 3),
        0.0,
    )  # read whole; NaN stays
    assert whole.entries == sum(share.entries for share in rest)
    assert whole.moved == pytest.approx(wanted, abs=4 * whole.error + 1e-6)


def test_path_is_kept_where_steps_are_whole_spacings():
    ones = [TypeSample("x", 100, (encode(np.ones(100), "bfloat16"),))]
    assert simulate_path(ones, "bfloat16", 2.0**-6, 20) == {
        "one direction": 1.0,
        "random signs": 1.0,
    }
    assert simulate_path(ones, "bfloat16", 2.0**-10, 20) == {
        "one direction": 0.0,
        "random signs": 0.0,
    }


def test_uniform_share_is_fraction_below_power_of_two():
    # lr 3e-5 moves entries below 2^-7; of a uniform distribution within 2^-6 these are half
    assert share_of_uniform(2.0**-6, "bfloat16", 3e-5) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("size", [0.01, 1e-4, 1e-5])
def test_estimated_rounding_is_that_of_merge(size, tmp_path):
    """Against W + ΔW rounded by torch, entry by entry, above, near and below the spacing."""
    base, adapter = (
        open_checkpoint(make_base(tmp_path / "b")),
        open_adapter(make_adapter(tmp_path / "a", size=size)),
    )
    deltas = pair_update(base, adapter)[0].deltas
    error = norm = 0.0
    for delta in deltas:
        b, a = delta.load()
        w, d = base.read(delta.layer).double().view(delta.shape), b.double() @ a.double()
        error += float(((w + d).float().bfloat16().double() - w - d).square().sum())
        norm += float(d.square().sum())
    found = estimate_rounding(base, {delta.layer: delta.thin for delta in deltas}, "bfloat16")
    assert found == pytest.approx(math.sqrt(error / norm), rel=0.05)


def test_stated_error_is_spread_of_samples(tmp_path):
    """Over 20 seeds, for rows whose size grows, where the plain spread of the ranges would be 40
    times too large.
    """
    rows = torch.logspace(-3, 0, 2048)[:, None]
    torch.manual_seed(0)
    save_model(
        tmp_path / "b",
        {"model.layers.0.mlp.up_proj.weight": (torch.randn(2048, 512) * rows).bfloat16()},
    )
    base = open_checkpoint(tmp_path / "b")
    found = [
        measure_shares(sample_entries(base, list(base), "bfloat16", s), "bfloat16", 1e-4)[0]
        for s in range(20)
    ]
    spread, stated = (
        np.std([share.moved for share in found]),
        np.mean([share.error for share in found]),
    )
    assert spread / 2 < stated < 4 * spread
