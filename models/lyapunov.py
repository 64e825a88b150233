"""How long nearby states of a network stay together: its Lyapunov time, and how soon gradients grow.

Tangents of the noise-free network follow P_{t+1} = J_t P_t, with J_t = a + b W diag φ'(h_t) for the coefficients a, b
of an Euler step (`RateSDE.euler_coefficients`), here along the states h_t that were recorded. Of the largest singular
value

    λ = lim log|P_t|/t,    Λ(t) = ⟨log|P_t|⟩,

λ is the largest Lyapunov exponent and Λ(t) the mean growth over the windows of length t of a recording. It is
subadditive, so that λ = inf Λ(t)/t: the time t* at which Λ is 1 is no longer than the Lyapunov time 1/λ. It is that for
a constant normal J, and much shorter for the weights of networks, far from normal, whose tangents grow before they
align. Of 20 neurons with g = 2.5 (σ = 0.05) 1/λ was 23 τ and t* 1.6 τ: the gradient of a roll-out likelihood was a
thousand times as large with windows of 23 τ as with windows of 1.6 τ. Noise that drives the states takes chaos away, at
times all of it (λ < 0), but not this.

References:
    Lyapunov characteristic exponents for smooth dynamical systems and for Hamiltonian systems (Benettin, Galgani,
    Giorgilli, Strelcyn, 1980), https://doi.org/10.1007/BF02128236
    Lyapunov spectra of chaotic recurrent neural networks (Engelken, Wolf, Abbott, 2023),
    https://doi.org/10.1103/PhysRevResearch.5.043044
    Gradients are not all you need (Metz, Freeman, Schoenholz, Kachman, 2021), https://arxiv.org/abs/2111.05803
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from neurosde.activation import Activation
from neurosde.lyapunov import mean_growth
from neurosde.rate_sde import Drive, RateSDE
from neurosde.validation import check_positive, check_square

BURN_IN = 0.25  # of a path, in which tangents turn to where they grow most
WINDOWS = 16  # of a recording over which growth is averaged
LONGEST = 5.0  # time constants within which growth is looked for


def lyapunov_time(
    weights: Float[Tensor, "*batch post pre"],
    voltage: Float[Tensor, "trial time neuron"],
    dt: float,
    tau: float = 1.0,
    *,
    phi: str | Callable[[Tensor], Tensor] | Activation = "tanh",
    drive: Drive = "scaled",
) -> Float[Tensor, "*batch"]:
    """Estimate the Lyapunov time 1/λ of a network along recorded paths.

    A tangent p of each trial is followed from its beginning to its end (`neurosde.lyapunov.mean_growth`), and

        λ = mean over trials of (log|p_T| − log|p_M|)/((T − M) dt),    M = T/4.

    Weights that are smaller than the network's, as a posterior mean's are, have too long a time; take some draws.

    Args:
        weights: W, shape (..., post, pre).
        voltage: h as recorded, shape (trial, time, neuron).
        dt: spacing of the samples.
        tau: time constant.
        phi: the nonlinearity.
        drive: see `RateSDE`.

    Returns:
        1/λ in the unit of dt, shape (...), float64; infinite where λ ≤ 0: nearby states do not part.

    Raises:
        ValueError: shapes that do not fit, or fewer than two times.
    """
    W, h, along = _tangents(weights, voltage, dt, tau, phi, drive)
    steps = h.shape[1] - 1
    # In general position: a vector of the standard basis may be one that weak or missing connections leave alone.
    first = torch.randn(W.shape[-1], 1, dtype=W.dtype, generator=torch.Generator().manual_seed(0)).to(W.device)
    P = first.expand(*W.shape[:-2], len(h), *first.shape)
    growth = mean_growth(lambda t, P: along(P, h[:, t]), P, steps, int(BURN_IN * steps))
    exponent = growth[..., 0].mean(-1) / dt
    return torch.where(exponent > 0, 1 / exponent.clamp(min=1e-300), math.inf)


def folding_time(
    weights: Float[Tensor, "*batch post pre"],
    voltage: Float[Tensor, "trial time neuron"],
    dt: float,
    tau: float = 1.0,
    *,
    phi: str | Callable[[Tensor], Tensor] | Activation = "tanh",
    drive: Drive = "scaled",
    longest: float | None = None,
) -> Float[Tensor, "*batch"]:
    """Estimate t*, in which gradients through a window grow e-fold: no longer than the Lyapunov time, see the module.

    Arguments are those of `lyapunov_time`, and `longest`, the time within which growth is looked for: 5 time constants
    by default, and no longer than half a trial. Λ is averaged over 16 windows of the recording.

    Returns:
        t* in the unit of dt, shape (...), float64, between steps by interpolation; infinite where it is beyond that.

    Raises:
        ValueError: shapes that do not fit, fewer than two times, or a time that is not positive.
    """
    W, h, along = _tangents(weights, voltage, dt, tau, phi, drive)
    span = LONGEST * tau if longest is None else check_positive(longest, "longest")
    steps = max(1, min(round(span / dt), (h.shape[1] - 1) // 2))
    places = (h.shape[1] - steps) * len(h)  # where a window may start, trial after trial
    chosen = torch.linspace(0, places - 1, min(WINDOWS, places)).long()
    trial, start = chosen % len(h), chosen // len(h)
    P = torch.eye(W.shape[-1], dtype=W.dtype, device=W.device).expand(*W.shape[:-2], len(chosen), *W.shape[-2:])
    found, last = W.new_full(W.shape[:-2], math.inf), W.new_zeros(W.shape[:-2])
    for t in range(steps):
        P = along(P, h[trial, start + t])
        growth = torch.linalg.matrix_norm(P, 2).clamp(min=1e-300).log().mean(-1)
        crossing = (t + (1 - last) / (growth - last).clamp(min=1e-300)) * dt
        found = torch.where((growth >= 1) & found.isinf(), crossing, found)
        if bool(found.isfinite().all()):
            break
        last = growth
    return found


def _tangents(
    weights: Tensor,
    voltage: Tensor,
    dt: float,
    tau: float,
    phi: str | Callable[[Tensor], Tensor] | Activation,
    drive: Drive,
) -> tuple[Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]]:
    """Weights and voltage in float64, and the map of P (..., path, N, N) and states (path, N) to J P."""
    W = weights.detach().double()
    check_square(W.shape)
    h = voltage.detach().to(W)
    if h.ndim != 3 or h.shape[-1] != W.shape[-1] or h.shape[1] < 2:
        raise ValueError(f"voltage must be (trial, time, {W.shape[-1]}), of two times or more; got {tuple(h.shape)}.")
    sde = RateSDE(W, tau, phi=phi, drive=drive)
    decay, gain = (float(value) for value in sde.euler_coefficients(dt))

    def along(P: Tensor, state: Tensor) -> Tensor:
        slope = sde.phi.slope(sde.phi(state), state)
        return decay * P + gain * W.unsqueeze(-3) @ (slope.unsqueeze(-1) * P)

    return W, h, along
