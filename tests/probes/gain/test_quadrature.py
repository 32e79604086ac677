"""The rules against integrals of polynomials, and an integral in closed form."""

import numpy as np
import pytest
import torch

from lora_diag.models.directions import Projection, WholeUpdate
from lora_diag.probes.gain.quadrature import Quadrature


@pytest.mark.parametrize("count", [3, 5, 7, 9, 15])
def test_rule_is_exact_up_to_its_degree_and_no_further(count):
    rule = Quadrature.of(count)
    assert len(rule.nodes) == count
    assert (rule.nodes[0], rule.nodes[-1]) == (0.0, 1.0)
    for weights, degree in ((rule.weights, 2 * count - 3), (rule.embedded, count // 2)):
        for power in range(degree + 1):
            assert weights @ rule.nodes**power == pytest.approx(1 / (power + 1), abs=1e-12)
    even = 2 * count - 2
    if count < 9:  # later errors are near rounding
        assert abs(rule.weights @ rule.nodes**even - 1 / (even + 1)) > 1e-9
    assert not rule.embedded[1::2].any()


def test_directions_of_quadratic_loss_equal_closed_form():
    """½‖Wx − y‖² is quadratic in W: a_i = −σ_i u_iᵀ(W_0 + ΔW/2 − y)v_i, summed over x = e_j."""
    torch.manual_seed(0)
    start, change, target = torch.randn(3, 3, 4)
    u, s, vh = torch.linalg.svd(change, full_matrices=False)
    module = torch.nn.Linear(4, 3, bias=False)
    inputs = torch.eye(4)[None]
    split = Projection(module, s, u, vh.T)
    whole = WholeUpdate([(module, "weight")], change)
    rule = Quadrature.of(3)
    found = np.zeros((2, 3))
    for t, weight in zip(rule.nodes, rule.weights, strict=True):
        module.weight.data = start + float(t) * change
        module.weight.requires_grad_(False)
        for tracker in (split, whole):
            tracker.start(1)
        output = module(inputs.clone().requires_grad_())
        mask = torch.ones(1, 4, dtype=torch.bool)
        split.on_call(module, ((inputs,), {}), output, mask)
        output = whole.on_call(module, ((inputs,), {}), output, mask)
        (0.5 * (output[0].T - target) ** 2).sum().backward()
        found[0] -= weight * split.terms()[0].numpy()
        found[1] -= weight * whole.terms()[0].numpy()
    gradient = start + change / 2 - target
    expected = -s * torch.einsum("oi,on,in->i", u, gradient, vh)
    assert found[0] == pytest.approx(expected.numpy(), rel=1e-4)
    assert found[1, 0] == pytest.approx(float(expected.sum()), rel=1e-4)
