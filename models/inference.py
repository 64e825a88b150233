"""From a recording to a posterior over its weights.

exact           the exact posterior for a Gaussian prior; gain and noise as given, else by empirical Bayes
ridge           the same with the prior variance chosen by generalised cross-validation
least-squares   a flat prior: needs more transitions than neurons, and shows what the prior is for
cfg             a diffusion model trained on recordings of many networks (`neurosde.models.diffusion_cfg`); the exact
                posterior for a Gaussian prior, gain and noise by empirical Bayes, stands beside it

Draws of any method can be refined: moved to the posterior of a trained prior and the likelihood itself
(`neurosde.models.refined_inference`).
"""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neurosde.datasets.recordings import Recording, merge_settings, read_recording
from neurosde.likelihood import TransitionStatistics
from neurosde.models.diffusion_cfg import CFGPosterior
from neurosde.models.dynamics import Dynamics
from neurosde.models.empirical_bayes import (
    empirical_bayes,
    least_squares,
    most_probable_time_constant,
    ridge_parameter,
)
from neurosde.models.gaussian_posterior import GaussianPosterior
from neurosde.models.inference_config import InferenceConfig
from neurosde.models.prediction import input_spread, kept_draws, predict
from neurosde.models.recorded import recording_statistics, recording_time_constants, recording_transitions
from neurosde.models.refined_inference import refined_draws, rollout_likelihood
from neurosde.models.refinement import Refinement
from neurosde.residuals import ResidualCheck, residual_checks
from neurosde.time_constant import TimeConstantStatistics, check_range

GAINS_SEARCHED = (0.1, 10.0)  # where neither gain nor time constant is known
CHECKED_DRAWS = 9  # whose residuals are checked


@dataclass(frozen=True)
class Inference:
    """A posterior with all that it rests on.

    Attributes:
        recording: the recording, with dt, tau and drive settled.
        config: the settings.
        statistics: sums over its transitions.
        posterior: the exact posterior for a Gaussian prior, given noise and prior variance.
        point_estimate: the method's estimate of W (post, pre).
        draws: posterior draws (draw, post, pre).
        log_density: log posterior density of each draw; of a trained prior's the log-likelihood of the recording, for
            the most probable time constant.
        input: constant input used (neuron,): known, or the posterior mean of an estimated one.
        input_sd: posterior standard deviation of each neuron's input; 0 where it is known.
        predicted: activity simulated from the first draws (draw, trial, time, neuron).
        notes: what was estimated or left out, in sentences.
        checks: whether the residuals look as the model says, see `neurosde.residuals`.
        seconds: that drawing took; NaN where the draws were there already.
        unrefined: the draws before they were refined, if they were.
        refinement: how they were.
        refine_seconds: that it took.
        dynamics: τ and σ of each draw, where draws are of a trained prior's posterior.
    """

    recording: Recording
    config: InferenceConfig
    statistics: TransitionStatistics
    posterior: GaussianPosterior
    point_estimate: Tensor
    draws: Tensor
    log_density: Tensor
    input: np.ndarray
    input_sd: float
    predicted: np.ndarray
    notes: tuple[str, ...]
    checks: tuple[ResidualCheck, ...]
    seconds: float
    unrefined: Tensor | None = None
    refinement: Refinement | None = None
    refine_seconds: float = math.nan
    dynamics: Dynamics | None = None

    @property
    def contraction(self) -> float:
        """1 − posterior variance / prior variance: 0 has learnt nothing, 1 all.

        The prior is the Gaussian one of the gain that is given or that the recording suggests. So it is for a trained
        posterior, too, whose own prior has a range of gains: draws of that prior may be above or below 0.
        """
        if not self.config.trained:
            return self.posterior.contraction
        v = self.posterior.prior_variance
        return 1 - float(self.draws.var(0).mean()) / v if math.isfinite(v) else math.nan


def infer(
    recording: Recording | str | Path,
    config: InferenceConfig | None = None,
    *,
    draws: Tensor | None = None,
    dynamics: Dynamics | None = None,
    progress: bool = False,
) -> Inference:
    """Infer the weights behind a recording.

    Warns where the recording does not look as the model says (`neurosde.residuals`), and where a guidance diverges for
    some of the draws that it is to refine, which then stay as they were.

    Args:
        recording: a recording, or the path of one (see `neurosde.datasets.recordings`).
        config: what is known and how to infer.
        draws: draws of W to refine, (draw, post, pre), in place of new ones; with method cfg they are taken for draws
            of that posterior, which are nearly right: give sweeps and rho where they are not.
        dynamics: τ and σ of each of them; None draws them.
        progress: show a progress bar, on a terminal, where it takes long.

    Raises:
        FileNotFoundError: no such file, or no such trained posterior.
        TypeError: neither a recording nor a path, such as an array.
        ValueError: the recording cannot be used, or does not determine W without a prior; draws that do not fit.
        FloatingPointError: a guidance diverges for all draws.
    """
    config = config or InferenceConfig()
    if draws is not None and config.refine is None:
        raise ValueError("draws are given to be refined: set refine.")
    if dynamics is not None and draws is None:
        raise ValueError("dynamics are those of draws to be refined: give draws, too.")
    if not isinstance(recording, Recording | str | Path):
        raise TypeError(
            f"recording must be a Recording or the path of a file; got {type(recording).__name__}. Give an array as "
            "Recording(array, name, dt=…), see neurosde.datasets.recordings."
        )
    if not isinstance(recording, Recording):
        recording = read_recording(
            recording, network=config.network, variable=config.variable, cut_trials=config.cut_trials
        )
    notes: list[str] = []
    recording, of_any_tau = _settled(recording, config, notes)
    statistics = recording_statistics(recording, estimate_input=config.estimate_input)
    times, neurons = recording.activity.shape[-2:]
    if neurons > times:
        notes.append(f"there are more neurons ({neurons}) than times ({times}): are the axes (time, neuron)?")
    if neurons == 1:
        notes.append("there is one neuron, and only its weight onto itself to infer: are the axes (time, neuron)?")
    if statistics.dropped:
        share = statistics.dropped / (statistics.dropped + statistics.count)
        notes.append(
            f"{statistics.dropped} saturated transitions ({share:.1%}) were left out: rounding hides their voltage."
        )
    posterior, point_estimate = _posterior(statistics, config, notes)
    generator = torch.Generator().manual_seed(config.seed)
    began, fresh, refined = time.perf_counter(), draws is None, None
    model = _trained_model(statistics.num_neurons, config, notes) if config.trained else None
    if draws is not None:
        draws = checked = draws.double()
    elif config.method == "cfg":
        assert model is not None
        point_estimate, draws, checked, dynamics = _by_diffusion(
            model, statistics, of_any_tau, config, notes, generator, progress
        )
    else:
        draws = checked = posterior.sample((config.draws,), generator)
    unrefined, drawn = draws, time.perf_counter()
    if config.refine is not None:
        assert model is not None
        rollout = None
        if config.likelihood == "rollout":
            rollout = rollout_likelihood(recording, draws, posterior.noise_std, config, notes)
        refined, dynamics = refined_draws(
            model, of_any_tau or statistics, draws, dynamics, rollout, config, notes, generator, progress
        )
        draws, point_estimate = refined.draws, refined.draws[~refined.diverged].mean(0)
        checked = checked if of_any_tau else draws
    if config.trained:
        log_density = statistics.log_likelihood(draws, posterior.noise_std)
    else:
        log_density = posterior.log_prob(draws)
    refine_seconds = time.perf_counter() - drawn
    checks = _checks(recording, statistics, posterior, checked, config)
    failed = [f"{check.meaning} ({check.score:+.0f} standard deviations)" for check in checks if check.failed]
    if failed:
        warnings.warn(
            f"the recording does not look as the model says: {'; '.join(failed)}. Do not trust the intervals.",
            stacklevel=2,
        )
    kept = kept_draws(recording, config.predicted_draws)
    if kept < config.predicted_draws:
        notes.append(f"{kept} of {config.predicted_draws} predictive draws were simulated, to bound the memory.")
    current, predicted = predict(
        recording, statistics, of_any_tau, posterior.noise_std, point_estimate, draws[:kept], dynamics, config,
        generator,
    )  # fmt: skip
    return Inference(
        recording,
        config,
        statistics,
        posterior,
        point_estimate,
        draws,
        log_density,
        current,
        input_spread(statistics, posterior) if config.estimate_input else 0.0,
        predicted,
        tuple(notes),
        checks,
        drawn - began if fresh else math.nan,
        unrefined if refined is not None else None,
        refined,
        refine_seconds if refined is not None else math.nan,
        dynamics,
    )


def _settled(
    recording: Recording, config: InferenceConfig, notes: list[str]
) -> tuple[Recording, TimeConstantStatistics | None]:
    """The recording with dt, drive and tau, the latter estimated where a range is given; then also its statistics."""
    if config.tau_range is None:
        return merge_settings(recording, dt=config.dt, tau=config.tau, drive=config.drive), None
    if recording.tau is not None:
        raise ValueError(f"{recording.source} says tau = {recording.tau:.6g}; leave --tau-range out.")
    low, high = check_range(config.tau_range)
    recording = merge_settings(recording, dt=config.dt, tau=low, drive=config.drive)
    of_any_tau = recording_time_constants(recording, (low, high), estimate_input=config.estimate_input)
    gains = GAINS_SEARCHED if config.gain is None else (config.gain, config.gain)
    tau = most_probable_time_constant(of_any_tau, gains, config.noise_std)
    each = "; each draw of the weights has its own" if config.trained else " and taken as known"
    notes.append(f"tau = {tau:.4g} was estimated from the recording (evidence){each}.")
    if min(tau / low, high / tau) < 1.01:
        notes.append(f"tau is at an end of its range, {low:g} to {high:g}: widen it.")
    return replace(recording, tau=tau), of_any_tau


def _posterior(
    statistics: TransitionStatistics, config: InferenceConfig, notes: list[str]
) -> tuple[GaussianPosterior, Tensor]:
    N = statistics.num_neurons
    if config.method == "least-squares":
        estimate = least_squares(statistics)
        sigma = config.noise_std
        if sigma is None:
            left = statistics.degrees - N
            if left < 1:
                raise ValueError(
                    f"without a prior, {statistics.degrees} transitions do not determine {N} weights per neuron "
                    "and the noise; record longer, or use method 'exact' or 'ridge'."
                )
            residual = statistics.yy.sum() - (estimate * statistics.yx).sum()
            sigma = statistics.noise_std(math.sqrt(max(float(residual), 0.0) / (left * N)))
            notes.append(f"noise_std = {sigma:.4g} was estimated from the residuals.")
        return GaussianPosterior.from_statistics(statistics, sigma, math.inf), estimate
    variance = None if config.gain is None else config.gain**2 / N
    found = empirical_bayes(statistics, noise_std=config.noise_std, prior_variance=variance)
    if config.method == "ridge":
        variance = statistics.noise_scale(found.noise_std) ** 2 / ridge_parameter(statistics)
        notes.append(f"gain = {math.sqrt(N * variance):.4g} was chosen by generalised cross-validation.")
    else:
        variance = found.prior_variance
        if config.gain is None and config.method != "cfg":
            notes.append(f"gain = {found.gain(N):.4g} was estimated from the recording (evidence).")
    if config.noise_std is None:
        each = "; each draw of the weights has its own" if config.trained else ""
        notes.append(f"noise_std = {found.noise_std:.4g} was estimated from the recording (evidence){each}.")
    if found.at_floor:
        notes.append(
            f"the noise is at its floor, noise_std = {found.noise_std:.3g}, which is what rounding of the recording "
            "looks like; intervals are as wide as that makes them, however near the truth is."
        )
    posterior = GaussianPosterior.from_statistics(statistics, found.noise_std, variance)
    return posterior, posterior.mean


def _trained_model(N: int, config: InferenceConfig, notes: list[str]) -> CFGPosterior:
    """The trained posterior, or prior, that is asked for."""
    model = CFGPosterior.from_pretrained(config.checkpoint or "base")
    low, high = min(model.config.sizes), max(model.config.sizes)
    if not low <= N <= high:
        notes.append(f"the trained posterior has seen {low} to {high} neurons, and is untested at {N}.")
    return model


def _by_diffusion(
    model: CFGPosterior,
    statistics: TransitionStatistics,
    of_any_tau: TimeConstantStatistics | None,
    config: InferenceConfig,
    notes: list[str],
    generator: torch.Generator,
    progress: bool,
) -> tuple[Tensor, Tensor, Tensor, Dynamics]:
    """Mean and draws of the trained posterior, draws given the time constant of the statistics, and τ and σ of each."""
    known: dict[str, Any] = {"noise_std": config.noise_std, "gain": config.gain, "family": config.family}
    given = model.condition(statistics, **known)
    guidance = 1.0 if config.guidance is None else config.guidance
    if guidance == 0:
        notes.append("guidance = 0 draws from the prior: the recording only suggests its unit.")
    elif guidance != 1:
        notes.append(f"guidance = {guidance:g} draws from no posterior: spreads and intervals are not calibrated.")
    if config.family is None and model.families and guidance:
        shares = sorted(((float(p), name) for name, p in given.family_probabilities.items()), reverse=True)
        notes.append("probability of each ensemble: " + ", ".join(f"{name} {p:.2f}" for p, name in shares) + ".")
    options: dict[str, Any] = {
        "guidance": guidance, "steps": config.steps, "closing": config.closing, "generator": generator,
    }  # fmt: skip
    of_any = given if of_any_tau is None else model.condition(of_any_tau, **known)
    dynamics = of_any.dynamics(config.draws, generator)
    draws = of_any.sample((config.draws,), dynamics=dynamics, progress=progress, **options)
    checked = draws if of_any_tau is None else given.sample((min(config.draws, CHECKED_DRAWS),), **options)
    return given.mean, draws, checked, dynamics


def _checks(
    recording: Recording,
    statistics: TransitionStatistics,
    posterior: GaussianPosterior,
    draws: Tensor,
    config: InferenceConfig,
) -> tuple[ResidualCheck, ...]:
    """Check the residuals of some draws, where they are of a posterior and there is noise to be checked."""
    if config.refine is None:
        of_a_posterior = config.method != "least-squares" and config.guidance in (None, 1.0)
    else:
        of_a_posterior = config.refine == "gibbs"
    if not of_a_posterior or posterior.noise_std <= 1.01 * statistics.noise_floor:
        return ()
    some = draws[:CHECKED_DRAWS]
    return tuple(
        residual_checks(
            recording_transitions(recording),
            some,
            torch.full((len(some),), statistics.noise_scale(posterior.noise_std)),
            noise_known=config.noise_std is not None,
            input_known=not config.estimate_input,
        )
    )
