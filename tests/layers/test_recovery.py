"""One layer's update before rounding: formats, both starts, and refused layers."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lora_diag.deltas import pair
from lora_diag.errors import MemoryLimitError
from lora_diag.layers import recovery
from lora_diag.layers.recovery import recover_layer, recovery_bytes
from lora_diag.storage import open_checkpoint
from tests.conftest import DATA
from tests.linalg.test_hidden import planted
from tests.standin import OnGpu, stand_in

CPU = torch.device("cpu")
NAME = "layers.0.up_proj.weight"


def estimate(folder, base, tuned, seed=0, memory=None, device=CPU):
    """Recover the one layer of two files; tensors, or all tensors of a file by name."""
    for name, side in (("base", base), ("tuned", tuned)):
        tensors = side if isinstance(side, dict) else {NAME: side}
        save_file(
            {key: value.contiguous() for key, value in tensors.items()},
            folder / f"{name}.safetensors",
        )
    sides = [open_checkpoint(folder / f"{name}.safetensors") for name in ("base", "tuned")]
    (delta,) = pair(*sides).deltas
    fro = math.sqrt(sum(float((t.double() - b.double()).square().sum()) for b, t in delta.blocks()))
    return recover_layer(delta, fro, (1, 4, 16), seed, device, memory)


def off(found, x):
    return abs(found.hidden.fro_estimate / float(x.norm()) - 1)


# Shape, rank, rms, seed, spread of the rows' scales; and by how much size and matrix may be off,
# relative to X.
PLANTED = {
    "rank 4": ((256, 192, 4, 1.5e-5, 1, 0.0), 0.05, 0.25),
    "sparse changes": (
        (256, 320, 4, 3e-6, 41, 0.0),
        0.2,
        None,
    ),  # values of the fit are too small there
    "rank 1": ((256, 200, 1, 2e-5, 21, 0.0), 0.06, 0.25),
    "rank 2": ((256, 200, 2, 2e-5, 22, 0.0), 0.06, 0.25),
    "row scales": ((256, 200, 2, 2e-5, 10, 0.9), 0.1, 0.3),
    "unequal rows": ((160, 256, 4, 1.8e-6, 1, 1.0), 0.3, None),
    "unequal rows, another seed": ((160, 256, 4, 1.8e-6, 11, 1.0), 0.3, None),
}


@pytest.mark.slow
@pytest.mark.parametrize(("plan", "most", "matrix"), PLANTED.values(), ids=PLANTED)
def test_planted_update_is_within_its_intervals(tmp_path, plan, most, matrix):
    """Size, energies and ranks; and the update found gives the stored TUNED."""
    *size, rows = plan
    w, x, t = planted(*size, rows=rows or None)
    result = estimate(tmp_path, w.bfloat16(), t.bfloat16())
    hidden = result.hidden
    assert (hidden.status, hidden.start, hidden.scales) == ("recovered", "stored", bool(rows))
    assert hidden.start_gain < -10
    assert hidden.unchanged == pytest.approx(float((t == w).double().mean()))
    assert off(result, x) < most
    assert hidden.fro_interval[0] <= float(x.norm()) <= hidden.fro_interval[1]
    s = np.linalg.svd(x.double().numpy(), compute_uv=False)
    share = np.cumsum(s**2) / (s**2).sum()
    for r in (1, 4, 16):
        low, high = hidden.energy_interval[str(r)]
        assert low <= share[r - 1] <= high + 1e-9
    least, largest = hidden.rank_at_interval["0.9"]
    assert least <= np.searchsorted(share, 0.9) + 1 <= (largest or len(s))
    assert math.hypot(*hidden.values_estimate) <= hidden.fro_estimate * (1 + 1e-6)
    assert torch.equal((w + result.matrix()).bfloat16().float(), t)
    assert matrix is None or float((result.matrix() - x).norm() / x.norm()) < matrix


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rounded", "rows"])
def test_row_blocks_give_the_same_numbers(tmp_path, kind):
    w, x, t = planted(300, 240, 4, 2e-5, 31, noise=0.2, rows=0.8 if kind == "rows" else None)
    if kind == "rounded":
        start = w + (torch.rand(w.shape, generator=torch.Generator().manual_seed(1)) - 0.5) * 2**-16
        w, t = start.bfloat16().float(), (start + x).bfloat16().float()
    whole = estimate(tmp_path, w.bfloat16(), t.bfloat16())
    limit = recovery_bytes(w.shape) - 1
    blocks = estimate(tmp_path, w.bfloat16(), t.bfloat16(), memory=limit)
    assert whole.hidden == blocks.hidden
    assert whole.hidden.status == "recovered"
    assert whole.hidden.scales is (kind == "rows")
    streamed = blocks.change(limit, 1.5)
    assert streamed.matrix is None
    assert torch.equal(torch.cat(list(streamed.streamed.read())), 1.5 * whole.matrix())
    assert streamed.fro == pytest.approx(1.5 * float(whole.matrix().double().norm()))
    with pytest.raises(MemoryLimitError, match="cells need"):
        estimate(tmp_path, w.bfloat16(), t.bfloat16(), memory=10**7)


@pytest.mark.slow
def test_recover_gpu_equals_cpu(tmp_path):
    w, _, t = planted(150, 120, 3, 2e-5, 33, noise=0.2, rows=0.8)
    here = estimate(tmp_path, w.bfloat16(), t.bfloat16())
    with stand_in() as gpu:
        there = estimate(tmp_path, w.bfloat16(), t.bfloat16(), device=gpu)
        assert there.cells.device == gpu
        matrix = there.matrix()
        assert isinstance(matrix, OnGpu)
        with pytest.raises(RuntimeError, match="one device"):
            matrix + torch.ones(150, 120)
    assert there.hidden == here.hidden
    assert here.hidden.status == "recovered"
    assert torch.equal(matrix.as_subclass(torch.Tensor), here.matrix())


def test_bfloat16_values_in_float32_are_detected(tmp_path):
    w, _, t = planted(128, 96, 3, 2e-5, 2)
    plain = estimate(tmp_path, w.bfloat16(), t.bfloat16()).hidden
    t[0, 0] += 1e-4  # one entry that was edited by hand, and is not on the grid
    wide = estimate(tmp_path, w, t).hidden
    assert wide.status == plain.status == "recovered"
    assert wide.fro_estimate == pytest.approx(plain.fro_estimate, rel=0.02)


def test_recover_base_in_float32_and_float16_files(tmp_path):
    rng = np.random.default_rng(3)
    w = torch.tensor(rng.normal(size=(128, 100)) * 0.02).float()
    x = torch.tensor(rng.normal(size=(128, 2)) @ rng.normal(size=(2, 100)) * 2e-6).float()
    result = estimate(tmp_path, w, (w + x).half())
    assert result.hidden.status in {"recovered", "size_only"}
    assert result.hidden.start == "stored"
    assert result.hidden.start_gain is None
    assert off(result, x) < 0.1


def test_recover_notes_base_rounded_after_start(tmp_path):
    rng = np.random.default_rng(4)
    start = torch.tensor(rng.normal(size=(160, 128)) * 0.02)
    x = torch.tensor(rng.normal(size=(160, 128)) * 3e-5)
    result = estimate(tmp_path, start.float().bfloat16(), (start + x).float().bfloat16())
    assert result.hidden.start == "rounded"
    assert result.hidden.start_gain > 10
    assert off(result, x) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "spread"), [(1, 0.0), (4, 0.8)])
def test_rounded_start_is_found_under_heavy_tails(tmp_path, rank, spread):
    """Entries of rank 1, or of unequal rows: under a stored start ‖X‖ would be too large, or
    refused.
    """
    rng = np.random.default_rng(6)
    start = torch.tensor(rng.normal(size=(192, 256)) * 0.02)
    x = (
        rng.normal(size=(192, rank))
        @ rng.normal(size=(rank, 256))
        * np.exp(spread * rng.normal(size=(192, 1)))
    )
    x = torch.tensor(x * 6e-5 / np.sqrt((x**2).mean()))
    hidden = estimate(tmp_path, start.bfloat16(), (start + x).bfloat16()).hidden
    assert (hidden.start, hidden.status) == ("rounded", "recovered")
    assert hidden.fro_interval[0] <= float(x.norm()) <= hidden.fro_interval[1]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [12, 15])
def test_energies_of_flat_update_are_in_their_intervals(tmp_path, seed):
    """Entries saturate, as in steps of Adam: what is outside the directions is not normal."""
    rng = np.random.default_rng(seed)
    x = np.tanh(rng.normal(size=(192, 5)) @ rng.normal(size=(5, 256))) + 0.3 * rng.normal(
        size=(192, 256)
    )
    w = torch.tensor(rng.normal(size=x.shape) * 0.02).bfloat16()
    x *= 1.5e-5 / np.sqrt((x**2).mean())
    hidden = estimate(tmp_path, w, (w.double() + torch.tensor(x)).bfloat16()).hidden
    assert hidden.status == "recovered"
    s = np.linalg.svd(x, compute_uv=False)
    share = np.cumsum(s**2) / (s**2).sum()
    for r in (1, 4, 16):
        low, high = hidden.energy_interval[str(r)]
        assert low <= share[r - 1] <= high
    assert hidden.energy_interval["1"][1] < 2 * share[0]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_scaled_eight_bit_weights(tmp_path, dtype):
    rng = np.random.default_rng(5)
    scale = 0.001
    code = torch.tensor(rng.normal(size=(128, 96)) * 20).to(dtype)
    w = code.double() * scale
    x = torch.tensor(rng.normal(size=(128, 96)) * 4e-4)
    tuned = ((w + x) / scale).float().to(dtype)
    result = estimate(
        tmp_path, *({NAME: c, f"{NAME}_scale": torch.tensor([scale])} for c in (code, tuned))
    )
    assert result.hidden.status == "size_only"
    assert off(result, x) < 0.05


def test_resolved_update_is_not_hidden(tmp_path):
    w, x, _ = planted(64, 48, 2, 1e-4, 6)
    result = estimate(tmp_path, w.bfloat16(), w + x)
    assert result.hidden.status == "not_hidden"
    assert result.hidden.fro_estimate == pytest.approx(float(x.norm()), rel=1e-5)
    assert result.cells is None


def test_unchanged_or_tiny_update_is_refused(tmp_path):
    w, _, _ = planted(64, 48, 2, 1e-4, 7)
    assert "no entry changed" in estimate(tmp_path, w.bfloat16(), w.bfloat16()).hidden.reason
    few = w.bfloat16().clone()
    few[0, :5] *= 1 + 2**-7  # to the next number
    result = estimate(tmp_path, w.bfloat16(), few).hidden
    assert (result.status, result.fro_estimate) == ("refused", None)
    assert "5 entries" in result.reason
    few[0, :5] += 1  # rounding is negligible
    assert estimate(tmp_path, w.bfloat16(), few).hidden.status == "not_hidden"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stochastic", "rate", "lean"),
    [
        (False, 1e-5, 0.3),
        (False, 1e-6, 0.3),
        (True, 1e-5, 0.3),
        (True, 1e-6, 0.3),
        (True, 3e-6, 1.0),
        (True, 1e-5, 1.0),
    ],
)
def test_training_without_master_weights_is_refused(tmp_path, stochastic, rate, lean):
    rng = torch.Generator().manual_seed(8)
    start = (torch.randn(160, 160, generator=rng) * 0.02).bfloat16().float()
    drift, now = lean * torch.randn(160, 160, generator=rng), start.clone()
    for _ in range(40):
        moved = now - rate * torch.tanh(torch.randn(160, 160, generator=rng) + drift)
        if stochastic:
            bits = moved.view(torch.int32) + torch.randint(
                0, 65536, (160, 160), generator=rng, dtype=torch.int32
            )
            now = (bits & -65536).view(torch.float32)
        else:
            now = moved.bfloat16().float()
    result = estimate(tmp_path, start.bfloat16(), now.bfloat16()).hidden
    assert result.status == "refused"
    assert result.fit_uneven > 0.08 if stochastic else result.fit_chi > 20
    assert result.fro_estimate is None


@pytest.mark.slow
def test_steady_steps_of_optimizer_are_one_rounding(tmp_path):
    """Steps that keep their sign move most entries by about as much: flatter than uniform."""
    rng = torch.Generator().manual_seed(8)
    w = (torch.randn(160, 160, generator=rng) * 0.02).bfloat16().float()
    drift = 2.0 * torch.randn(160, 160, generator=rng)
    x = -3e-6 * sum(torch.tanh(torch.randn(160, 160, generator=rng) + drift) for _ in range(40))
    result = estimate(tmp_path, w.bfloat16(), (w + x).bfloat16())
    assert result.hidden.status == "size_only"
    assert result.hidden.fro_interval[0] < float(x.norm()) < result.hidden.fro_interval[1]
    assert result.hidden.kurtosis == pytest.approx(
        float((x**4).mean() / (x**2).mean() ** 2), rel=0.1
    )


@pytest.mark.parametrize(("energy", "status"), [(1.1, "recovered"), (1.6, "size_only")])
def test_directions_far_beyond_size_are_no_result(tmp_path, monkeypatch, energy, status):
    """Directions cannot hold far more than the whole update; a little more is the error of both
    estimates.
    """
    w, x, t = planted(128, 96, 3, 2e-5, 2)
    recover = recovery.recover

    def recover_inflated(*arguments):
        found = recover(*arguments)
        values = replace(
            found.low_rank.values, debiased=found.low_rank.values.debiased * math.sqrt(energy)
        )
        return replace(found, low_rank=replace(found.low_rank, values=values))

    monkeypatch.setattr(recovery, "recover", recover_inflated)
    result = estimate(tmp_path, w.bfloat16(), t.bfloat16())
    assert result.hidden.status == status
    assert off(result, x) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(("rms", "seed", "rows"), [(3e-6, 32, None), (1e-5, 9, 0.8)])
def test_update_without_directions_has_a_size(tmp_path, rms, seed, rows):
    """Rows of different sizes get scales before the model is refused."""
    w, x, t = planted(256, 200, 0, rms, seed, rows=rows)
    result = estimate(tmp_path, w.bfloat16(), t.bfloat16())
    assert (result.hidden.status, bool(result.hidden.scales)) == ("size_only", bool(rows))
    assert result.hidden.fit_uneven < 0.08
    assert result.hidden.fro_interval[0] < float(x.norm()) < result.hidden.fro_interval[1]
    assert off(result, x) < (0.03 if rows else 0.2)
    assert torch.equal((w + result.matrix()).bfloat16().float(), t)


@pytest.mark.slow
def test_interval_of_size_does_not_grow_with_entries(tmp_path):
    """A size that varies by 6% with |W| gives a large χ² in 360,000 entries, and an error of 4%."""
    rng = np.random.default_rng(8)
    start = rng.normal(size=(600, 600)) * 0.02
    x = rng.normal(size=start.shape) * np.clip(np.abs(start) / 0.02, 0.05, None) ** 0.06
    x *= 4e-5 / x.std()
    base, tuned = (torch.tensor(side).float().bfloat16() for side in (start, start + x))
    hidden = estimate(tmp_path, base, tuned).hidden
    assert hidden.start == "rounded"
    assert hidden.fit_chi > 20
    low, high = hidden.fro_interval
    assert low <= float(np.linalg.norm(x)) <= high
    assert high / low < 1.2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "limit", "value", "reason"),
    [
        ("linalg.hidden", "MAX_ITERATIONS", 2, "converge"),
        ("layers.recovery", "MAX_EXCESS", 0.5, "energy"),
    ],
)
@pytest.mark.parametrize(("rank", "status"), [(4, "size_only"), (1, "refused")])
def test_directions_that_are_no_result_are_not_reported(
    tmp_path, monkeypatch, module, limit, value, reason, rank, status
):
    """Where the model fits without them its size is kept; rank 1 only fits with directions."""
    monkeypatch.setattr(f"lora_diag.{module}.{limit}", value)
    w, _, t = planted(128, 160, rank, 2e-5, 21)
    hidden = estimate(tmp_path, w.bfloat16(), t.bfloat16()).hidden
    assert hidden.status == status
    assert reason in hidden.reason
    assert (hidden.values_estimate, hidden.rank_at_interval) == (None, None)
    assert (hidden.fro_estimate is None) == (status == "refused")


def test_recover_refuses_values_dequantized_from_4_bits(tmp_path):
    from tests.linalg.test_rounding import dequantized

    rng = np.random.default_rng(9)
    w = rng.normal(size=(64, 96)) * 0.02
    t = torch.tensor(dequantized(w + 1e-4 * rng.normal(size=w.shape), "Q4_1")).float()
    result = estimate(tmp_path, torch.tensor(dequantized(w, "Q4_1")).float(), t).hidden
    assert result.status == "refused"
    assert "4 bits" in result.reason


def test_recover_takes_dequantized_base_left_unchanged(tmp_path):
    from tests.linalg.test_rounding import dequantized

    rng = np.random.default_rng(9)
    w = torch.tensor(dequantized(rng.normal(size=(256, 256)) * 0.02, "Q4_1")).bfloat16()
    t = (w.float() + 1e-6 * torch.tensor(rng.normal(size=w.shape)).float()).bfloat16()
    assert 0.9 < float((w == t).float().mean()) < 1
    assert "4 bits" not in (estimate(tmp_path, w, t).hidden.reason or "")


def test_recover_refuses_format_without_known_cells():
    case = DATA / "cases" / "bnb-nf4-double"
    base = open_checkpoint(next(case.glob("base*")))
    delta = next(one for one in pair(base, base).deltas if one.tuned.info.stored)
    result = recover_layer(delta, 1.0, (1,), 0, CPU).hidden
    assert result.status == "refused"
    assert "nf4" in result.reason
