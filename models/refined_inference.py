"""Draws of an inference, moved to the posterior of a trained prior and the likelihood itself, and what there is to say.

The likelihood is that of transitions, or one through the simulator (`neurosde.models.rollout`), whose windows are
bounded by how long the gradients along some of the draws stay bounded.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from neurosde.datasets.recordings import Recording
from neurosde.likelihood import TransitionStatistics
from neurosde.models.diffusion_cfg import CFGPosterior
from neurosde.models.diffusion_prior import load_prior
from neurosde.models.dynamics import Dynamics
from neurosde.models.inference_config import InferenceConfig
from neurosde.models.lyapunov import folding_time, lyapunov_time
from neurosde.models.recorded import recorded_voltage
from neurosde.models.refinement import Refinement
from neurosde.models.rollout import RolloutLikelihood
from neurosde.models.split_gibbs import NEAR_RHO, NEAR_SWEEPS
from neurosde.time_constant import TimeConstantStatistics

FOLLOWED_DRAWS = 4  # whose tangents are followed to find how long gradients of roll-outs stay bounded


def refined_draws(
    model: CFGPosterior,
    statistics: TransitionStatistics | TimeConstantStatistics,
    draws: Tensor,
    dynamics: Dynamics | None,
    rollout: RolloutLikelihood | None,
    config: InferenceConfig,
    notes: list[str],
    generator: torch.Generator,
    progress: bool,
) -> tuple[Refinement, Dynamics]:
    """Draws moved to the posterior of the prior asked for, with a note of how that went, and τ and σ of each."""
    assert config.refine is not None
    given = model.condition(statistics, noise_std=config.noise_std, gain=config.gain, family=config.family)
    dynamics = given.dynamics(len(draws), generator) if dynamics is None else dynamics
    prior = None if config.prior is None else load_prior(config.prior)
    found = given.refine(
        draws, method=config.refine, **_how_far(config), dynamics=dynamics, prior=prior, log_prob=rollout,
        closing=config.closing, generator=generator, progress=progress,
    )  # fmt: skip
    change = float((found.draws - draws)[~found.diverged].square().mean().sqrt() / found.draws.var(0).mean().sqrt())
    by = config.refine if config.prior is None else f"{config.refine} with the prior {config.prior}"
    told = f"draws were refined by {by}, {found.evaluations} evaluations each, and moved by {change:.2f} sd"
    if lost := int(found.diverged.sum()):
        told += f"; for {lost} of {len(draws)} the guidance diverged, and they stay as they were"
    if config.refine == "gibbs":
        of = " and ".join(f"{value:.3f} of the {name.replace('_', '-')}" for name, value in found.r_hat.items())
        beyond = (
            ": exact sweeps move draws by little, and are no proof that wrong ones would have come right"
            if max(found.r_hat.values()) > 1.1
            else ""
        )
        notes.append(f"{told}, in the last sweep by {float(found.moved[-1]):.2f}; R-hat is {of}{beyond}.")
    else:
        notes.append(f"{told}; this guidance approximates, so that intervals are not calibrated (gibbs is exact).")
    return found, dynamics


def _how_far(config: InferenceConfig) -> dict[str, Any]:
    """Sweeps and ρ: few and small where draws are those of the very posterior that refines them, unless given."""
    own = config.method == "cfg" and config.guidance in (None, 1) and config.prior is None
    near = {"sweeps": NEAR_SWEEPS, "rho": NEAR_RHO} if own and config.refine == "gibbs" else {}
    return near | {name: getattr(config, name) for name in ("sweeps", "rho") if getattr(config, name) is not None}


def rollout_likelihood(
    recording: Recording, draws: Tensor, noise_std: float, config: InferenceConfig, notes: list[str]
) -> RolloutLikelihood:
    """The likelihood through roll-outs, with a note of how long they are and what bounds them."""
    assert recording.dt is not None and recording.tau is not None and recording.drive is not None
    voltage = recorded_voltage(recording)[0]
    some, path = draws[:FOLLOWED_DRAWS], (voltage, recording.dt, recording.tau)
    folding = float(folding_time(some, *path, drive=recording.drive).min())
    lyapunov = float(lyapunov_time(some, *path, drive=recording.drive).min())
    found = RolloutLikelihood(recording, noise_std, window=config.window, horizon=min(folding, lyapunov))
    chaos = f"the Lyapunov time is {lyapunov:.3g}" if math.isfinite(lyapunov) else "paths are not chaotic"
    grow = f"grow e-fold in {folding:.3g}" if math.isfinite(folding) else "were not seen to grow e-fold"
    asked = "" if config.window is None else f" ({config.window:g} was asked for)"
    notes.append(
        f"the likelihood is of roll-outs over {found.windows} windows of at most {found.window:.3g}{asked}; gradients "
        f"{grow}, {chaos}."
    )
    return found
