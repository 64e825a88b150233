"""The shapes that the public functions announce are the shapes they take and return."""

import beartype
import jaxtyping
import pytest
import torch

from neurosde import RateSDE, odeint, sdeint


def enforced(function):
    return jaxtyping.jaxtyped(typechecker=beartype.beartype)(function)


@pytest.mark.parametrize("solver", [sdeint, odeint])
@pytest.mark.parametrize("batch", [(), (4,), (2, 4)])
def test_solvers_return_time_first(solver, batch):
    h = enforced(solver)(RateSDE(torch.zeros(3, 3)), torch.zeros(*batch, 3), torch.arange(5) * 0.1, dt=0.1)
    assert h.shape == (5, *batch, 3)


def test_a_wrong_shape_is_seen():
    with pytest.raises(jaxtyping.TypeCheckError):
        enforced(RateSDE.g)(RateSDE(torch.zeros(3, 3)), 0.0, torch.zeros(()))
    assert enforced(RateSDE.g)(RateSDE(torch.zeros(3, 3)), 0.0, torch.zeros(2, 3)).shape == (2, 3)
