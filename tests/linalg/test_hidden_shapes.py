"""Shapes of the entries' distribution: against definitions written out, and updates whose size only they give."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid
from scipy.special import ndtr

from lora_diag.linalg.cells import GRIDS, Cells, cell_halves
from lora_diag.linalg.hidden import fit_size
from lora_diag.linalg.hidden_models import FLATTER, HEAVIER, NORMAL, fit_shape


@pytest.mark.parametrize("shape", [NORMAL, *FLATTER, *HEAVIER], ids=lambda shape: f"{shape.kurtosis:.2f}")
def test_shapes_have_variance_1_and_moments_of_their_density(shape):
    x = np.linspace(-12, 12, 200_001)
    density = sum(w * np.exp(-(((x - mean) / s) ** 2) / 2) / (s * math.sqrt(2 * math.pi)) for w, mean, s in shape.parts)
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


@pytest.mark.parametrize(("kind", "low", "high"), [("uniform", 1.4, 2.2), ("normal", 2.6, 3.6), ("laplace", 4.0, 7.0)])
def test_hidden_entry_shape_is_estimated(kind, low, high):
    """The likelihood is that of the definition, and no smaller than the normal one."""
    rng = np.random.default_rng(4)
    draw = {
        "uniform": rng.uniform(-math.sqrt(3), math.sqrt(3), (200, 200)),
        "normal": rng.normal(size=(200, 200)),
        "laplace": rng.laplace(size=(200, 200)) / math.sqrt(2),
    }
    w = torch.tensor(rng.normal(size=(200, 200)) * 0.02).bfloat16().double()
    x = torch.tensor(draw[kind] * 2e-5)
    t = (w + x).bfloat16().double()
    below, above = cell_halves(t, GRIDS["bfloat16"])
    cells = Cells(t - w - below, t - w + above)
    normal = fit_size(cells, 2e-5)
    result = fit_shape(cells, normal.deviation)
    assert low <= result.shape.kurtosis <= high
    assert result.log_likelihood >= normal.log_likelihood - 1e-4 * abs(normal.log_likelihood)
    edges = [cells.lo.numpy() / result.deviation, cells.hi.numpy() / result.deviation]
    mass = sum(w * (ndtr((edges[1] - m) / s) - ndtr((edges[0] - m) / s)) for w, m, s in result.shape.parts)
    assert result.log_likelihood == pytest.approx(float(np.log(mass).sum()), rel=1e-3)
