"""The posterior over weights given recordings, by a trained network: draws, moments, densities.

Per draw the recording's evidence is folded into the denoiser, in units of the gain that the recording suggests; what is
not known of σ and τ has its own draw each. See `neurosde.models.diffusion_cfg`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from neurosde.brownian import as_generator
from neurosde.likelihood import TransitionStatistics
from neurosde.models.closing import closed_as_trained
from neurosde.models.conditioned_denoiser import conditioned_denoiser, prior_denoiser
from neurosde.models.diffusion_prior import DiffusionPrior, weight_levels
from neurosde.models.dynamics import Dynamics, Statistics, draw_dynamics, evidence_given
from neurosde.models.edm import SIGMA_MIN, Denoiser, Evidence, fold, noise_levels
from neurosde.models.empirical_bayes import (
    empirical_bayes,
    evidence_gain,
    most_probable_time_constant,
)
from neurosde.models.graphed_network import GraphedNetwork
from neurosde.models.guidance import ClassifierFreeGuidance
from neurosde.models.network_denoiser import NetworkDenoiser
from neurosde.models.posterior_refinement import prior_in_units, refine_draws
from neurosde.models.probability_flow import STEPS as FLOW_STEPS
from neurosde.models.probability_flow import flow_log_density
from neurosde.models.recorded import recording_evidence
from neurosde.models.refinement import Refinement
from neurosde.models.refiner_options import Refiner, check_prior, refiner_options
from neurosde.models.resolution import resolved
from neurosde.models.samplers import Method, sample
from neurosde.time_constant import TimeConstantStatistics
from neurosde.validation import check_count

if TYPE_CHECKING:
    from neurosde.models.diffusion_cfg import CFGPosterior

MEAN_EVALUATIONS = 8  # of the denoiser at σ_max, whose input is next to pure noise


class WeightPosterior:
    """The posterior over weights given one recording, or several: p(W | recording, what else is known).

    See `CFGPosterior.condition`. Of several recordings each result has a dimension more, before those of W.
    """

    def __init__(
        self,
        model: CFGPosterior,
        recordings: Sequence[Statistics],
        noise_std: float | None,
        gain: float | None,
        family: str | None,
        several: bool,
    ) -> None:
        self.model = model
        self._network = GraphedNetwork(model.network)
        self._recordings = tuple(recordings)
        self._gains = model.config.gains if gain is None else (gain, gain)
        self.statistics = statistics = tuple(
            one.at(most_probable_time_constant(one, self._gains, noise_std))
            if isinstance(one, TimeConstantStatistics)
            else one
            for one in recordings
        )
        self.gain = gain
        self.family = family
        self._several = several
        self._evidence = recording_evidence(statistics).to(model.device)
        self._known_noise = noise_std
        self.noise_std = tuple(
            empirical_bayes(one).noise_std if noise_std is None else max(noise_std, one.noise_floor)
            for one in statistics
        )
        self._scales = torch.tensor(
            [one.noise_scale(sigma) for one, sigma in zip(statistics, self.noise_std, strict=True)],
            dtype=torch.float64,
            device=model.device,
        )

    @property
    def num_neurons(self) -> int:
        """Number of neurons N."""
        return self.statistics[0].num_neurons

    @property
    def unit(self) -> Float[Tensor, "*recording"]:
        """Unit s₀ of the diffusion, g/√N; for the most probable σ and τ where not known."""
        found = self._denoiser(self._most_probable(1))[2][0] / math.sqrt(self.num_neurons)
        return found if self._several else found[0]

    def dynamics(self, draws: int, generator: int | torch.Generator | None = None) -> Dynamics:
        """Draw τ and σ from their posterior, for as many draws of W; see `neurosde.models.dynamics`."""
        source = as_generator(generator, self.model.device)
        count = check_count(draws, "draws")
        found = draw_dynamics(self._recordings, count, self._gains, self._known_noise, source)
        return found if self._several else found.squeezed()

    def sample(
        self,
        shape: Sequence[int] = (),
        *,
        dynamics: Dynamics | None = None,
        guidance: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, math.inf),
        steps: int | None = None,
        method: Method = "sde",
        closing: bool = True,
        generator: int | torch.Generator | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Draw weights.

        By diffusion, and then by sweeps of Gibbs sampling given the structure that it found
        (`neurosde.models.closing`), for ensembles of `neurosde.datasets.ensembles`. Where the network knows several and
        none is told, that of each draw is drawn of what the network says given the draw.

        Args:
            shape: of the draws.
            dynamics: τ and σ of each, as many as draws, of `dynamics`; None draws them.
            guidance: w of `ClassifierFreeGuidance`. 1 draws from the posterior and 0 from the prior; any other weight
                draws from neither and is not calibrated, whatever it looks like. The prior is that of `refine` by a
                guidance.
            guidance_interval: noise levels, in units of s₀, between which the guidance acts.
            steps: noise levels; by default 28, of N > 50 neurons N/50 times as many.
            method: see `neurosde.models.sample`.
            closing: whether draws of the posterior take sweeps of Gibbs sampling in the end; guided ones do not.
            generator: seed or generator, on the device of the network.
            progress: show a progress bar, on a terminal.

        Returns:
            W (..., post, pre), shape (*shape, N, N), float64, on the device of the network.

        Raises:
            TypeError: the shape is a number.
            ValueError: numbers out of range.
            MemoryError: the GPU is too small.
        """
        if isinstance(shape, int):
            raise TypeError(f"shape must be a sequence of numbers; got {shape}. Give ({shape},).")
        shape = tuple(check_count(size, "shape") for size in shape)
        source = as_generator(generator, self.model.device)
        N = self.num_neurons
        in_W = self._drawn(math.prod(shape), source, dynamics)
        denoise, evidence, gain = self._denoiser(in_W)
        guided: Denoiser = denoise
        if guidance != 1:
            guided = ClassifierFreeGuidance(denoise, self._prior(gain), guidance, guidance_interval)
        J = sample(
            guided, (math.prod(shape), len(self.statistics), N, N), method=method,
            sigmas=weight_levels(N, steps, self.model.config.sigma_max),
            evidence=evidence if guidance else None,
            generator=source, device=self.model.device, progress=progress,
        )  # fmt: skip
        J = resolved(J, self.model.config, self.family, source)
        W = J * (gain / math.sqrt(N))[..., None, None]
        if closing and guidance == 1:
            W = self._closed(W, in_W, source)
        return self._shaped(W, shape)

    @property
    def mean(self) -> Float[Tensor, "*recording post pre"]:
        """Posterior mean of the weights, by the denoiser at σ_max; for the most probable σ and τ where not known.

        It is what the network says, as densities are; draws are closed by Gibbs sampling (`sample`).
        """
        found = self._at_most_noise(lambda denoise, x, s: denoise(x, s))
        return self._shaped(found.mean(0, keepdim=True), ())

    def refine(
        self,
        draws: Float[Tensor, "draw *recording post pre"],
        *,
        method: Refiner = "gibbs",
        sweeps: int | None = None,
        steps: int | None = None,
        rho: float | None = None,
        dynamics: Dynamics | None = None,
        prior: DiffusionPrior | None = None,
        log_prob: Callable[[Tensor], Tensor] | None = None,
        closing: bool = True,
        generator: int | torch.Generator | None = None,
        progress: bool = False,
    ) -> Refinement:
        """Move draws to the posterior of a prior, by default this posterior's own, and the likelihood itself.

        Its own prior is the network's, but where weights are told to obey Dale's law or to be sparse: then it is known
        in closed form, and to split Gibbs that of low-rank ones is known by sampling (`prior_denoiser`). Guidances ask
        for the prior only. Split Gibbs asks the network at first for what it has learnt of recordings too, and less and
        less so: in its last sweeps only for the prior, next to where draws are. Where σ or τ is not known, each draw
        has its own, as in `sample`, and keeps it.

        With a `prior` of weights alone nothing is asked of this posterior's network: sweeps begin at a ρ at which draws
        forget where they were, and many more are needed. By their default number weights of 50 neurons under Dale's law
        come out 4 % too small.

        Args:
            draws: W to begin with, such as of `sample`, on the device of the network, shape (draw, post, pre), of
                several recordings (draw, recording, post, pre).
            method: "gibbs" (`SplitGibbs`, exact in the limit), or a guidance, which is an approximation: "mmps",
                "pigdm", "dps" (`GuidedDiffusion`).
            sweeps: of method gibbs, see `SplitGibbs`; with a prior 192 unless given.
            steps: noise levels, of method gibbs those of each sweep, with a prior 24 unless given.
            rho: how far draws may go from where they begin, in units of the spread of a weight; of method gibbs with a
                prior 3 √N unless given. For draws that are nearly right, such as those of `sample`, 0.3 with 8 sweeps
                is enough, and keeps them better.
            dynamics: τ and σ of each draw, as many as draws, of `dynamics`; None draws them.
            prior: a trained prior in place of this posterior's, on the same device; where it is of several ensembles it
                is told the family that this posterior was.
            log_prob: a likelihood of W (draw, post, pre) to guide by in place of that of transitions, such as a
                `RolloutLikelihood`; for methods "pigdm" and "dps".
            closing: whether draws of method gibbs take sweeps of Gibbs sampling given their structure in the end, as in
                `sample`; with a prior of several ensembles, where one is told.
            generator: seed or generator, on the device of the network.
            progress: show a progress bar, on a terminal.

        Returns:
            The refined draws, in the units of W, and how they came about.

        Warns where a guidance diverges for some of the draws, which stay as they were: `Refinement.diverged`.

        Raises:
            ValueError: draws of another shape, a guidance for several recordings, numbers out of range, or a gain or a
                family that the prior is not of.
            FloatingPointError: a guidance diverges for all draws.
        """
        if self._several and method != "gibbs":
            raise ValueError(f"method {method!r} takes one recording at a time; condition on each alone.")
        N = self.num_neurons
        wanted = (len(self.statistics), N, N) if self._several else (N, N)
        if draws.ndim != 1 + len(wanted) or draws.shape[1:] != wanted:
            raise ValueError(f"draws must be (draw, {', '.join(map(str, wanted))}); got {tuple(draws.shape)}.")
        if prior is not None:
            check_prior(prior, self.family, self.gain)
        options = refiner_options(method, N, sweeps, steps, rho, prior is not None, log_prob is not None)
        source = as_generator(generator, self.model.device)
        in_W = self._drawn(len(draws), source, dynamics)

        def close(W: Tensor) -> Tensor:
            if not closing or method != "gibbs":
                return W
            each = W if self._several else W.unsqueeze(1)
            if prior is None:
                found = self._closed(each, in_W, source)
            else:
                found = closed_as_trained(each, in_W, prior.config, self.family, None, gain=None, generator=source)
            return found.view_as(W)

        return refine_draws(
            draws, in_W if self._several else in_W[:, 0], method, options,
            given=self._denoiser,
            prior=partial(self._prior, sampled=method == "gibbs")
            if prior is None
            else prior_in_units(prior, self.family),
            ask_given=prior is None,
            resolve=partial(resolved, config=(self.model if prior is None else prior).config, family=self.family),
            close=close, log_prob=log_prob, generator=source, progress=progress,
        )  # fmt: skip

    def sd(self, draws: int = 256, generator: int | torch.Generator | None = 0) -> Tensor:
        """Posterior standard deviation of each weight, from draws, shape (*recording, post, pre)."""
        return self.sample((check_count(draws, "draws", 2),), generator=generator).std(0)

    def interval(
        self, level: float, draws: int = 256, generator: int | torch.Generator | None = 0
    ) -> tuple[Tensor, Tensor]:
        """Lower and upper end of the central interval of each weight, from draws, each (*recording, post, pre).

        Raises:
            ValueError: the level is not between 0 and 1, or draws are too few: the widest interval of S draws, between
                the least and the largest, covers (S − 1)/(S + 1).
        """
        if not 0 < level < 1:
            raise ValueError(f"level must lie between 0 and 1; got {level}.")
        least = math.ceil((1 + level) / (1 - level) * (1 - 1e-9))
        if check_count(draws, "draws", 2) < least:
            raise ValueError(
                f"{draws} draws have no interval of {level:g}, the widest covers {(draws - 1) / (draws + 1):.3g}; give "
                f"draws={least} or more."
            )
        drawn = self.sample((draws,), generator=generator)
        tails = [(1 - level) / 2, (1 + level) / 2]
        # Weibull's plotting positions k/(S + 1) make the expected coverage of S draws exact where (S + 1) times a tail
        # is a whole number, and nearly so elsewhere.
        ends = torch.from_numpy(np.quantile(drawn.cpu().numpy(), tails, axis=0, method="weibull")).to(drawn)
        return ends[0], ends[1]

    def log_prob(
        self,
        weights: Tensor,
        *,
        resolution: float = 0.0,
        probes: int | None = 8,
        steps: int = FLOW_STEPS,
        generator: int | torch.Generator | None = 0,
        progress: bool = False,
    ) -> Tensor:
        """Log posterior density of weights, by the probability flow; for the most probable σ and τ where not known.

        Exact zeros, such as sparse weights have, have no density: what is returned of them is that of weights below
        the smallest noise level. With a resolution s it is the density of W + s s₀ ε instead, ε standard normal, which
        weights of any kind have; give it such weights.

        Args:
            weights: W, shape (..., post, pre), of several recordings (..., recording, post, pre).
            resolution: s, in units of `unit`.
            probes: random signs per trace, see `flow_log_density`; None for the exact trace.
            steps: noise levels.
            generator: seed or generator of the signs.
            progress: show a progress bar, on a terminal.

        Returns:
            log p(W | recording), shape (...).

        Raises:
            ValueError: weights of another number of neurons or that are not finite, or numbers out of range.
        """
        N, count = self.num_neurons, len(self.statistics)
        wanted = (count, N, N) if self._several else (N, N)
        if tuple(weights.shape[-len(wanted) :]) != wanted:
            raise ValueError(f"weights must be of shape (..., {', '.join(map(str, wanted))}); got {weights.shape}.")
        if not bool(weights.isfinite().all()):
            raise ValueError("weights must be finite; leave out those that are not.")
        shape = weights.shape[: -len(wanted)]
        W = weights.to(self._scales).reshape(-1, count, N, N)
        denoise, evidence, gain = self._denoiser(self._most_probable(len(W)))
        unit = gain / math.sqrt(N)
        found = flow_log_density(
            denoise, W / unit[..., None, None], sigmas=noise_levels(steps, self.model.config.sigma_max),
            evidence=evidence, resolution=resolution, probes=probes, generator=generator, progress=progress,
        )  # fmt: skip
        found = (found - N**2 * unit.log()).reshape(*shape, count)
        return found if self._several else found.squeeze(-1)

    @property
    def family_probabilities(self) -> dict[str, Tensor]:
        """Posterior probability of each ensemble, all equally probable before, shape () or (recording,).

        Raises:
            ValueError: the family was told.
        """
        if self.family is not None:
            raise ValueError(f"the family is known to be {self.family!r}: leave family out of condition().")

        def log_families(denoise: Denoiser, x: Tensor, s: Tensor) -> Tensor:
            assert isinstance(denoise, NetworkDenoiser)  # which it is unless the family is told
            return denoise.log_families(x, s)

        probabilities = self._at_most_noise(log_families).exp().mean(0)
        shaped = probabilities if self._several else probabilities[0]
        return {name: shaped[..., k] for k, name in enumerate(self.model.families)}

    def _closed(self, W: Tensor, in_W: Evidence, source: torch.Generator | None) -> Tensor:
        """Draws (draw, recording, post, pre) after sweeps of Gibbs sampling, each of its own ensemble."""

        def log_families(W: Tensor) -> Tensor:
            denoise, _, gain = self._denoiser(in_W)
            assert isinstance(denoise, NetworkDenoiser)  # which it is unless the family is told
            sigma = torch.tensor(SIGMA_MIN, dtype=torch.float64, device=W.device)
            with torch.no_grad():
                return denoise.log_families(W / (gain / math.sqrt(self.num_neurons))[..., None, None], sigma)

        config, family = self.model.config, self.family
        return closed_as_trained(W, in_W, config, family, log_families, gain=self.gain, generator=source)

    def _most_probable(self, count: int) -> Evidence:
        """Evidence in units of W, (count, recording), for the most probable σ and τ where they are not known."""
        scales = self._scales.expand(count, -1)
        return self._evidence.expand(scales.shape).over_noise(scales.square())

    def _drawn(self, count: int, source: torch.Generator | None, dynamics: Dynamics | None = None) -> Evidence:
        """Evidence in units of W, (count, recording), each with its own draw of what is not known of σ and τ."""
        if dynamics is not None and len(dynamics) != count:
            raise ValueError(f"dynamics must be of as many draws as W, {count}; got {len(dynamics)}.")
        if self._all_known:
            return self._most_probable(count)
        if dynamics is None:
            own = draw_dynamics(self._recordings, count, self._gains, self._known_noise, source)
        else:
            own = Dynamics(*(one.reshape(count, -1) for one in (dynamics.tau, dynamics.noise_std)))
        return evidence_given(self._recordings, own).to(self.model.device)

    @property
    def _all_known(self) -> bool:
        return self._known_noise is not None and all(isinstance(one, TransitionStatistics) for one in self._recordings)

    def _denoiser(self, in_W: Evidence) -> tuple[Denoiser, Evidence, Tensor]:
        """The denoiser, the evidence in its units, and the gain that the unit stands for, (draw, recording)."""
        N = self.num_neurons
        if self.gain is None:
            gain = evidence_gain(in_W, *self.model.config.gains)
        else:
            gain = torch.full_like(in_W.eigenvalues[..., 0], self.gain)
        evidence = in_W.scaled(gain / math.sqrt(N))
        return self._given(evidence, gain), evidence, gain

    def _prior(self, gain: Tensor, sampled: bool = False) -> Denoiser:
        """The denoiser without a recording, in the units of the one with it; see `prior_denoiser`."""
        known = self.gain is not None
        return prior_denoiser(self._network, self.model.config, self.family, self.num_neurons, gain, known, sampled)

    def _given(self, evidence: Evidence, gain: Tensor) -> Denoiser:
        """The denoiser given evidence, in the unit of a gain each."""
        return conditioned_denoiser(
            self._network, self.model.config, self.family, evidence, gain, self.gain is not None
        )

    def _at_most_noise(self, what: Callable[[Denoiser, Tensor, Tensor], Tensor]) -> Tensor:
        """Evaluate at σ_max, in units of W for matrices: shape (evaluation, recording, ...)."""
        N, count, sigma = self.num_neurons, len(self.statistics), self.model.config.sigma_max
        denoise, evidence, gain = self._denoiser(self._most_probable(MEAN_EVALUATIONS))
        source = torch.Generator(self.model.device).manual_seed(0)
        half = (MEAN_EVALUATIONS // 2, count, N, N)
        z = torch.randn(half, generator=source, dtype=torch.float64, device=self.model.device)
        s = torch.tensor(sigma, dtype=torch.float64, device=self.model.device)
        with torch.no_grad():  # at ±z about the Gaussian posterior's mean: what is linear in z cancels
            centre = fold(gain.new_zeros(*gain.shape, N, N), math.inf, evidence).posterior_mean
            found = what(denoise, centre + sigma * torch.cat([z, -z]), s)
        return found * (gain / math.sqrt(N))[..., None, None] if found.ndim == 4 else found

    def _shaped(self, W: Tensor, shape: Sequence[int]) -> Tensor:
        """Shape (*shape, recording, post, pre), without the dimension of recordings where there is but one."""
        W = W.reshape(*shape, *W.shape[1:])
        return W if self._several else W.squeeze(-3)
