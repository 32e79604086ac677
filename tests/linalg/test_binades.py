"""Size of an update by binade of |W|, against likelihoods written out."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import ndtr
from scipy.stats import truncnorm

from lora_diag.linalg.cells import Binades


@pytest.mark.parametrize(("growth", "bad"), [(0.0, False), (0.3, True)])
def test_change_proportional_to_weight_is_uneven(growth, bad):
    rng = np.random.default_rng(1)
    w = torch.tensor(2.0 ** rng.uniform(-8, -4, size=(80, 100))).bfloat16().double()
    binade = torch.frexp(w)[1].numpy() + 6
    x = 2e-4 * np.exp(growth * binade) * rng.normal(size=w.shape)
    t = (w + torch.tensor(x)).bfloat16().double()
    ulp = 2.0 ** (torch.frexp(t)[1].numpy() - 8)  # not exact at powers of two, of which there are few
    lo, hi = ((t - w).numpy() + side * ulp / 2 for side in (-1, 1))

    def size(where):
        def loss(log_s):
            return -np.log(ndtr(hi[where] / math.exp(log_s)) - ndtr(lo[where] / math.exp(log_s))).sum()

        return minimize_scalar(loss, bounds=(-10, -6.5), method="bounded").x

    whole = math.exp(size(np.ones(w.shape, bool)))
    mean, variance = truncnorm.stats(lo / whole, hi / whole)
    known = 1 - variance
    counts = Binades()
    for rows in (slice(0, 30), slice(30, 80)):
        parts = (mean[rows] ** 2 + variance[rows], known[rows])
        changed, chance = t[rows] != w[rows], torch.full((rows.stop - rows.start, 100), 0.5)
        counts.add(w[rows], changed, chance, *map(torch.tensor, parts))
    result = np.array([size(binade == b) for b in np.unique(binade)])
    weight = np.array([known[binade == b].sum() for b in np.unique(binade)])
    spread = math.sqrt(np.cov(result, aweights=weight, ddof=0))
    assert counts.uneven == pytest.approx(spread if bad else 0.0, rel=0.15, abs=0.02)
    assert (counts.uneven > counts.most_uneven) is bad
