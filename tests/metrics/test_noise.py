"""The noise edge against simulated rounding noise, and against the law of Marchenko and Pastur."""

import math

import numpy as np
import pytest
import torch
from scipy import optimize

from benchmarks import noise as simulated
from lora_diag.layers.resolution import noise_of, resolution
from lora_diag.linalg.difference import difference
from lora_diag.linalg.methods import decompose
from lora_diag.metrics.resolution import Noise, _minimize_edge, signal_rank

CPU = torch.device("cpu")


def noise(variance: np.ndarray) -> Noise:
    fourth = variance**2
    return Noise(variance.sum(1), variance.sum(0), fourth.sum(1), fourth.sum(0))


def profiles() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((96, 64))
    outlier = weights.copy()
    outlier[3, 5] = 500.0
    rows = weights * np.exp(rng.standard_normal((96, 1)))
    both = rows * np.exp(0.7 * rng.standard_normal((1, 64)))
    column = weights * np.where(np.arange(64) == 7, 30.0, 1.0)
    binades = {
        "even": np.ones((96, 64)),
        "weights": weights,
        "rows": rows,
        "both": both,
        "outlier": outlier,
    }
    return {
        name: 4.0 ** np.floor(np.log2(np.abs(w))) / 12
        for name, w in (binades | {"column": column}).items()
    }


@pytest.mark.parametrize(("name", "variance"), profiles().items())
def test_edge_is_above_99_of_100_noise_matrices(name, variance):
    rng = np.random.default_rng(1)
    errors = rng.uniform(-0.5, 0.5, (300, *variance.shape)) * np.sqrt(12 * variance)
    tops = np.linalg.norm(errors, 2, axis=(1, 2))
    edge = noise(variance).edge
    assert (tops > edge).mean() <= 0.01
    most = np.quantile(tops, 0.99)
    assert edge < (2.2 if name == "outlier" else 1.3) * most  # and not far above
    if name in {"even", "weights", "rows"}:
        assert edge < 1.2 * most


@pytest.mark.parametrize("shape", [(400, 100), (300, 300), (50, 1000)])
def test_edge_of_uniform_noise_is_marchenko_pastur(shape):
    edge = noise(np.full(shape, 4.0)).edge
    limit = 2 * (math.sqrt(shape[0]) + math.sqrt(shape[1]))
    assert limit < edge < 1.06 * limit


@pytest.mark.parametrize("spread", [0.1, 1.0, 2.5])
@pytest.mark.parametrize("pole", [1.0, 1.3, 6.0])
def test_noise_edge_equals_minimum_of_scipy(spread, pole):
    rng = np.random.default_rng(int(10 * spread))
    a, b = (np.exp(spread * rng.normal(size=size)) for size in (60, 400))
    a, b = a / a.sum(), b / b.sum()
    most_p, most_q = ((1 - 1e-9) / (pole * each.max()) for each in (a, b))

    def squared(log_p):
        p = math.exp(log_p)
        target = p * (a / (1 - a * p)).sum()

        def above(q):
            return q * (b / (1 - b * q)).sum() - target

        q = (
            most_q
            if above(most_q) <= 0
            else optimize.brentq(above, 0, most_q, xtol=1e-14 * most_q, rtol=1e-12)
        )
        return target / p / q

    top = math.log(most_p)
    result = optimize.minimize_scalar(
        squared, bounds=(top - 14, top), method="bounded", options={"xatol": 1e-8}
    )
    edge, at = _minimize_edge(a, b, pole * a.max(), pole * b.max())
    assert edge == pytest.approx(min(result.fun, squared(top)), rel=1e-6)
    assert math.log(at) == pytest.approx(result.x if result.fun < squared(top) else top, abs=1e-3)


def seen(base, tuned):
    result = difference([(base, tuned)], base.shape, CPU)
    s = np.linalg.svd((tuned.double() - base.double()).numpy(), compute_uv=False)
    own = noise_of(result.rounding.noise, result.rounding.sides)
    return result, own, signal_rank(s, own.edge, complete=True)


def planted(rng, shape, rank, rms):
    delta = rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, shape[1]))
    return torch.from_numpy(delta * rms / np.sqrt((delta**2).mean()))


def heteroscedastic(rng, shape=(256, 192)):
    return torch.from_numpy(
        rng.standard_normal(shape) * 0.02 * np.exp(rng.standard_normal((shape[0], 1)))
    )


@pytest.mark.parametrize("rms", [1e-3, 3e-3])
def test_planted_rank_is_found_on_rows_of_different_scale(rms):
    rng = np.random.default_rng(0)
    base = heteroscedastic(rng).bfloat16()
    tuned = (base.double() + planted(rng, base.shape, 4, rms)).bfloat16()
    assert seen(base, tuned)[2] == 4


def test_rounded_copy_has_no_signal():
    rng = np.random.default_rng(0)
    for _ in range(5):
        start = heteroscedastic(rng).float()
        result, own, signal = seen(start.bfloat16(), start)
        assert signal == 0
        assert result.rounding.start == "rounded"
        assert result.rounding.base_rounding[0] == pytest.approx(1.0, abs=0.1)
        assert own.fro == pytest.approx(result.fro, rel=0.05)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_rounded_base_is_detected_despite_outlier(share):
    rng = np.random.default_rng(0)
    for scale in (
        np.exp(rng.standard_normal((400, 1))) * np.exp(0.7 * rng.standard_normal((1, 100))),
        1.0,
    ):
        start = torch.from_numpy(rng.standard_normal((400, 100)) * 0.02 * scale).float()
        start[7, 3] = 20.0
        base = start.bfloat16()
        error = (base.double() - start.double()).square().median().sqrt()
        delta = torch.from_numpy(rng.standard_normal(start.shape)) * error
        tuned = (start + delta * math.sqrt(1 / share - 1)).float()
        assert difference([(base, tuned)], start.shape, CPU).rounding.start == "rounded"
        assert (
            difference([(base, (base + delta).float())], start.shape, CPU).rounding.start == "exact"
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["larger where w is small", "in proportion to w", "rank 4"])
def test_changes_proportional_to_weight_are_not_rounding(kind):
    shares = [share for share in simulated.SHARES if share >= 0.03]
    for weights in simulated.WEIGHTS:
        text = simulated.judge_starts(weights, kind, (256, 256), 0)
        assert {"rounded", "unknown"} >= {text[share, "rounded"] for share in shares}
        assert {"exact", "unknown"} >= {text[share, "exact"] for share in shares}
        assert (text[0.3, "rounded"], text[0.3, "exact"]) == ("rounded", "exact")


def quantize(weights):
    """Return bfloat16 weights after Q4_0, in which the largest of 32 keeps its value, at a scale in
    float16.
    """
    groups = weights.reshape(-1, 32)
    largest = groups.gather(1, groups.abs().argmax(1, keepdim=True))
    scale = (largest / -8).half().double()
    return (scale * (groups / scale).round().clamp(-8, 7)).reshape(weights.shape)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("size", [1e-6, 1e-5])
def test_copy_of_dequantized_weights_is_not_the_start(size, seed):
    """Rounding errors of its levels are not spread evenly, so that a copy fits the
    start as well.
    """
    rng = np.random.default_rng(seed)
    start = quantize(torch.from_numpy(rng.standard_normal((192, 320)) * 0.02).bfloat16().double())
    tuned = (start + planted(rng, start.shape, 4, size)).float()
    rounding = difference([(start.bfloat16(), tuned)], start.shape, CPU).rounding
    assert (rounding.start, rounding.base_rounding) == ("unknown", None)
    assert rounding.fro >= float((start.bfloat16().double() - start).norm())


def test_start_is_unknown_where_rounding_errors_are_uneven():
    """Weights of every other range of |w| were on BASE's grid, those between them were rounded."""
    rng = np.random.default_rng(7)
    start = torch.from_numpy(rng.standard_normal((256, 256)) * 0.02)
    base = start.bfloat16().double()
    fine = torch.where((start.abs() * 300).floor() % 2 == 0, base, start)
    moves = planted(rng, start.shape, 4, 1e-6)
    assert (
        difference([(base.bfloat16(), (fine + moves).float())], start.shape, CPU).rounding.start
        == "unknown"
    )
    assert (
        difference([(base.bfloat16(), (base + moves).float())], start.shape, CPU).rounding.start
        == "exact"
    )


def test_unknown_start_counts_rounding_of_base():
    """Rounding makes up 0.1%: one layer does not tell; its rounding is no signal in either case."""
    rng = np.random.default_rng(0)
    start = torch.from_numpy(rng.standard_normal((256, 192)) * 0.02).float()
    base = start.bfloat16()
    error = float((base.double() - start.double()).norm())
    moves = planted(rng, start.shape, 4, 1.0)
    moves *= error * math.sqrt(1 / 1e-3 - 1) / float(moves.norm())
    for origin, true in ((start.double(), error), (base.double(), 0.0)):
        result, own, signal = seen(base, (origin + moves).float())
        assert (result.rounding.start, signal) == ("unknown", 4)
        assert own.fro == pytest.approx(error, rel=0.02)
        assert true <= 1.02 * own.fro


def test_absorbed_outlier_is_not_a_signal():
    for seed in range(4):
        rng = np.random.default_rng(seed)
        start = torch.from_numpy(rng.standard_normal((128, 128)) * 0.02)
        start[rng.integers(128), rng.integers(128)] = 20.0
        delta = planted(rng, start.shape, 4, 8e-3)
        assert seen(start.bfloat16(), (start + delta).bfloat16())[2] == 4


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_rounded_base_differs_from_exact_start(share):
    rng = np.random.default_rng(0)
    start = torch.from_numpy(rng.standard_normal((400, 300)) * 0.02).float()
    base = start.bfloat16()
    error = (base.double() - start.double()).square().mean().sqrt()
    delta = torch.from_numpy(rng.standard_normal(start.shape)) * error * math.sqrt(1 / share - 1)
    rounded = difference([(base, (start + delta).float())], start.shape, CPU)
    exact = difference([(base, (base.double() + delta).float())], start.shape, CPU)
    assert (rounded.rounding.start, exact.rounding.start) == ("rounded", "exact")
    assert (noise_of(rounded.rounding.noise, 1).fro / rounded.fro) ** 2 == pytest.approx(
        share, rel=0.1
    )
    assert noise_of(exact.rounding.noise, 1).fro < 1e-3 * exact.fro


def test_sparse_update_noise_is_at_changed_entries():
    rng = np.random.default_rng(0)
    base = torch.from_numpy(rng.standard_normal((256, 256)) * 0.02).bfloat16()
    delta = torch.from_numpy(rng.standard_normal(base.shape) * 1e-2)
    for trained in (
        torch.from_numpy(rng.random(base.shape)) < 0.05,
        torch.arange(256)[:, None] < 10,
    ):
        true = torch.where(trained, delta, 0.0)
        tuned = (base.double() + true).bfloat16()
        result, own, _ = seen(base, tuned)
        error = (tuned.double() - base.double() - true).norm()
        assert result.rounding.untouched == pytest.approx(
            1 - float(trained.double().mean()), abs=0.03
        )
        assert own.fro == pytest.approx(math.sqrt(2) * float(error), rel=0.1)  # both sides count


def test_absorbed_update_is_not_sparse():
    rng = np.random.default_rng(0)
    base = torch.from_numpy(rng.standard_normal((256, 256)) * 0.02).bfloat16()
    tuned = (base.double() + torch.from_numpy(rng.standard_normal(base.shape) * 1e-5)).bfloat16()
    result, own, signal = seen(base, tuned)
    assert result.unchanged > 0.85
    assert result.rounding.untouched < 0.2
    assert own.fro > 0.7 * result.fro
    assert signal == 0


def untouched_of_few_entries(rows, draw):
    """Return the estimates for 60 updates of few entries, without those that rounding absorbed
    whole.
    """
    estimates = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        base = torch.from_numpy(rng.standard_normal((rows, 10)) * 0.02).bfloat16()
        tuned = (base.double() + torch.from_numpy(draw(rng, base.shape))).bfloat16()
        if (tuned != base).any():
            estimates.append(difference([(base, tuned)], base.shape, CPU).rounding.untouched)
    return estimates


@pytest.mark.parametrize("rows", [10, 20, 30])
def test_few_entries_do_not_make_absorbed_update_sparse(rows):
    absorbed = untouched_of_few_entries(
        rows, lambda rng, shape: rng.standard_normal(shape) * 10 ** rng.uniform(-5, -4)
    )
    assert max(absorbed) < 0.2


@pytest.mark.parametrize("rows", [20, 30])
def test_few_entries_show_sparse_update(rows):
    sparse = untouched_of_few_entries(
        rows,
        lambda rng, shape: np.where(
            rng.random(shape) < 0.1, rng.standard_normal(shape) * 1e-2, 0.0
        ),
    )
    assert np.mean(sparse) == pytest.approx(0.9, abs=0.08)


def test_subtraction_rounding_is_not_a_signal():
    rng = np.random.default_rng(0)
    base = torch.from_numpy(rng.standard_normal((256, 192)) * 0.02).float()
    tuned = (base.double() + planted(rng, base.shape, 8, 0.05)).float()
    result = difference([(base, tuned)], base.shape, CPU)
    s = np.linalg.svd(result.matrix.double().numpy(), compute_uv=False)
    assert (
        signal_rank(s, noise_of(result.rounding.noise, result.rounding.sides).edge, complete=True)
        == 8
    )


def test_gram_rounding_is_not_a_signal():
    """σ² is found to some ε·σ_1²: of a large update in float32, values near 1e-8 σ_1 stand above
    the files' noise.
    """
    rng = np.random.default_rng(0)
    base = torch.from_numpy(rng.standard_normal((512, 256)) * 0.02).float()
    tuned = (base.double() + planted(rng, base.shape, 8, 0.05)).float()
    result = difference([(base, tuned)], base.shape, CPU)
    factors = decompose(result.matrix, "gram")
    edge = noise_of(result.rounding.noise, result.rounding.sides).edge
    assert factors.s[8] > edge  # so that this test can fail
    seen = resolution(result, factors)
    assert (seen.signal_rank, int((factors.s > seen.edge).sum())) == (8, 8)
