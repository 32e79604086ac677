"""The bound on the error of leading spaces: it covers perturbed vectors, and grows without limit as
the gap closes.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_diag.linalg.rotation import Spaces, bound_space_error, leading_spaces, principal_angles
from tests import oracles


@given(seed=st.integers(0, 10**6), size=st.sampled_from([1e-9, 1e-6, 1e-3]), k=st.integers(1, 6))
def test_bound_covers_perturbed_spaces(seed, size, k):
    s = np.array([9.0, 7.5, 6, 5, 4, 3, 2, 1])
    matrix = torch.tensor(oracles.with_spectrum(s, 14, 8, seed))
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    source = torch.Generator().manual_seed(seed)
    u1, v1 = (
        torch.linalg.qr(
            x[:, :k] + size * torch.randn(len(x), k, generator=source, dtype=torch.float64)
        )[0]
        for x in (u, vh.T)
    )
    signs = (u1 * u[:, :k]).sum(0).sign(), (v1 * vh.T[:, :k]).sum(0).sign()
    computed = Spaces(torch.tensor(s), u1 * signs[0], v1 * signs[1], "")
    bound = bound_space_error(matrix, computed, k)
    for close, true in ((u1, u[:, :k]), (v1, vh.T[:, :k])):
        assert (
            np.sin(np.radians(float(principal_angles(true, close).max())))
            <= bound * (1 + 1e-9) + 1e-13
        )


@pytest.mark.parametrize("method", ["auto", "exact", "gram", "krylov"])
def test_methods_agree_and_bound_their_error(method):
    matrix = torch.tensor(oracles.with_spectrum(np.linspace(5, 1, 132), 140, 132, 1))
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    found = leading_spaces(matrix, 12, method)
    np.testing.assert_allclose(found.s, s, rtol=1e-10)
    bound = np.degrees(np.arcsin(bound_space_error(matrix, found, 12)))
    assert bound < 1e-3
    for space, truth in ((found.u, u[:, :12]), (found.v, vh[:12].T)):
        assert float(principal_angles(truth, space).max()) <= bound + 1e-10


def test_spaces_without_a_gap_are_arbitrary():
    assert bound_space_error(torch.eye(5), leading_spaces(torch.eye(5), 2), 2) == 1.0
