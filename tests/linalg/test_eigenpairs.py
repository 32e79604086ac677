"""Both ends of a spectrum from products alone, against NumPy's dense eigenvalues."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_diag.errors import InputError
from lora_diag.linalg.krylov import DENSE_UP_TO, eigenpairs
from tests.messages import raises_naming

CPU = torch.device("cpu")


def symmetric(values, seed):
    """A symmetric matrix with these eigenvalues, float64."""
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.standard_normal((len(values), len(values))))
    return (q * np.asarray(values)) @ q.T


def found(h, count, end, seed=0):
    matrix = torch.from_numpy(h).float()
    largest = float(np.linalg.eigvalsh(h)[-1]) if end == "smallest" else 0.0
    return eigenpairs(lambda x: matrix @ x, len(h), count, end, seed, CPU, largest)


@given(
    st.integers(2, 2 * DENSE_UP_TO),
    st.integers(1, 6),
    st.sampled_from(["largest", "smallest"]),
    st.sampled_from(["spread", "spikes", "repeated", "negative", "low rank", "zero"]),
    st.integers(0, 100),
)
@settings(max_examples=40, deadline=None)
def test_values_and_vectors_equal_dense_solver(size, count, end, kind, seed):
    rng = np.random.default_rng(seed)
    values = {
        "spread": rng.standard_normal(size),
        "spikes": np.r_[100.0, -50.0, rng.standard_normal(size)][:size],
        "repeated": np.r_[np.full(min(3, size), 2.0), np.full(min(3, size), -3.0), rng.random(size)][:size],
        "negative": -1 - rng.random(size),
        "low rank": np.r_[3.0, 1.0, np.zeros(size)][:size],
        "zero": np.zeros(size),
    }[kind]
    count = min(count, size)
    h = symmetric(values, seed)
    truth = np.linalg.eigvalsh(h)
    truth = truth[::-1] if end == "largest" else truth
    answer = found(h, count, end)
    scale = max(np.abs(truth).max(), 1e-6)
    assert len(answer.values) == count
    values = answer.values.numpy()
    near = 2e-3 * scale
    assert values[0] == pytest.approx(truth[0], abs=near)
    # Behind the first one may be passed over, as a copy is that comes by rounding alone; never is one beyond its place.
    assert np.abs(values[:, None] - truth).min(1).max() <= near
    beyond = values - truth[:count] if end == "largest" else truth[:count] - values
    assert beyond.max() <= near
    v = answer.vectors.double().numpy()
    np.testing.assert_allclose(v.T @ v, np.eye(count), atol=1e-4)
    rest = h @ v[:, 0] - answer.values[0].item() * v[:, 0]
    assert answer.residual == pytest.approx(np.linalg.norm(rest), abs=1e-5 * scale)
    assert np.linalg.norm(rest) <= 2e-3 * scale
    # no unit vector bends more than the largest eigenvalue: what the loss bound stands on
    x = rng.standard_normal((size, 20))
    quotients = np.einsum("ij,ij->j", x, h @ x) / (x**2).sum(0)
    outermost = answer.values[0].item()
    assert (quotients <= outermost + 1e-3 * scale).all() if end == "largest" else True
    assert (quotients >= outermost - 1e-3 * scale).all() if end == "smallest" else True


def test_products_are_counted_and_one_seed_gives_one_answer():
    h = symmetric(np.linspace(-1, 1, 200), 3)
    matrix, calls = torch.from_numpy(h).float(), []

    def product(x):
        calls.append(x)
        return matrix @ x

    one = eigenpairs(product, 200, 3, "largest", 5, CPU)
    assert one.products == len(calls)
    again = eigenpairs(product, 200, 3, "largest", 5, CPU)
    assert torch.equal(one.vectors, again.vectors)


def test_non_finite_or_unconverged_matrix_is_reported(monkeypatch):
    with pytest.raises(InputError, match="not finite"):
        eigenpairs(lambda x: x * float("nan"), 100, 1, "largest", 0, CPU)
    monkeypatch.setattr("lora_diag.linalg.krylov.MAX_RESTARTS", 1)
    with raises_naming(InputError, "converge", 1):
        found(symmetric(np.linspace(0, 1, 400), 0), 8, "largest")
