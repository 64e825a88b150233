"""Folding a rate network into a problem."""

import pytest
import torch

from neurosde import problem

D = torch.float64


@pytest.mark.parametrize("shapes", [((1, 1, 1), (3, 3)), ((2, 1, 3), (2, 3, 3)), ((4, 1, 1), (4, 3, 3))])
def test_large_weights_are_scaled_as_small_ones_are(monkeypatch, shapes):
    """By numpy, with gradients of first and second order of its own."""
    gain, weights = (torch.randn(*shape, dtype=D, requires_grad=True) for shape in shapes)
    monkeypatch.setattr(problem, "TORCH_GRAIN", 0)
    scaled = problem._scaled(gain, weights)
    assert scaled.grad_fn is not None and "Scaled" in scaled.grad_fn.name()
    assert torch.equal(scaled, gain * weights)
    torch.autograd.gradcheck(problem._scaled, (gain, weights))
    torch.autograd.gradgradcheck(problem._scaled, (gain, weights))
