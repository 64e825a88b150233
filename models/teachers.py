"""Teachers: denoisers of one ensemble each that a prior learns from, in place of weights.

A teacher says E[W | W_s] of one ensemble. That is what a prior of several ensembles is to say where it is told the
ensemble; where it is not, its mean over the ensembles given W_s is what is to be said. So by the tower property it is a
target as good as W itself (`neurosde.models.structured_mean`). Of a matrix whose ensemble is told it does not scatter
at all about what is to be learnt; else only as far as W_s leaves open which ensemble it was.

References:
    Distilling the knowledge in a neural network (Hinton, Vinyals, Dean, 2015), https://arxiv.org/abs/1503.02531
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from neurosde.datasets.ensemble_options import plain_parameters
from neurosde.datasets.ensembles import Ensemble
from neurosde.models.best_denoiser import CLOSED, best_denoiser, in_closed_form
from neurosde.models.diffusion_prior import DiffusionPrior, load_prior
from neurosde.models.edm import Denoiser
from neurosde.models.graphed_network import GraphedNetwork
from neurosde.models.network_denoiser import NetworkDenoiser

EXACT = "exact"


class Teachers:
    """Denoisers of one ensemble each: trained priors, or the best ones where they are known in closed form.

    Args:
        names: one for each of the ensembles, in their order: files of trained priors, names of priors that come with
            neurosde, or "exact" for the best denoiser.
        ensembles: what they are to teach.
        gain_rms: g_rms of the unit in which they are asked, W = J g_rms/√N.
        sizes: numbers of neurons that they are asked about.

    Raises:
        FileNotFoundError: no such prior.
        ValueError: another number of teachers, a prior that was not trained on its ensemble alone, or with fewer or
            more neurons, or an ensemble whose best denoiser is not known in closed form.
    """

    def __init__(self, names: Sequence[str], ensembles: Sequence[Ensemble], gain_rms: float, sizes: Sequence[int]):
        if len(names) != len(ensembles):
            raise ValueError(
                f"teachers must be one for each of the {len(ensembles)} ensembles, in their order; got {list(names)}."
            )
        self.gain_rms, self.sizes = gain_rms, sizes
        self._teachers = [self._teacher(name, kind) for name, kind in zip(names, ensembles, strict=True)]

    def mean(self, x: Tensor, sigma: Tensor, ensemble: Tensor) -> Tensor:
        """Return E[J | J_s, ensemble].

        Args:
            x: J_s, shape (matrix, post, pre).
            sigma: noise level of each, shape (matrix,).
            ensemble: index of the ensemble of each, shape (matrix,).
        """
        found = torch.zeros_like(x)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):  # a training's: bfloat16 is for its network
            for k, teacher in enumerate(self._teachers):
                some = (ensemble == k).nonzero().squeeze(-1)
                if len(some):
                    found[some] = teacher(x[some], sigma[some])
        return found

    def _teacher(self, name: str, kind: Ensemble) -> Denoiser:
        if name == EXACT:
            if not in_closed_form(kind):
                closed = ", ".join(one.name for one in CLOSED)
                raise ValueError(
                    f"the best denoiser is known in closed form for the ensembles {closed}; got {kind.name}. Give a "
                    "trained prior as its teacher."
                )
            return best_denoiser(kind, self.gain_rms)
        prior = load_prior(name)
        if (knows := prior.config.training.get("ensembles")) != [plain_parameters(kind)]:
            raise ValueError(
                f"{name} was trained on {knows or 'cubes'}, and is to teach {plain_parameters(kind)}; choose a prior "
                "of that ensemble, or give the ensemble the parameters that the prior has."
            )
        low, high = min(prior.config.sizes), max(prior.config.sizes)
        if not low <= min(self.sizes) <= max(self.sizes) <= high:
            raise ValueError(
                f"{name} was trained with {low} to {high} neurons, and is to teach of {min(self.sizes)} to "
                f"{max(self.sizes)}; choose N in its range, or another teacher."
            )
        # Matrices of a batch are shared out evenly over the ensembles, but for one: two shapes for each size.
        return _Trained(prior, prior.config.gain_rms / self.gain_rms, 2 * len(self.sizes))


class _Trained:
    """A trained prior's denoiser in another unit, on the device where it is asked."""

    def __init__(self, prior: DiffusionPrior, unit: float, shapes: int) -> None:
        self._network, self._unit = GraphedNetwork(prior.network, shapes), unit

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        self._network.network.to(x.device)
        return self._unit * NetworkDenoiser(self._network)(x / self._unit, sigma / self._unit)
