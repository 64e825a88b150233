"""The exact posterior of a task's networks, where it is known, and how far from it a method is.

It is known of Gaussian, sparse and low-rank weights (`neurosde.models.exact_posterior`), given the ensemble and its
gain. A method that is not told both has another posterior, and rightly so: its distance from the exact one is then what
not being told costs, and only of one that is told both is it an error.

Exact draws are independent for Gaussian weights, and for sparse ones whose supports are summed over. All others come
from chains: of larger networks those take longer than all methods, and networks whose chains disagree have no
reference.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from neurosde.datasets.ensembles import Gaussian, LowRank, Sparse
from neurosde.evaluation.c2st import FOLDS, c2st
from neurosde.evaluation.inference_tasks import Task, record
from neurosde.evaluation.scores import gaussian_kl, spread_ratios
from neurosde.models.exact_posterior import BURN_IN, CHAINS, DISAGREEMENT, ENUMERATED, exact_posterior
from neurosde.models.gaussian_posterior import GaussianPosterior
from neurosde.models.recorded import recording_evidence

DRAWS = 512
THIN = 32  # of chains: at 8 those of half of the sparse networks of 20 neurons and 1000 times disagreed
LARGEST = 20  # neurons, where draws come from chains
RATIO_DRAWS = 2000  # of each of two laws whose densities are known
METRICS = (
    "kl", "kl_floor", "to_exact", "sd_ratio", "least_variance", "largest_variance", "c2st_mlp", "c2st_forest",
    "c2st_ratio",
)  # fmt: skip


@dataclass(frozen=True)
class ExactReference:
    """Exact posteriors of networks.

    Attributes:
        mean: their means (network, post, pre).
        draws: shape (draw, network, post, pre).
        directions: eigenvectors of Λ as columns (network, pre, direction).
        known: whether there is a reference, the chains having mixed, shape (network,).
        densities: of Gaussian weights, the posteriors themselves.
    """

    mean: Tensor
    draws: Tensor
    directions: Tensor
    known: np.ndarray
    densities: list[GaussianPosterior] | None


@lru_cache(maxsize=2)
def exact_reference(task: Task, seeds: tuple[int, ...]) -> ExactReference | None:
    """Return the exact posteriors of a task's networks, or None of an ensemble or size that has none."""
    kind = task.kind
    independent = isinstance(kind, Gaussian) or (isinstance(kind, Sparse) and task.neurons <= ENUMERATED)
    if not isinstance(kind, Gaussian | Sparse | LowRank) or not (independent or task.neurons <= LARGEST):
        return None
    statistics = record(task, seeds).statistics
    scales = torch.tensor([one.noise_scale(task.noise_std) for one in statistics], dtype=torch.float64)
    evidence = recording_evidence(statistics).over_noise(scales.square())
    assert evidence.vectors is not None
    burn_in, thin = (0, 1) if independent else (BURN_IN, THIN)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the chains of", UserWarning)  # such networks are marked instead
        found = exact_posterior(kind, evidence, DRAWS, burn_in=burn_in, thin=thin, seed=seeds[0])
    mixed = (found.mean_error * math.sqrt(CHAINS) <= DISAGREEMENT).numpy()
    densities = None
    if isinstance(kind, Gaussian):
        v = kind.variance(task.neurons)
        densities = [GaussianPosterior.from_statistics(one, task.noise_std, v) for one in statistics]
    known = np.ones(len(seeds), bool) if independent else mixed
    return ExactReference(found.mean, found.weights, evidence.vectors, known, densities)


def compared_with_exact(
    estimate: Tensor,
    draws: Tensor | None,
    densities: list[GaussianPosterior] | None,
    reference: ExactReference,
    seed: int,
) -> list[dict[str, float]]:
    """Return those of `METRICS` that a method has, of each network.

    - `to_exact`: |Ŵ − exact mean|/|exact mean|.
    - `sd_ratio`, `least_variance`, `largest_variance`: `scores.spread_ratios` along eigenvectors of Λ.
    - `kl`, `kl_floor`: `scores.gaussian_kl` beside what the number of draws alone makes of it.
    - `c2st_mlp`, `c2st_forest`: accuracy of a classifier between draws and as many exact ones, all of W along
      eigenvectors of Λ; it rises with the number of draws, and with few of them detects gross differences only.
    - `c2st_ratio`: accuracy of the best classifier there is, by the ratio of both densities.

    Args:
        estimate: Ŵ (network, post, pre).
        draws: of the method (draw, network, post, pre), if it has some.
        densities: its posteriors, if they are Gaussian.
        reference: the exact posteriors.
        seed: of the classifiers.
    """
    exact = reference.mean.numpy()
    rows: list[dict[str, float]] = []
    for k, known in enumerate(reference.known):
        if not known:
            rows.append({})
            continue
        error = np.linalg.norm(estimate[k].double().numpy() - exact[k]) / np.linalg.norm(exact[k])
        row = {"to_exact": float(error)}
        if draws is not None:
            row |= _of_draws(draws[:, k].double(), reference.draws[:, k], reference.directions[k], seed)
        if densities is not None and reference.densities is not None:
            row["c2st_ratio"] = ratio_accuracy(densities[k], reference.densities[k], seed)
        rows.append(row)
    return rows


def _of_draws(draws: Tensor, exact: Tensor, directions: Tensor, seed: int) -> dict[str, float]:
    ratios = spread_ratios(draws.numpy(), exact.numpy(), directions.numpy())
    found = {"sd_ratio": float(ratios["sd"])}
    found |= {name: float(ratios[name]) for name in ("least_variance", "largest_variance")}
    found |= gaussian_kl(draws.numpy(), exact.numpy())
    count = min(len(draws), len(exact))
    if count >= 2 * FOLDS:
        of_draws, of_exact = (one @ directions for one in (draws, exact))
        spread = of_exact.std(0)
        unit = torch.where(spread > 0, spread, math.inf)  # a row without connections in any draw
        # Exact draws lie chain after chain: some of each.
        chosen = torch.linspace(0, len(exact) - 1, count).long()
        pair = [(one / unit).flatten(1).numpy() for one in (of_exact[chosen], of_draws[:count])]
        found["c2st_mlp"] = c2st(*pair, seed=seed).accuracy
        found["c2st_forest"] = c2st(*pair, seed=seed, classifier="forest").accuracy
    return found


def ratio_accuracy(first: GaussianPosterior, second: GaussianPosterior, seed: int = 0) -> float:
    """Accuracy of the best classifier between draws of two laws: the one whose density is larger is named.

    It is ½ + ¼ ∫|p − q|, estimated from draws of either; where both densities are the same either answer is half right.
    """
    right = []
    for k, (own, other) in enumerate(((first, second), (second, first))):
        W = own.sample((RATIO_DRAWS,), seed + k)
        apart = own.log_prob(W) - other.log_prob(W)
        same = apart.abs() < 1e-9 * (1 + W[0].numel())
        right.append(torch.where(same, 0.5, (apart > 0).double()).mean())
    return float(sum(right) / 2)
