"""Does a recording look as the model says, once its weights are inferred?

If W is a draw of the exact posterior, W and the recording are jointly as the true weights and the recording are. So the
residuals y − Wφ of a draw are white Gaussian noise of standard deviation s, for any number of transitions and however
little they tell of W, and each check below is standard normal:

- `noise`: their variance, where σ is known;
- `whiteness`: their correlation from one time to the next; wrong dt, smoothing and colored noise show here;
- `leak`: their correlation with h, which only a wrong dt/τ leaves over, where the input is known;
- `input`: their mean in each neuron, where the input is known;
- `neurons`: their variance differs between neurons;
- `stationarity`: it differs between the first and the second half;
- `drift`: they correlate with φ, the other way round in the second half: the weights changed;
- `tails`: their kurtosis, by the test of Anscombe and Glynn (1983).

The median over some draws is reported, which is nearer to 0 than one draw's is.

References:
    Posterior predictive assessment of model fitness via realized discrepancies (Gelman, Meng, Stern, 1996),
    https://www.jstor.org/stable/24306036
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import scipy.stats
import torch
from torch import Tensor

from neurosde.likelihood import Transitions

MEANINGS = {
    "noise": "the noise is {more} than noise_std says",
    "whiteness": "residuals are correlated in time: wrong dt, smoothed or filtered rates, or noise that is not white",
    "leak": "residuals follow the voltage: dt or tau is not what it is said to be",
    "input": "residuals have means: there is an input that was not given (estimate_input)",
    "neurons": "the noise differs between neurons, and one noise_std is assumed",
    "stationarity": "the noise is not the same in the first and the second half",
    "drift": "the weights are not the same in the first and the second half",
    "tails": "the noise has heavier or lighter tails than a Gaussian",
}
LIMIT = 5.0  # standard deviations, which a normal score exceeds in one of 1.7 million cases
LEAST_FOR_TAILS = 20  # residuals: fewer are too few for the normal approximation of their kurtosis


@dataclass(frozen=True)
class ResidualCheck:
    """What a check found.

    Attributes:
        name: of the check.
        score: standard normal if the model holds.
        meaning: what a large score says.
    """

    name: str
    score: float
    meaning: str

    @property
    def failed(self) -> bool:
        """Whether the score is beyond what the model can show by chance."""
        return abs(self.score) > LIMIT


def residual_checks(
    transitions: Iterable[Transitions],
    weights: Tensor,
    noise_scale: Tensor,
    *,
    noise_known: bool = True,
    input_known: bool = True,
) -> list[ResidualCheck]:
    """Check the residuals of posterior draws.

    Args:
        transitions: the recording's (`neurosde.likelihood.transitions`).
        weights: draws of W from the posterior, shape (draw, post, pre), float64.
        noise_scale: standard deviation s of y about Wφ that each was drawn with, shape (draw,).
        noise_known: whether σ was given; if it was estimated its value is not checked.
        input_known: whether the input was given; if it was integrated out, means are taken off.

    Returns:
        The checks that the recording is long enough for.

    Raises:
        ValueError: no transition is good enough.
    """
    pieces = [one for one in transitions if bool(one.good.any())]
    if not pieces:
        raise ValueError("no transition of the recording is known well enough to be checked.")
    scores = [_scores(pieces, W, float(s), noise_known, input_known) for W, s in zip(weights, noise_scale, strict=True)]
    found = []
    for name, meaning in MEANINGS.items():
        values = [one[name] for one in scores if name in one]
        if values:
            score = float(torch.tensor(values).median())
            found.append(ResidualCheck(name, score, meaning.format(more="more" if score > 0 else "less")))
    return found


def _scores(pieces: list[Transitions], W: Tensor, s: float, noise_known: bool, input_known: bool) -> dict[str, float]:
    residuals = [(one.y - one.x @ W.mT) / s for one in pieces]
    good = [one.good for one in pieces]
    r = torch.cat([residual[ok] for residual, ok in zip(residuals, good, strict=True)])
    x = torch.cat([one.x[ok] for one, ok in zip(pieces, good, strict=True)])
    n, N = r.shape
    if not bool(r.any()) or not bool(x.any()):
        return {"noise": _of_chi2(float(r.square().sum()), n * N)} if noise_known else {}
    found: dict[str, float] = {}
    spent = 0 if input_known else 1  # transitions
    if input_known:
        found["input"] = _of_chi2(float(n * r.mean(0).square().sum()), N)
    else:
        residuals = [residual - r.mean(0) for residual in residuals]
        r = r - r.mean(0)
    if noise_known:
        found["noise"] = _of_chi2(float(r.square().sum()), (n - spent) * N)
    else:
        r = r / r.square().mean().sqrt()
    pairs = [
        (residual[:-1][ok[1:] & ok[:-1]], residual[1:][ok[1:] & ok[:-1]])
        for residual, ok in zip(residuals, good, strict=True)
    ]
    before, after = (torch.cat([pair[k] for pair in pairs]) for k in (0, 1))
    size = float(before.norm()) * float(after.norm())
    if size > 0:
        product = float((before * after).sum()) / size
        found["whiteness"] = (product + spent / n) * math.sqrt(before.numel())  # the mean taken off lowers it by 1/n
    if input_known:  # an estimated mean of h depends on the noise after h
        h = torch.cat([one.h[ok] for one, ok in zip(pieces, good, strict=True)])
        found["leak"] = float((r * h).sum() / h.norm())
    power = r.square()
    # log of a χ² of n degrees over n: standard deviation √(2/n)
    each = power.mean(0).log() - power.mean(0).log().mean()
    found["neurons"] = _of_chi2(float(each.square().sum()) * n / 2, N - 1) if N > 1 else 0.0
    half = n // 2
    if half > 1:
        ratio = float(power[:half].mean().log() - power[half:].mean().log())
        found["stationarity"] = ratio / math.sqrt(2 / (half * N) + 2 / ((n - half) * N))
    if n > 4 * N:
        sign = torch.ones(n, 1, dtype=r.dtype)
        sign[half:] = -1
        eigenvalues, vectors = torch.linalg.eigh(x.mT @ x)
        kept = eigenvalues > 1e-9 * eigenvalues[-1]
        along = (r * sign).mT @ x @ vectors[:, kept] / eigenvalues[kept].sqrt()
        found["drift"] = _of_chi2(float(along.square().sum()), along.numel())
    if r.numel() >= LEAST_FOR_TAILS:
        found["tails"] = float(scipy.stats.kurtosistest(r.flatten().numpy()).statistic)
    return found


def _of_chi2(square: float, degrees: int) -> float:
    """A χ² variable as a standard normal one.

    References:
        The distribution of chi-square (Wilson, Hilferty, 1931), https://doi.org/10.1073/pnas.17.12.684
    """
    spread = 2 / (9 * degrees)
    return ((square / degrees) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
