"""What a refiner is called with: which methods there are, and what each takes."""

from __future__ import annotations

import math
from typing import Any, Literal

from neurosde.models.diffusion_prior import DiffusionPrior
from neurosde.models.split_gibbs import PRIOR_EXACT_SHARE, PRIOR_RHO, PRIOR_STEPS, PRIOR_SWEEPS

Refiner = Literal["gibbs", "mmps", "pigdm", "dps"]


def refiner_options(
    method: Refiner,
    N: int,
    sweeps: int | None,
    steps: int | None,
    rho: float | None,
    prior: bool,
    log_prob: bool,
) -> dict[str, Any]:
    """Return the options of `SplitGibbs` or `GuidedDiffusion`, those that are given and those of a prior.

    Args:
        method: the refiner.
        N: neurons.
        sweeps: of method gibbs.
        steps: noise levels.
        rho: how far draws may go.
        prior: whether a prior of weights alone is asked.
        log_prob: whether a likelihood other than that of transitions is asked for.

    Raises:
        ValueError: an option of another method.
    """
    if method != "gibbs" and sweeps is not None:
        raise ValueError(f"sweeps are of method 'gibbs'; got {sweeps} with {method!r}. Leave sweeps out.")
    if method == "gibbs" and log_prob:
        raise ValueError("method 'gibbs' needs the likelihood of transitions; guide by 'pigdm' or 'dps'.")
    given: dict[str, Any] = {"sweeps": sweeps, "steps": steps, "rho": rho}
    options = {name: value for name, value in given.items() if value is not None}
    if prior and method == "gibbs":
        options = {"sweeps": PRIOR_SWEEPS, "steps": PRIOR_STEPS, "rho": PRIOR_RHO * math.sqrt(N)} | options
        options["exact_share"] = PRIOR_EXACT_SHARE
    return options


def check_prior(prior: DiffusionPrior, family: str | None, gain: float | None) -> None:
    """Raise ValueError for a prior that contradicts what is known of the weights."""
    if gain is not None:
        raise ValueError(f"a prior has gains of its own; got gain = {gain:g}. Leave the gain out, or the prior.")
    if prior.families or family is None:
        return
    names = [one["name"] for one in prior.config.training.get("ensembles", [])]
    if names and family not in names:
        raise ValueError(
            f"the family is known to be {family!r}, and the prior is of {names[0]!r}; choose a prior of this family, "
            "or leave one of them out."
        )
