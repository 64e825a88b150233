"""From a recording to a posterior over its weights.

exact           the exact posterior for a Gaussian prior; gain and noise as given, else by empirical Bayes
ridge           the same with the prior variance chosen by generalised cross-validation
least-squares   a flat prior: needs more transitions than neurons, and shows what the prior is for
cfg             a diffusion model trained on recordings of many networks (`neurosde.models.diffusion_cfg`); the exact
                posterior for a Gaussian prior, gain and noise by empirical Bayes, stands beside it

Draws of any method can be refined: moved to the posterior of a trained prior and the likelihood itself
(`neurosde.models.dps`).
"""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from neurosde.datasets.recordings import Recording, merge_settings, read_recording
from neurosde.likelihood import TransitionStatistics
from neurosde.models.diffusion_cfg import CFGPosterior
from neurosde.models.dps import SWEEPS, Refinement
from neurosde.models.empirical_bayes import (
    empirical_bayes,
    least_squares,
    most_probable_time_constant,
    ridge_parameter,
)
from neurosde.models.gaussian_posterior import GaussianPosterior
from neurosde.models.lyapunov import folding_time, lyapunov_time
from neurosde.models.recorded import (
    recorded_voltage,
    recording_statistics,
    recording_time_constants,
    recording_transitions,
)
from neurosde.models.rollout import RolloutLikelihood
from neurosde.models.weight_posterior import STEPS, Refiner
from neurosde.rate_sde import Drive
from neurosde.residuals import ResidualCheck, residual_checks
from neurosde.solve import simulate_rate_network
from neurosde.time_constant import TimeConstantStatistics, check_range
from neurosde.validation import check_count, check_positive, check_time_step

PREDICTIVE_BYTES = 2**28  # of simulated activity kept in memory and in the posterior file
Method = Literal["exact", "ridge", "least-squares", "cfg"]
Likelihood = Literal["transitions", "rollout"]
GAINS_SEARCHED = (0.1, 10.0)  # where neither gain nor time constant is known
CHECKED_DRAWS = 9  # whose residuals are checked
FOLLOWED_DRAWS = 4  # whose tangents are followed to find how long gradients of roll-outs stay bounded


@dataclass(frozen=True)
class InferenceConfig:
    """What to infer from, what is known, and how."""

    dt: float | None = field(default=None, metadata={"help": "spacing of the samples (default: as the file says)"})
    tau: float | None = field(default=None, metadata={"help": "time constant (default: as the file says, else 1)"})
    tau_range: tuple[float, ...] | None = field(
        default=None, metadata={"help": "lowest and highest time constant, where it is not known: it is estimated"}
    )
    noise_std: float | None = field(default=None, metadata={"help": "noise sigma (default: estimated)"})
    gain: float | None = field(default=None, metadata={"help": "prior: weights have variance gain^2/N (estimated)"})
    method: Method = field(default="exact", metadata={"help": "how to infer"})
    checkpoint: str | None = field(
        default=None, metadata={"help": "cfg, refine: a trained posterior, its file or name (default base)"}
    )
    family: str | None = field(
        default=None, metadata={"help": "cfg, refine: the ensemble, where it is known (default: open)"}
    )
    guidance: float | None = field(
        default=None, metadata={"help": "cfg: weight of the guidance; 1, the default, is calibrated, others are not"}
    )
    steps: int | None = field(default=None, metadata={"help": f"cfg: noise levels of the sampler (default {STEPS})"})
    refine: Refiner | None = field(
        default=None, metadata={"help": "refine the draws through the likelihood itself: gibbs is exact in the limit"}
    )
    sweeps: int | None = field(default=None, metadata={"help": f"refine, gibbs: sweeps (default {SWEEPS})"})
    rho: float | None = field(
        default=None, metadata={"help": "refine: how far draws may go, in units of a weight's spread"}
    )
    likelihood: Likelihood = field(
        default="transitions",
        metadata={"help": "refine, dps and pigdm: of each step, or through the simulator, by roll-outs of windows"},
    )
    window: float | None = field(
        default=None,
        metadata={"help": "refine, rollout: length of a window (default: half a time constant, or less in chaos)"},
    )
    estimate_input: bool = field(default=False, metadata={"help": "an unknown constant input drives each neuron"})
    drive: Drive | None = field(default=None, metadata={"help": "drive convention (default: as the file says)"})
    draws: int = field(default=256, metadata={"help": "posterior draws"})
    predictive_draws: int = field(default=32, metadata={"help": "draws whose activity is simulated for comparison"})
    seed: int = field(default=0, metadata={"help": "seed of the draws"})
    network: int | None = field(default=None, metadata={"help": "which network of a cube"})
    variable: str | None = field(default=None, metadata={"help": "which array of the file (default activity)"})
    cut_trials: bool = field(default=False, metadata={"help": "cut an NWB series into the file's trials"})

    def __post_init__(self) -> None:
        if self.dt is not None:
            check_time_step(self.dt, self.tau)
        for name in ("tau", "gain"):
            if getattr(self, name) is not None:
                check_positive(getattr(self, name), name)
        if self.tau_range is not None:
            check_range(self.tau_range)
            if self.tau is not None:
                raise ValueError(f"give --tau or --tau-range; got {self.tau} and {self.tau_range}.")
        if self.noise_std is not None:
            check_positive(self.noise_std, "noise_std", zero_ok=True)
        if self.method not in get_args(Method):
            raise ValueError(f"method must be one of {get_args(Method)}; got {self.method!r}.")
        if self.method not in ("exact", "cfg") and self.gain is not None:
            raise ValueError(f"method {self.method!r} has no prior gain; leave it out, or use method 'exact'.")
        for name in ("guidance", "steps"):
            if self.method != "cfg" and getattr(self, name) is not None:
                raise ValueError(f"{name} is for method 'cfg'; got it with {self.method!r}.")
        for name in ("checkpoint", "family"):
            if not self.trained and getattr(self, name) is not None:
                raise ValueError(f"{name} is for method 'cfg', or refined draws; got it with {self.method!r}.")
        if self.refine not in (None, *get_args(Refiner)):
            raise ValueError(f"refine must be one of {get_args(Refiner)}; got {self.refine!r}.")
        if self.rho is not None:
            check_positive(self.rho, "rho")
            if self.refine is None:
                raise ValueError(f"rho is of a refinement; got {self.rho} without --refine.")
        if self.sweeps is not None:
            check_count(self.sweeps, "sweeps", 8)
            if self.refine != "gibbs":
                raise ValueError(f"sweeps are of refine = 'gibbs'; got {self.sweeps} with {self.refine!r}.")
        if self.likelihood not in get_args(Likelihood):
            raise ValueError(f"likelihood must be one of {get_args(Likelihood)}; got {self.likelihood!r}.")
        if self.likelihood == "rollout":
            if self.refine not in ("dps", "pigdm"):
                raise ValueError(f"likelihood 'rollout' is of refine 'dps' or 'pigdm'; got it with {self.refine!r}.")
            if self.estimate_input:
                raise ValueError("likelihood 'rollout' takes the input as known; leave estimate_input out.")
        if self.window is not None:
            check_positive(self.window, "window")
            if self.likelihood != "rollout":
                raise ValueError(f"window is of likelihood 'rollout'; got {self.window} with {self.likelihood!r}.")
        if self.guidance is not None:
            check_positive(self.guidance, "guidance", zero_ok=True)
        if self.steps is not None:
            check_count(self.steps, "steps", 2)
        check_count(self.draws, "draws", 2)
        check_count(self.predictive_draws, "predictive_draws", 0)
        if self.predictive_draws > self.draws:
            raise ValueError(f"predictive_draws must be at most draws, {self.draws}; got {self.predictive_draws}.")
        check_count(self.seed, "seed", 0)

    @property
    def trained(self) -> bool:
        """Whether draws are of a trained prior's posterior, and not of a Gaussian one's."""
        return self.method == "cfg" or self.refine is not None


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

    @property
    def contraction(self) -> float:
        """1 − posterior variance / prior variance: 0 has learnt nothing, 1 all; of a trained prior's from the draws."""
        if not self.config.trained:
            return self.posterior.contraction
        v = self.posterior.prior_variance
        return 1 - float(self.draws.var(0).mean()) / v if math.isfinite(v) else math.nan


def infer(
    recording: Recording | str | Path,
    config: InferenceConfig | None = None,
    *,
    draws: Tensor | None = None,
    progress: bool = False,
) -> Inference:
    """Infer the weights behind a recording.

    Warns where the recording does not look as the model says (`neurosde.residuals`).

    Args:
        recording: a recording, or the path of one (see `neurosde.datasets.recordings`).
        config: what is known and how to infer.
        draws: draws of W to refine, (draw, post, pre), in place of new ones.
        progress: show a progress bar, on a terminal, where it takes long.

    Raises:
        FileNotFoundError: no such file, or no such trained posterior.
        ValueError: the recording cannot be used, or does not determine W without a prior; draws that do not fit.
        FloatingPointError: a guidance diverges.
    """
    config = config or InferenceConfig()
    if draws is not None and config.refine is None:
        raise ValueError("draws are given to be refined: set refine.")
    if not isinstance(recording, Recording):
        recording = read_recording(
            recording, network=config.network, variable=config.variable, cut_trials=config.cut_trials
        )
    notes: list[str] = []
    recording, of_any_tau = _settled(recording, config, notes)
    statistics = recording_statistics(recording, estimate_input=config.estimate_input)
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
        point_estimate, draws, checked = _by_diffusion(
            model, statistics, of_any_tau, config, notes, generator, progress
        )
    else:
        draws = checked = posterior.sample((config.draws,), generator)
    unrefined, drawn = draws, time.perf_counter()
    if config.refine is not None:
        assert model is not None
        rollout = None
        if config.likelihood == "rollout":
            rollout = _rollout(recording, draws, posterior.noise_std, config, notes)
        refined = _refined(model, of_any_tau or statistics, draws, rollout, config, notes, generator, progress)
        draws, point_estimate = refined.draws, refined.draws.mean(0)
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
    kept = min(config.predictive_draws, PREDICTIVE_BYTES // (4 * recording.activity.size))
    if kept < config.predictive_draws:
        notes.append(f"{kept} of {config.predictive_draws} predictive draws were simulated, to bound the memory.")
    current, predicted = _predict(
        recording, statistics, posterior.noise_std, point_estimate, draws[:kept], config, generator
    )
    return Inference(
        recording,
        config,
        statistics,
        posterior,
        point_estimate,
        draws,
        log_density,
        current,
        _input_sd(statistics, posterior) if config.estimate_input else 0.0,
        predicted,
        tuple(notes),
        checks,
        drawn - began if fresh else math.nan,
        *(() if refined is None else (unrefined, refined, refine_seconds)),
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
    each = (
        "; each draw of the weights has its own, predicted activity this one"
        if config.method == "cfg"
        else " and taken as known"
    )
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
        each = "; each draw of the weights has its own" if config.method == "cfg" else ""
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


def _rollout(
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


def _refined(
    model: CFGPosterior,
    statistics: TransitionStatistics | TimeConstantStatistics,
    draws: Tensor,
    rollout: RolloutLikelihood | None,
    config: InferenceConfig,
    notes: list[str],
    generator: torch.Generator,
    progress: bool,
) -> Refinement:
    """Draws moved to the posterior of the network's prior, with a note of how that went."""
    assert config.refine is not None
    given = model.condition(statistics, noise_std=config.noise_std, gain=config.gain, family=config.family)
    found = given.refine(
        draws, method=config.refine, sweeps=config.sweeps, rho=config.rho, log_prob=rollout, generator=generator,
        progress=progress,
    )  # fmt: skip
    change = float((found.draws - draws).square().mean().sqrt() / found.draws.var(0).mean().sqrt())
    told = f"draws were refined by {config.refine}, {found.evaluations} evaluations each, and moved by {change:.2f} sd"
    if config.refine == "gibbs":
        of = " and ".join(f"{value:.3f} of the {name.replace('_', '-')}" for name, value in found.r_hat.items())
        beyond = (
            ": they have not gone everywhere, and more sweeps may move them" if max(found.r_hat.values()) > 1.1 else ""
        )
        notes.append(f"{told}, in the last sweep by {float(found.moved[-1]):.2f}; R-hat is {of}{beyond}.")
    else:
        notes.append(f"{told}; this guidance approximates, so that intervals are not calibrated (gibbs is exact).")
    return found


def _by_diffusion(
    model: CFGPosterior,
    statistics: TransitionStatistics,
    of_any_tau: TimeConstantStatistics | None,
    config: InferenceConfig,
    notes: list[str],
    generator: torch.Generator,
    progress: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and draws of the trained posterior, and draws given the time constant of the statistics."""
    known: dict[str, Any] = {"noise_std": config.noise_std, "gain": config.gain, "family": config.family}
    given = model.condition(statistics, **known)
    guidance = 1.0 if config.guidance is None else config.guidance
    if guidance not in (0.0, 1.0):
        notes.append(f"guidance = {guidance:g} draws from no posterior: spreads and intervals are not calibrated.")
    if config.family is None and model.families and guidance:
        shares = sorted(((float(p), name) for name, p in given.family_probabilities.items()), reverse=True)
        notes.append("probability of each ensemble: " + ", ".join(f"{name} {p:.2f}" for p, name in shares) + ".")
    options: dict[str, Any] = {"guidance": guidance, "steps": config.steps or STEPS, "generator": generator}
    if of_any_tau is None:
        draws = given.sample((config.draws,), progress=progress, **options)
        return given.mean, draws, draws
    draws = model.condition(of_any_tau, **known).sample((config.draws,), progress=progress, **options)
    return given.mean, draws, given.sample((min(config.draws, CHECKED_DRAWS),), **options)


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


def _input_sd(statistics: TransitionStatistics, posterior: GaussianPosterior) -> float:
    """I = ȳ − W x̄ + s ξ/√n: of the mean of the noise, and of W along the mean rates."""
    mean_x = statistics.x / statistics.count
    of_noise = statistics.noise_scale(posterior.noise_std) ** 2 / statistics.count
    return math.sqrt(of_noise + float((mean_x @ posterior.factor).square().sum()))


def _predict(
    recording: Recording,
    statistics: TransitionStatistics,
    noise_std: float,
    mean: Tensor,
    W: Tensor,
    config: InferenceConfig,
    generator: torch.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Simulate what each draw would have done from the recorded initial states; float32 (draw, trial, time, neuron)."""
    assert recording.dt is not None and recording.tau is not None and recording.drive is not None
    trials, samples, N = recording.activity.shape
    if recording.voltage is None:
        h0 = torch.atanh(torch.as_tensor(recording.activity[:, 0], dtype=torch.float64))
    else:
        h0 = torch.as_tensor(recording.voltage[:, 0], dtype=torch.float64)
    known = torch.zeros(N) if recording.input is None else torch.as_tensor(recording.input)
    constant = known.double().numpy() if known.ndim == 1 else np.zeros(N)
    current = (known[None, None] if known.ndim == 1 else known.expand(trials, samples, N)).double().unsqueeze(0)
    if config.estimate_input:
        mean_x, mean_y = statistics.x / statistics.count, statistics.y / statistics.count
        constant = constant + (mean_y - mean @ mean_x).numpy()
        spread = statistics.noise_scale(noise_std) / math.sqrt(statistics.count)
        offset = mean_y - W @ mean_x + spread * torch.randn(len(W), N, generator=generator, dtype=torch.float64)
        current = current + offset[:, None, None]
    predicted = np.empty((len(W), trials, samples, N), dtype=np.float32)
    with torch.no_grad():
        for one, weights in enumerate(W):  # one at a time: memory holds one draw's path beside what is kept
            x = simulate_rate_network(
                weights,
                h0,
                samples,
                recording.dt,
                recording.tau,
                current[one if len(current) > 1 else 0].expand(trials, -1, N),
                noise_std,
                drive=recording.drive,
                generator=generator,
            )
            predicted[one] = x.numpy()
    return constant, predicted
