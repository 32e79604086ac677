"""Size, shape, scales and low rank of an update from its cells, against definitions written out,
and laws.
"""

import math
from dataclasses import astuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import trapezoid
from scipy.optimize import minimize_scalar
from scipy.special import ndtr
from scipy.stats import norm

from lora_diag.linalg import hidden_models as hidden_density
from lora_diag.linalg.cells import (
    GRIDS,
    Cells,
    Shrunk,
    add_noise,
    cell_halves,
    moments,
    noise_edge,
    shrink,
)
from lora_diag.linalg.hidden import HeldOutCells, LowRank, fit_low_rank, fit_size, recover
from lora_diag.linalg.hidden_models import (
    END,
    FLATTER,
    HEAVIER,
    KERNEL,
    NORMAL,
    SPACING,
    Scales,
    estimate_linear_lengths,
    fit_density,
    fit_deviation,
    fit_scales,
    fit_shape,
    measure_lengths,
    measure_norm,
    unscale,
)


def planted(m, n, rank, rms, seed, noise=0.0, rows=None):
    """W in bfloat16, X of a rank (plus a share of white noise), and round(W + X);
    float32 tensors.
    """
    rng = np.random.default_rng(seed)
    w = torch.tensor(rng.normal(size=(m, n)) * 0.02).bfloat16().float()
    x = rng.normal(size=(m, rank)) @ rng.normal(size=(rank, n)) if rank else np.zeros((m, n))
    x *= math.sqrt(1 - noise) / max(x.std(), 1e-30)
    x = rms * (x + math.sqrt(noise if rank else 1.0) * rng.normal(size=(m, n)))
    if rows is not None:
        x *= np.exp(rows * rng.normal(size=(m, 1)))
    x = torch.tensor(x).float()
    return w, x, (w + x).bfloat16().float()


def cells_of(w, t):
    below, above = cell_halves(t, GRIDS["bfloat16"])
    return Cells(t - w - below, t - w + above)


def rms_of(w, t):
    return float((t - w).square().mean().sqrt())


def mean_of(cells, low_rank, deviation):
    """Return E[X | cells]."""
    return moments(
        cells, 0.0 if low_rank is None else low_rank.rows(0, len(cells.lo)), deviation
    ).mean


def low_rank_of(matrix, rank):
    u, s, vh = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def error(found, x):
    return float(
        np.linalg.norm(np.asarray(found) - x.double().numpy()) / np.linalg.norm(x.double().numpy())
    )


@pytest.mark.parametrize("rounded", [False, True])
def test_size_has_largest_likelihood(rounded):
    rng = np.random.default_rng(5)
    start = rng.normal(size=(40, 50)) * 0.02
    stored = torch.tensor(start).bfloat16().double()
    base = stored if rounded else torch.tensor(start)
    tuned = torch.tensor(start + rng.normal(size=start.shape) * 4e-5).bfloat16().double()
    below, above = cell_halves(tuned, GRIDS["bfloat16"])
    parts = [
        tuned - base - below,
        tuned - base + above,
        *(cell_halves(base, GRIDS["bfloat16"]) if rounded else ()),
    ]
    lo, hi, *wide = (part.numpy() for part in parts)
    # The likelihood written out: the probability of the cell, averaged over where the start may
    # have been.
    shifts = np.linspace(0, 1, 201)[:, None, None] if rounded else np.zeros((1, 1, 1))
    offset = -wide[0] + shifts * (wide[0] + wide[1]) if rounded else 0.0

    def loss(log_s):
        s = math.exp(log_s)
        return (
            -np.log(
                trapezoid(ndtr((hi - offset) / s) - ndtr((lo - offset) / s), dx=1 / 200, axis=0)
            ).sum()
            if (rounded)
            else -np.log(ndtr(hi / s) - ndtr(lo / s)).sum()
        )

    best = minimize_scalar(
        loss, bounds=(math.log(5e-6), math.log(5e-4)), method="bounded", options={"xatol": 1e-7}
    )
    result = fit_size(Cells(*parts), 1e-4)
    assert result.deviation == pytest.approx(math.exp(best.x), rel=1e-4 if not rounded else 2e-3)
    assert result.log_likelihood == pytest.approx(-best.fun, rel=1e-6 if not rounded else 1e-4)
    curvature = (loss(best.x + 0.01) + loss(best.x - 0.01) - 2 * best.fun) / 1e-4
    assert result.error == pytest.approx(1 / math.sqrt(curvature), rel=0.15)


def test_merged_cells_have_the_same_size_shape_and_density():
    w, _, t = planted(120, 100, 0, 2e-5, 4)
    cells = cells_of(w, t)
    merged = cells.merge()
    assert merged.shape[1] < cells.count / 8
    whole, part = (fit_size(each, rms_of(w, t)) for each in (cells, merged))
    assert astuple(part) == pytest.approx(astuple(whole), rel=1e-6)
    for function in (fit_shape, fit_density):
        whole_fit, part_fit = (function(each, whole.deviation) for each in (cells, merged))
        assert part_fit.deviation == pytest.approx(whole_fit.deviation, rel=1e-5)
        assert part_fit.shape.kurtosis == pytest.approx(whole_fit.shape.kurtosis, rel=1e-4)


@given(
    m=st.integers(2, 40),
    n=st.integers(2, 40),
    q=st.floats(0.05, 1.0),
    factor=st.floats(1.01, 30.0),
    relaxation=st.floats(0.05, 1.0),
)
def test_shrinking_inverts_what_noise_and_information_do(m, n, q, factor, relaxation):
    s = 0.7
    noise = s / math.sqrt(q)
    x = noise * (m * n) ** 0.25 * factor
    y = float(add_noise(torch.tensor([x], dtype=torch.float64), (m, n), noise)[0])
    eta = (
        math.sqrt((y**2 - (m + n) * noise**2) ** 2 - 4 * m * n * noise**4) / y
    )  # Gavish and Donoho 2017
    relaxation = max(relaxation, q)
    sigma = (1 - q) * eta + q * y - (1 - relaxation) * eta
    values = torch.tensor(
        [sigma, 0.999 * noise_edge((m, n), s * math.sqrt(q))], dtype=torch.float64
    )
    result = shrink(values, (m, n), s, q, relaxation)
    assert result.debiased.tolist() == pytest.approx([x], rel=1e-6)
    assert result.eta.tolist() == pytest.approx([eta], rel=1e-5)
    assert result.noise == pytest.approx(noise)


def test_shrunk_values_are_nearest_to_what_was_planted():
    rng = np.random.default_rng(3)
    m, n, x = 300, 200, 40.0
    u, v = (part / np.linalg.norm(part) for part in (rng.normal(size=m), rng.normal(size=n)))
    noisy = x * np.outer(u, v) + rng.normal(size=(m, n))
    left, s, right = np.linalg.svd(noisy)
    result = shrink(torch.tensor(s), (m, n), 1.0, 1.0)
    assert result.debiased.tolist() == pytest.approx([x], rel=0.05)
    best = x * float(left[:, 0] @ u) * float(right[0] @ v)  # the multiple of u₁v₁ᵀ that is nearest
    assert float(result.eta[0]) == pytest.approx(best, rel=0.05)


@pytest.mark.parametrize(("rms", "most"), [(3e-5, 0.05), (1e-5, 0.15)])
def test_low_rank_update_is_recovered(rms, most):
    w, x, t = planted(256, 200, 4, rms, 7)
    cells = cells_of(w, t)
    size = fit_size(cells, rms_of(w, t))
    assert size.fro == pytest.approx(float(x.norm()), rel=0.06)
    result = recover(cells, size)
    assert result.z > 5
    assert result.low_rank.rank == 4
    mean = mean_of(cells, result.low_rank, result.deviation)
    recovered, plain = error(low_rank_of(mean, 4), x), error(low_rank_of(t - w, 4), x)
    assert recovered < most
    assert recovered < 0.3 * plain


@pytest.mark.parametrize(("rms", "noise"), [(3e-5, 0.0), (1e-5, 0.0), (1e-5, 0.3)])
def test_error_of_the_estimate_is_expected(rms, noise):
    w, x, t = planted(256, 200, 4, rms, 7, noise=noise)
    cells = cells_of(w, t)
    result = recover(cells, fit_size(cells, rms_of(w, t)))
    low_rank = result.low_rank
    off = float((x - low_rank.rows(0, 256)).square().mean().sqrt())
    assert 0.95 * off < result.deviation < 1.4 * off
    # Var[x | cell] of a truncated normal distribution, written out.
    low, high = (
        (end - low_rank.rows(0, 256)).double().numpy() / result.deviation
        for end in (cells.lo, cells.hi)
    )
    mass, at = ndtr(high) - ndtr(low), [norm.pdf(end) for end in (low, high)]
    variance = 1 + (low * at[0] - high * at[1]) / mass - ((at[0] - at[1]) / mass) ** 2
    mean = mean_of(cells, low_rank, result.deviation)
    ratio = result.deviation * math.sqrt(variance.mean()) / float((mean - x).square().mean().sqrt())
    assert 0.95 < ratio < 1.4  # by the s of the fit itself up to 2.6


@pytest.mark.slow
@settings(max_examples=12)
@given(seed=st.integers(0, 10**6))
def test_pure_noise_has_no_direction(seed):
    w, x, t = planted(60, 70, 0, 1e-5, seed)
    cells = cells_of(w, t)
    size = fit_size(cells, rms_of(w, t))
    assert recover(cells, size, seed).low_rank is None
    assert abs(math.log(size.fro / float(x.norm()))) < 5 * size.error


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["norm", "debiased"])
def test_fit_is_a_fixed_point_of_the_whole_posterior_mean(rule):
    """L is a fixed point: the singular values of the whole posterior mean given L, in float64,
    shrink to those of L.
    """
    rng = np.random.default_rng(8)
    u, v = (np.linalg.qr(rng.normal(size=(count, 240)))[0] for count in (400, 240))
    x = torch.tensor((u / np.arange(1, 241)) @ v.T).float()
    w = torch.tensor(rng.normal(size=(400, 240)) * 0.02).bfloat16().float()
    t = (w + x * (2e-5 / float(x.square().mean().sqrt()))).bfloat16().float()
    cells = cells_of(w, t)
    result = fit_low_rank(cells, fit_size(cells, rms_of(w, t)), rule)
    posterior = moments(cells, result.rows(0, 400), result.deviation)
    q = 1 - float(posterior.variance.double().mean()) / result.deviation**2
    s = torch.tensor(np.linalg.svd(posterior.mean.double().numpy(), compute_uv=False))
    expected = shrink(s, (400, 240), result.deviation, q).eta
    assert abs(len(expected) - result.rank) <= 1
    together = min(len(expected), result.rank)
    assert (
        float((expected[:together] - result.values.eta[:together]).norm() / expected.norm()) < 0.003
    )


@pytest.mark.slow
def test_fit_is_stable_where_cells_know_a_few_columns():
    """Steps of 2/(1 + q) with momentum diverge here."""
    rng = np.random.default_rng(1)
    w = rng.normal(size=(128, 160)) * 0.02
    w[:, 7] *= 50
    w[3] *= 20
    x = rng.normal(size=(128, 2)) @ rng.standard_t(3, (2, 160))
    w, x = torch.tensor(w), torch.tensor(x / x.std() * 1e-5)
    base, t = w.bfloat16().double(), (w + x).float().bfloat16().double()
    below, above = cell_halves(t, GRIDS["bfloat16"])
    parts = (t - base - below, t - base + above, *cell_halves(base, GRIDS["bfloat16"]))
    cells = Cells(*(part.float() for part in parts))
    result = fit_low_rank(cells, fit_size(cells, 1e-5))
    assert result.converged
    assert error(result.rows(0, 128), x) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["norm", "debiased"])
@pytest.mark.parametrize("shape", [(60, 40), (260, 230)])
def test_scaling_by_powers_of_two_is_exact(rule, shape):
    w, _, t = planted(*shape, 3, 2e-5, 11)
    cells = cells_of(w, t)
    rows, columns = torch.randperm(shape[0]), torch.randperm(shape[1])
    size = fit_size(cells, 2.0**-15)
    result = fit_low_rank(cells, size, rule)
    scaled = Cells(cells.lo * 2.0**12, cells.hi * 2.0**12)
    other = fit_low_rank(scaled, fit_size(scaled, 2.0**-3), rule)
    assert torch.equal(other.rows(0, shape[0]), result.rows(0, shape[0]) * 2.0**12)
    moved = Cells(cells.lo[rows][:, columns], cells.hi[rows][:, columns])
    turned = fit_low_rank(moved, fit_size(moved, 2.0**-15), rule).rows(0, shape[0])
    expected = result.rows(0, shape[0])[rows][:, columns]
    assert float((turned - expected).norm() / expected.norm()) < 0.02


def test_scales_of_rows_are_found_and_unneeded_ones_are_not():
    w, x, t = planted(200, 150, 0, 1e-5, 17, rows=0.8)
    cells = cells_of(w, t)
    size = fit_size(cells, rms_of(w, t))
    assert size.fro > 1.04 * float(x.norm())
    scales, divided, fitted = fit_scales(cells, size)
    true = x.square().mean(1).sqrt().log()
    assert float(torch.corrcoef(torch.stack([scales.rows.log(), true]))[0, 1]) > 0.95
    assert torch.allclose(
        divided.rows(0, 200).lo * scales.rows[:, None] * scales.columns, cells.lo, rtol=1e-5
    )
    assert fitted.log_likelihood > size.log_likelihood
    w, _, t = planted(200, 150, 0, 1e-5, 18)
    cells = cells_of(w, t)
    assert fit_scales(cells, fit_size(cells, rms_of(w, t))) is None


@pytest.mark.slow
@pytest.mark.parametrize("seed", [3, 4])
def test_norm_with_scales_counts_their_posterior_variance(seed):
    """With the likeliest scales alone it is 6% to 8% too small."""
    w, x, t = planted(160, 224, 4, 2e-6, seed, rows=1.0)
    cells = cells_of(w, t)
    scales, divided, fitted = fit_scales(cells, fit_size(cells, rms_of(w, t)))
    whole, of_scales = measure_norm(divided, fitted.deviation, scales)
    off = math.log(whole / float(x.norm()))
    assert abs(off) < 2 * math.hypot(of_scales, fitted.error, 0.01)
    assert of_scales < 0.05


def planted_directions(seed, noise):
    """Directions of X/(a·b) off the true ones, their scales, and cells of random entries that they
    do not know.
    """
    rng = np.random.default_rng(seed)
    m, n = 120, 150
    scales = Scales(
        *(torch.tensor(np.exp(0.8 * rng.normal(size=k))).float() for k in (m, n)),
        *2 * (torch.zeros(1),),
    )
    divided = rng.normal(size=(m, 2)) @ rng.normal(size=(2, n))
    u, s, vh = np.linalg.svd(divided + noise * rng.normal(size=(m, n)), full_matrices=False)
    u, s, vh = (torch.tensor(part.copy()) for part in (u[:, :2], s[:2], vh[:2]))
    low_rank = LowRank(u.float(), vh.float(), Shrunk(0.6 * s, s, 1.0), 1.0, 1.0, 1, True)
    x = torch.tensor(divided + 0.5 * rng.normal(size=(m, n))) * scales.of_rows(0, m).double()
    return scales, low_rank, x, torch.tensor(np.flatnonzero(rng.random(m * n) < 0.3))


def test_unscaled_directions_are_the_singular_vectors_of_l():
    scales, low_rank, _, _ = planted_directions(1, 0.5)
    u, s, vh = unscale(low_rank, scales)
    whole = scales.rows.numpy()[:, None] * low_rank.rows(0, 120).numpy() * scales.columns.numpy()
    np.testing.assert_allclose(s.numpy(), np.linalg.svd(whole, compute_uv=False)[:2], rtol=1e-5)
    np.testing.assert_allclose((u * s @ vh).numpy(), whole, atol=1e-5 * float(s[0]))


@pytest.mark.parametrize("seed", range(4))
def test_lengths_of_held_out_cells_fit_all_entries(seed):
    """Cells of very different widths, and directions that are off and 40% too short."""
    scales, low_rank, x, entries = planted_directions(seed, 0.7)
    u, s, vh = unscale(low_rank, scales)
    weight = scales.of_rows(0, 120).double()
    units = (
        torch.stack([torch.outer(u[:, i], vh[i]) / weight for i in range(2)], -1)
        .reshape(-1, 2)
        .numpy()
    )
    target = (x / weight).flatten().numpy()
    true = np.linalg.lstsq(units, target, rcond=None)[0]
    outside = float((target - units @ true).std())
    step = 3.0 * torch.tensor(np.exp(np.random.default_rng(seed).normal(size=x.shape)))
    low = (x / step).floor() * step
    cells = scales.divide(Cells(low, low + step))
    lengths, errors = measure_lengths(
        HeldOutCells(cells.at(entries), entries), low_rank, outside, scales
    )
    assert (errors.numpy() < 0.1 * true[0]).all()
    assert (np.abs(lengths.numpy() - true) < 3.5 * errors.numpy()).all()
    assert true[0] - float(s[0]) > 3 * float(errors[0])


@pytest.mark.slow
@pytest.mark.parametrize("rms", [2e-5, 8e-5])
def test_linear_lengths_need_no_normal_remainder(rms):
    """Where all entries are of about one size, the likelihood of a normal remainder is off, E[x |
    cell] is not.
    """
    rng = np.random.default_rng(8)
    x = np.sign(rng.normal(size=(300, 3)) @ rng.normal(size=(3, 280))) * (
        1 + 0.2 * rng.normal(size=(300, 280))
    )
    x *= rms / np.sqrt((x**2).mean())
    w = torch.tensor(rng.normal(size=x.shape) * 0.02).bfloat16().double()
    cells = cells_of(w, (w + torch.tensor(x)).bfloat16().double()).map(
        lambda part: (part / rms).float()
    )
    u, s, vh = np.linalg.svd(x / rms, full_matrices=False)
    values = Shrunk(torch.tensor(0.8 * s[:3]), torch.tensor(s[:3]), 0.1)
    low_rank = LowRank(
        torch.tensor(u[:, :3]).float(), torch.tensor(vh[:3]).float(), values, 0.6, 0.2, 1, True
    )
    entries = torch.arange(0, x.size, 3)
    held_out = HeldOutCells(cells.at(entries), entries)
    lengths, error = estimate_linear_lengths(
        held_out, low_rank, fit_density(cells, fit_size(cells, 1.0).deviation)
    )
    assert error < 0.03 * s[2]
    assert (np.abs(lengths.numpy() - s[:3]) < 3.5 * error).all()


def drawn(kind, side, rng):
    if kind == "uniform":
        return rng.uniform(-math.sqrt(3), math.sqrt(3), (side, side))
    if kind == "product":  # of rank 2: kurtosis 6
        return rng.normal(size=(side, 2)) @ rng.normal(size=(2, side)) / math.sqrt(2)
    return (
        rng.normal(size=(side, side))
        if kind == "normal"
        else rng.laplace(size=(side, side)) / math.sqrt(2)
    )


def hidden(kind, rms, side=200, seed=4):
    """Return cells and X in units of its rms."""
    rng = np.random.default_rng(seed)
    w = torch.tensor(rng.normal(size=(side, side)) * 0.02).bfloat16().double()
    x = torch.tensor(drawn(kind, side, rng) * rms)
    t = (w + x).bfloat16().double()
    below, above = cell_halves(t, GRIDS["bfloat16"])
    cells = Cells(((t - w - below) / rms).float(), ((t - w + above) / rms).float())
    return cells, x / rms, float((t == w).double().mean())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["uniform", "normal", "laplace", "product"])
def test_size_does_not_depend_on_the_distribution(kind):
    cells, x, still = hidden(kind, 4e-6)
    assert still > 0.94
    true = float(x.square().mean().sqrt())
    result = fit_density(cells, fit_size(cells, 1.0).deviation)
    assert result.deviation == pytest.approx(true, rel=0.035)
    assert abs(math.log(result.deviation / true)) < 2.5 * result.error
    assert 0.005 < result.error < 0.02


def test_likelihood_equals_definition_and_fit_maximizes_it():
    cells, _, _ = hidden("uniform", 1e-5, 60)
    unit = fit_size(cells, 1.0).deviation
    grid = torch.arange(0, END + SPACING / 2, SPACING, dtype=torch.float64)
    result = hidden_density._compute_likelihood(cells, grid * unit, KERNEL * unit)
    lo, hi = (side.double().numpy().reshape(-1, 1) for side in (cells.lo, cells.hi))
    z, s = grid.numpy() * unit, KERNEL * unit
    mass = sum(ndtr((hi - sign * z) / s) - ndtr((lo - sign * z) / s) for sign in (1, -1))
    expected = mass / mass.max(1, keepdims=True)
    assert np.abs(result.numpy() - expected).max() < 5e-3
    weights, _, features = hidden_density._fit_coefficients(
        result, torch.ones(len(result)).double(), grid
    )
    best = float((result @ weights).log().sum())
    for column in features.T:
        for step in (-0.05, 0.05):
            other = torch.softmax(weights.log() + step * column, 0)
            assert float((result @ other).log().sum()) < best


@pytest.mark.slow
def test_sampled_entries_estimate_full_size(monkeypatch):
    cells, x, _ = hidden("uniform", 1e-5, 256)
    whole = fit_density(cells, fit_size(cells, 1.0).deviation)
    monkeypatch.setattr(hidden_density, "SAMPLE", 2**14)
    part = fit_density(cells, fit_size(cells, 1.0).deviation)
    assert part.deviation == pytest.approx(whole.deviation, rel=0.02)
    assert part.deviation != whole.deviation
    assert part.deviation == pytest.approx(float(x.square().mean().sqrt()), rel=0.03)
    monkeypatch.setattr(hidden_density, "SHAPE_SAMPLE", 2**12)
    monkeypatch.setattr(hidden_density, "LARGE_SAMPLE", 2**13)
    guess = fit_size(cells, 1.0).deviation
    shaped = fit_shape(cells, guess)
    assert shaped.deviation == pytest.approx(
        fit_deviation(cells, shaped.shape, guess).deviation, rel=0.01
    )


@pytest.mark.parametrize(
    "shape", [NORMAL, *FLATTER, *HEAVIER], ids=lambda shape: f"{shape.kurtosis:.2f}"
)
def test_shapes_have_variance_1_and_moments_of_their_density(shape):
    x = np.linspace(-12, 12, 200_001)
    density = sum(
        w * np.exp(-(((x - mean) / s) ** 2) / 2) / (s * math.sqrt(2 * math.pi))
        for w, mean, s in shape.parts
    )
    assert trapezoid(density * x**2, x) == pytest.approx(1, abs=1e-6)
    assert trapezoid(density * x**4, x) == pytest.approx(shape.kurtosis, rel=1e-3)
    lo, hi = torch.tensor([[-0.5, 0.3, 1.0]]).double(), torch.tensor([[0.4, 0.5, 3.0]]).double()
    result = shape.moments(Cells(lo, hi), 1.3)
    for k in range(3):
        inside = (x * 1.3 >= float(lo[0, k])) & (x * 1.3 <= float(hi[0, k]))
        mass = trapezoid(np.where(inside, density, 0), x)
        mean = trapezoid(np.where(inside, density * x, 0), x) * 1.3 / mass
        variance = trapezoid(np.where(inside, density * (x * 1.3 - mean) ** 2, 0), x) / mass
        assert float(result.log_mass[0, k]) == pytest.approx(math.log(mass), abs=2e-3)
        assert float(result.mean[0, k]) == pytest.approx(mean, abs=1e-3)
        assert float(result.variance[0, k]) == pytest.approx(variance, rel=5e-3)


@pytest.mark.parametrize(
    ("kind", "low", "high"), [("uniform", 1.4, 2.2), ("normal", 2.6, 3.6), ("laplace", 4.0, 7.0)]
)
def test_hidden_entry_shape_is_estimated(kind, low, high):
    """The likelihood is that of the definition, and no smaller than the normal one."""
    cells = hidden(kind, 2e-5)[0].map(torch.Tensor.double)
    normal = fit_size(cells, 1.0)
    result = fit_shape(cells, normal.deviation)
    assert low <= result.shape.kurtosis <= high
    assert result.log_likelihood >= normal.log_likelihood - 1e-4 * abs(normal.log_likelihood)
    edges = [cells.lo.numpy() / result.deviation, cells.hi.numpy() / result.deviation]
    mass = sum(
        w * (ndtr((edges[1] - m) / s) - ndtr((edges[0] - m) / s)) for w, m, s in result.shape.parts
    )
    assert result.log_likelihood == pytest.approx(float(np.log(mass).sum()), rel=1e-3)
