"""What refiners of draws have in common: which draws they take, and what they tell of what they made of them."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from neurosde.models.edm import Evidence


@dataclass(frozen=True)
class Refinement:
    """What a refiner made of draws.

    Attributes:
        draws: refined draws, shape (draw, post, pre), in the units of the denoiser. Of several recordings each of these
            has a dimension more, the second one: (draw, recording, post, pre), (sweep, recording).
        rho: noise ρ of each sweep, shape (sweep,).
        moved: root mean square change of an entry in each sweep, over its spread among draws, shape (sweep,); of draws
            that did not diverge.
        log_likelihood: mean over these draws of tr(BWᵀ) − ½ tr(WΛWᵀ) after each sweep, shape (sweep,).
        r_hat: of log-likelihood and norm over the exact sweeps, if there are such, each draw a chain, the largest of
            all recordings: near 1 where every chain went everywhere. Chains that stay where they are have a large one,
            which says that their law is not proved, not that it is wrong.
        evaluations: of the denoiser, for each draw; products with its derivative are not counted.
        diverged: of which draws a guidance diverged, shape (draw,): they are as they were before.
    """

    draws: Float[Tensor, "draw *recording post pre"]
    rho: Float[Tensor, " sweep *recording"]
    moved: Float[Tensor, " sweep *recording"]
    log_likelihood: Float[Tensor, " sweep *recording"]
    r_hat: dict[str, float]
    evaluations: int
    diverged: Bool[Tensor, " draw *recording"]


def check_draws(draws: Tensor, evidence: Evidence, recordings: bool = False) -> None:
    """Raise ValueError unless draws are two or more, finite, of as many neurons as were recorded: (draw, post, pre).

    With `recordings` they may be (draw, recording, post, pre), too.
    """
    N, several = evidence.eigenvalues.shape[-1], recordings and draws.ndim == 4
    batch, given = draws.shape[:-2], tuple(evidence.eigenvalues.shape[:-1])
    fits = draws.ndim == 3 + several and draws.shape[-2:] == (N, N) and given in (batch[1:], batch)
    if not fits:
        count = f"{given[-1]}, " if several and given else ""
        of = f"{given[-1]} recordings say" if count else f"one recording of {N} neurons says"
        raise ValueError(f"draws must be (draw, {count}{N}, {N}), as {of}; got {tuple(draws.shape)}.")
    if len(draws) < 2 or not bool(draws.isfinite().all()):
        raise ValueError("draws must be at least two, and finite; leave out those that are not.")


def log_likelihood(W: Tensor, evidence: Evidence) -> Tensor:
    """tr(BWᵀ) − ½ tr(WΛWᵀ) of weights in the units of the evidence, shape (...)."""
    along = W if evidence.vectors is None else W @ evidence.vectors
    return (along * (evidence.cross - 0.5 * along * evidence.eigenvalues.unsqueeze(-2))).sum((-1, -2))
