"""The kernels that are timed are those that the methods call, on matrices of the kind they say."""

import pytest
import torch

from lora_diag.linalg.methods import DECAY, make_decaying, time_full, time_leading, time_pass

pytestmark = pytest.mark.slow


def test_times_grow_with_work():
    """Of 729 times the multiply-adds and 1024 times the entries; the least of several, as others may take the core."""
    small, large = [time_full(160) for _ in range(5)], time_full(1440)
    assert 0 < min(product for product, _ in small) < large[0]
    assert 0 < min(values for _, values in small) < large[1]
    assert 0 < min(time_pass(64) for _ in range(5)) < time_pass(2048)
    assert time_leading(600, 8) > 0


def test_matrix_of_few_values_decays():
    s = torch.linalg.svdvals(make_decaying(300).double())
    slope = torch.log(s[80] / s[4]) / torch.log(torch.tensor(81.0 / 5.0))
    assert abs(float(slope) + DECAY) < 0.25
