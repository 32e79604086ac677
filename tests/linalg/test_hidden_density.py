"""The size of hidden entries from a smooth density: updates of known size, of several distributions."""

import math

import numpy as np
import pytest
import torch
from scipy.special import ndtr

from lora_diag.linalg import hidden_models as hidden_density
from lora_diag.linalg.cells import GRIDS, Cells, cell_halves
from lora_diag.linalg.hidden import fit_size
from lora_diag.linalg.hidden_models import END, KERNEL, SPACING, fit_density


def drawn(kind, side, rng):
    if kind == "uniform":
        return rng.uniform(-math.sqrt(3), math.sqrt(3), (side, side))
    if kind == "product":  # of rank 2: kurtosis 6
        return rng.normal(size=(side, 2)) @ rng.normal(size=(2, side)) / math.sqrt(2)
    return rng.normal(size=(side, side)) if kind == "normal" else rng.laplace(size=(side, side)) / math.sqrt(2)


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
    weights, _, features = hidden_density._fit_coefficients(result, grid)
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
