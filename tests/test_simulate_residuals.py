"""Whether residuals of posterior draws look as the model says."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from neurosde.datasets.recordings import Recording
from neurosde.likelihood import transition_statistics, transitions
from neurosde.models import GaussianPosterior, InferenceConfig, infer
from neurosde.residuals import LIMIT, residual_checks
from neurosde.solve import simulate_rate_network

D = torch.float64
N, SIGMA, DT, GAIN = 10, 0.3, 0.1, 1.2


def network(generator):
    return GAIN / math.sqrt(N) * torch.randn(N, N, generator=generator, dtype=D)


def simulated(seed, T=80, trials=2, noise_std=SIGMA, dt=DT, weights=None):
    generator = torch.Generator().manual_seed(seed)
    W = network(generator)
    h0 = torch.randn(trials, N, generator=generator, dtype=D)
    _, h = simulate_rate_network(W, h0, T, dt, 1.0, noise_std=noise_std, return_h=True, generator=generator)
    if weights is not None:  # goes on with others
        _, after = simulate_rate_network(weights, h[:, -1], T, dt, 1.0, noise_std=noise_std, return_h=True, generator=1)
        h = torch.cat([h, after[:, 1:]], dim=1)
    return h


def checks(h, draws=1, dt=DT, seed=0, **known):
    statistics = transition_statistics(voltage=h, dt=dt)
    statistics = statistics if known.get("input_known", True) else statistics.without_input()
    posterior = GaussianPosterior.from_statistics(statistics, SIGMA, GAIN**2 / N)
    W = posterior.sample((draws,), seed)
    scale = torch.full((draws,), statistics.noise_scale(SIGMA))
    return {one.name: one for one in residual_checks(transitions(voltage=h, dt=dt), W, scale, **known)}


@pytest.mark.parametrize("known", [{}, {"noise_known": False}, {"input_known": False}], ids=["all", "noise", "input"])
def test_under_the_model_scores_of_a_draw_are_standard_normal(known):
    """Of 200 recordings that are too short to tell N = 10 weights per neuron from each other; p-values after Holm."""
    scores = [checks(simulated(seed), seed=seed, **known) for seed in range(200)]
    wanted = {"whiteness", "leak", "neurons", "stationarity", "drift", "tails", "noise", "input"}
    missing = {name.removesuffix("_known") for name in known}
    assert set(scores[0]) == wanted - missing - ({"leak"} if "input" in missing else set())
    p = {name: scipy.stats.kstest([one[name].score for one in scores], "norm").pvalue for name in scores[0]}
    # Kurtosis and the variances of single neurons are normal in the limit of long recordings only.
    exact = {"whiteness", "leak", "stationarity", "noise", "input"} & set(p)
    assert min(p[name] for name in exact) > 0.01 / len(exact)
    assert all(abs(one.score) < LIMIT and not one.failed for each in scores for one in each.values())


def test_what_is_wrong_is_noticed():
    other = network(torch.Generator().manual_seed(99))
    uneven = torch.linspace(0.15, 0.45, N, dtype=D)
    h = simulated(0, T=400)
    smooth = 0.5 * (h[:, 1:] + h[:, :-1])
    louder = torch.cat([h, simulated(0, T=400, noise_std=0.5)], dim=0)
    assert checks(simulated(0, T=400, noise_std=0.4), 9)["noise"].score > LIMIT
    assert checks(h, 9, dt=0.2)["noise"].failed
    assert checks(smooth, 9)["whiteness"].score > LIMIT
    assert checks(simulated(0, T=400, noise_std=uneven), 9)["neurons"].failed
    assert checks(louder, 9)["stationarity"].score < -LIMIT
    assert checks(simulated(0, T=300, trials=1, weights=other), 9)["drift"].failed
    spikes = h + 3 * (torch.rand(h.shape, generator=torch.Generator().manual_seed(0)) < 0.001)
    assert checks(spikes, 9)["tails"].score > LIMIT


def test_inference_warns_of_what_it_cannot_explain():
    x = np.tanh(simulated(3, T=400).numpy())
    config = InferenceConfig(noise_std=SIGMA, gain=GAIN, draws=16, predictive_draws=0)
    good = infer(Recording(x, "good", dt=DT), config)  # warnings are errors here
    assert {one.name for one in good.checks} >= {"whiteness", "leak"}
    with pytest.warns(UserWarning, match="the recording does not look as the model says"):
        infer(Recording(x, "wrong dt", dt=2 * DT), config)
    with pytest.warns(UserWarning, match="correlated in time"):
        infer(Recording(0.5 * (x[:, 1:] + x[:, :-1]), "smoothed", dt=DT), config)


def test_nothing_to_check():
    h = torch.zeros(1, 5, N, dtype=D)
    W = torch.zeros(1, N, N, dtype=D)
    (noise,) = residual_checks(transitions(voltage=h, dt=DT), W, torch.ones(1))
    assert noise.name == "noise" and noise.score < -LIMIT and "less than noise_std says" in noise.meaning
    assert residual_checks(transitions(voltage=h, dt=DT), W, torch.ones(1), noise_known=False) == []
    saturated = 40 * torch.ones(1, 5, N)
    pieces = transitions(voltage=saturated, dt=DT, max_voltage_error=1e-9)
    with pytest.raises(ValueError, match="no transition"):
        residual_checks(pieces, W, torch.ones(1))
