"""Recordings whose time constant is not known: its statistics, its posterior, and what it does to the weights."""

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch

from neurosde.cli import main
from neurosde.datasets.recordings import Recording
from neurosde.evaluation.calibration import holm, ranks
from neurosde.evaluation.rank_calibration import uniformity
from neurosde.likelihood import transition_statistics
from neurosde.models import GaussianPosterior, InferenceConfig, infer, open_posterior
from neurosde.models.denoiser import PRESETS, PairNetwork
from neurosde.models.diffusion_cfg import CFGPosterior, PosteriorConfig
from neurosde.models.empirical_bayes import most_probable_time_constant, sample_noise_scales, sample_time_constants
from neurosde.models.posterior_file import dynamics_of
from neurosde.solve import simulate_rate_network
from neurosde.time_constant import time_constant_statistics

D = torch.float64
SIGMA, DT, RANGE = 0.4, 0.1, (0.6, 2.0)


def recorded(N=4, T=80, tau=1.0, gain=1.2, seed=0, sigma=SIGMA, drive="scaled"):
    source = torch.Generator().manual_seed(seed)
    W = gain / math.sqrt(N) * torch.randn(N, N, generator=source, dtype=D)
    h0 = torch.randn(2, N, generator=source, dtype=D)
    x, h = simulate_rate_network(W, h0, T, DT, tau, noise_std=sigma, return_h=True, generator=source, drive=drive)
    return W, x, h


def untrained(gains=(0.5, 2.0)):
    torch.manual_seed(0)
    network = PairNetwork(replace(PRESETS["tiny"], recordings=True)).double()
    return CFGPosterior(network, PosteriorConfig(network.config, 1.0, (4,), gains=gains))


@pytest.mark.parametrize("drive", ["scaled", "unscaled"])
@pytest.mark.parametrize("free_input", [False, True])
def test_the_sums_are_those_of_any_time_constant(drive, free_input):
    _, x, _ = recorded(drive=drive)
    found = time_constant_statistics(x.float(), DT, (0.5, 3.0), drive=drive, max_voltage_error=1.0)
    if free_input:
        found = found.without_input()
    for tau in (0.5, 0.8, 1.75, 3.0):
        want = transition_statistics(x.float(), DT, tau, drive=drive, max_voltage_error=1.0)
        one, want = found.at(tau), want.without_input() if free_input else want
        for name in ("xx", "yx", "yy", "x", "y"):
            torch.testing.assert_close(getattr(one, name), getattr(want, name), rtol=1e-11, atol=1e-11)
        assert one.error == pytest.approx(want.error) and one.gain == pytest.approx(want.gain)
        assert (one.count, one.free_input) == (want.count, want.free_input)
    assert found.num_neurons == 4


@pytest.mark.parametrize("known_noise", [True, False])
def test_the_true_time_constant_and_noise_are_draws_like_the_others(known_noise):
    """Of τ, g and σ log-uniform, which the posterior of σ takes to be so over all numbers: a short recording tells."""
    count, draws, gains = 150, 39, (0.7, 1.6)
    rng = np.random.default_rng(0)
    low, high = np.log([[*RANGE], [*gains]]).T
    taus, of_gain = np.exp(rng.uniform(low, high, (count, 2))).T
    below = []
    for k in range(count):
        _, _, h = recorded(T=60, tau=taus[k], gain=of_gain[k], seed=100 + k)
        statistics = time_constant_statistics(voltage=h, dt=DT, tau=RANGE)
        found, scales = sample_time_constants(
            statistics, draws, gains, SIGMA if known_noise else None, torch.Generator().manual_seed(k)
        )
        sigmas = scales / (found / math.sqrt(DT))  # s = τσ/√dt
        if known_noise:
            torch.testing.assert_close(sigmas, torch.full_like(sigmas, SIGMA))
        below.append([int((found < taus[k]).sum()), int((sigmas < SIGMA).sum())])
    tested = np.array(below).T[: 1 if known_noise else 2]
    assert holm(uniformity(tested, draws)).min() > 0.01


def test_with_an_unknown_input_it_is_calibrated_still():
    count, draws, gains = 150, 39, (0.7, 1.6)
    rng = np.random.default_rng(3)
    below = []
    for k in range(count):
        tau, gain = np.exp(rng.uniform(*np.log([[RANGE[0], gains[0]], [RANGE[1], gains[1]]])))
        source = torch.Generator().manual_seed(900 + k)
        W = gain / 2 * torch.randn(4, 4, generator=source, dtype=D)
        h0, current = torch.randn(2, 2, 4, generator=source, dtype=D)
        _, h = simulate_rate_network(W, h0, 60, DT, tau, 3 * tau * current[0], SIGMA, return_h=True, generator=source)
        statistics = time_constant_statistics(voltage=h, dt=DT, tau=RANGE).without_input()
        found, _ = sample_time_constants(statistics, draws, gains, SIGMA, torch.Generator().manual_seed(k))
        below.append(int((found < tau).sum()))
    # What drives, I/τ, has a wide prior whatever τ is.
    assert uniformity(np.array([below]), draws)[0] > 0.01


def test_a_narrow_range_is_a_known_time_constant():
    _, _, h = recorded(tau=1.3)
    around = time_constant_statistics(voltage=h, dt=DT, tau=(1.2999, 1.3001))
    known = transition_statistics(voltage=h, dt=DT, tau=1.3)
    taus, scales = sample_time_constants(around, 2000, (0.5, 2.0), generator=torch.Generator().manual_seed(0))
    other = sample_noise_scales(known, 2000, (0.5, 2.0), torch.Generator().manual_seed(1))
    assert ((taus - 1.3).abs() <= 1.0001e-4).all()
    assert abs(float(scales.mean() - other.mean())) < 4 * float(other.std()) * math.sqrt(2 / 2000)
    model = untrained()
    one, two = (model.condition(each, noise_std=SIGMA) for each in (around, known))
    torch.testing.assert_close(one.mean, two.mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(one.sd(400), two.sd(400), rtol=0.15, atol=0)


def test_a_long_recording_without_noise_tells_it_exactly():
    W, x, h = recorded(T=400, tau=1.37, sigma=0.0, gain=2.0)
    statistics = time_constant_statistics(voltage=h, dt=DT, tau=(0.5, 4.0))
    assert most_probable_time_constant(statistics, (0.1, 10.0)) == pytest.approx(1.37, rel=1e-4)


def test_the_posterior_of_the_weights_is_calibrated_and_wider():
    """An untrained network is exact for Gaussian weights of a known gain, and with τ open is calibrated still."""
    count, draws, N, gain = 120, 39, 3, 1.2
    rng, model = np.random.default_rng(1), untrained()
    taus = np.exp(rng.uniform(*np.log(RANGE), count))
    truths, open_tau, known_tau = [], [], []
    for k in range(count):
        W, _, h = recorded(N, T=60, tau=taus[k], gain=gain, seed=500 + k)
        known = {"noise_std": SIGMA, "gain": gain}
        for found, one in (
            (open_tau, time_constant_statistics(voltage=h, dt=DT, tau=RANGE)),
            (known_tau, transition_statistics(voltage=h, dt=DT, tau=taus[k])),
        ):
            found.append(model.condition(one, **known).sample((draws,), steps=6, generator=k))
        truths.append(W)
    truth, wide, narrow = torch.stack(truths).numpy(), torch.stack(open_tau, 1).numpy(), torch.stack(known_tau, 1)
    assert holm(uniformity(ranks(wide, truth, rng.standard_normal((4, N, N))), draws)).min() > 0.01
    assert wide.var(0).mean() > float(narrow.var(0).mean())


@pytest.mark.parametrize("estimate_input", [False, True])
def test_predicted_activity_of_each_draw_has_its_own_time_constant_and_noise(estimate_input):
    """Least squares on what was simulated, given its weights, finds b = dt/τ with a known standard error, and σ."""
    _, x, _ = recorded(N=4, T=60, tau=1.2)
    config = InferenceConfig(
        tau_range=(0.3, 6.0), method="cfg", draws=64, predictive_draws=64, steps=6, estimate_input=estimate_input
    )
    found = infer(Recording(x.numpy(), "here", dt=DT), config)
    off, of_common, left, degrees = [], [], [], 0
    drawn = found.draws, found.dynamics.tau, found.dynamics.noise_std, found.predicted
    for W, tau, sigma, path in zip(*drawn, strict=True):
        h = torch.atanh(torch.as_tensor(path, dtype=D))
        pull = (-h + torch.tanh(h) @ W.mT)[:, :-1].flatten(0, 1)
        step = h.diff(dim=1).flatten(0, 1)
        if estimate_input:  # a constant for each neuron
            pull, step = pull - pull.mean(0), step - step.mean(0)
        square = float(pull.square().sum())
        b, error = float((pull * step).sum()) / square, float(sigma) * math.sqrt(DT / square)
        off.append((b - DT / float(tau)) / error)
        of_common.append((b - DT / found.recording.tau) / error)
        left.append(float((step - b * pull).square().sum()) / (float(sigma) ** 2 * DT))
        degrees += step.numel() - 1 - 4 * estimate_input
    assert 1e-3 < scipy.stats.chi2(64).cdf(np.square(off).sum()) < 1 - 1e-3
    assert 1e-3 < scipy.stats.chi2(degrees).cdf(sum(left)) < 1 - 1e-3
    assert scipy.stats.chi2(64).sf(np.square(of_common).sum()) < 1e-6  # the most probable τ is not what they have


def test_draws_keep_what_they_have_through_files_and_refinement(tmp_path):
    _, x, _ = recorded(N=6, T=80, tau=1.2)
    np.save(tmp_path / "x.npy", x.numpy())
    plain, refined = tmp_path / "plain.nc", tmp_path / "refined.nc"
    words = ["infer", tmp_path / "x.npy", "--dt", DT, "--tau-range", 0.5, 3, "--draws", 6, "--predictive-draws", 2]
    for told, noise in ((["--noise-std", SIGMA], [SIGMA] * 6), ([], None)):
        assert main([str(word) for word in [*words, *told, "--method", "cfg", "--steps", 4, "--out", plain]]) == 0
        assert main(["refine", str(plain), "--sweeps", "8", "--out", str(refined)]) == 0
        before, after = (dynamics_of(open_posterior(path)) for path in (plain, refined))
        assert torch.equal(before.tau, after.tau) and torch.equal(before.noise_std, after.noise_std)
        assert len(before.tau.unique()) == 6 and len(before.noise_std.unique()) == (1 if noise else 6)
        if noise:
            assert before.noise_std.tolist() == noise
    assert main([str(word) for word in [*words, "--out", plain]]) == 0  # of the exact posterior none has its own
    assert dynamics_of(open_posterior(plain)) is None
    with pytest.raises(ValueError, match="dynamics are those of draws to be refined"):
        infer(tmp_path / "x.npy", InferenceConfig(dt=DT, tau=1.0), dynamics=before)
    with pytest.raises(ValueError, match="dynamics must be of as many draws as W, 5; got 6"):
        untrained().condition(time_constant_statistics(x, DT, RANGE)).sample((5,), dynamics=before)


def test_given_their_constants_draws_are_those_of_known_ones():
    """An untrained network is exact: whitened by the posterior for τ and σ of each draw they are standard normal."""
    _, _, h = recorded(N=4, T=60, tau=1.2)
    of_any, model = time_constant_statistics(voltage=h, dt=DT, tau=RANGE), untrained()
    posterior = model.condition(of_any, gain=1.2)
    dynamics = posterior.dynamics(200, 0)
    draws = posterior.sample((200,), steps=6, dynamics=dynamics, generator=1)
    white = torch.stack([
        GaussianPosterior.from_statistics(of_any.at(float(tau)), float(sigma), 1.2**2 / 4).whiten(W)
        for W, tau, sigma in zip(draws, dynamics.tau, dynamics.noise_std, strict=True)
    ])  # fmt: skip
    assert scipy.stats.kstest(white.flatten(), "norm").pvalue > 1e-3
    assert dynamics.tau.shape == dynamics.noise_std.shape == (200,) and float(dynamics.tau.std()) > 0.05
    several = model.condition([of_any, transition_statistics(voltage=h, dt=DT, tau=1.2)], noise_std=SIGMA)
    of_both = several.dynamics(3, 0)
    assert of_both.tau.shape == (3, 2) and of_both.tau.isnan().tolist() == [[False, True]] * 3
    torch.testing.assert_close(of_both.noise_std, torch.full((3, 2), SIGMA, dtype=D))
    assert several.sample((3,), steps=2, dynamics=of_both, generator=0).shape == (3, 2, 4, 4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("2 1", "tau_range must be two time constants, the lower one first; got (2.0, 1.0)."),
        ("1 1", "tau_range must be two time constants, the lower one first; got (1.0, 1.0)."),
        ("0 1", "tau_range must be positive and finite; got 0.0."),
        ("1 nan", "tau_range must be positive and finite; got nan."),
        ("1 inf", "tau_range must be positive and finite; got inf."),
        ("1 2 --tau 1", "give --tau or --tau-range; got 1.0 and (1.0, 2.0)."),
    ],
)
def test_a_range_that_is_none_is_named_as_the_option_before_anything_is_read(given, message, tmp_path, capsys):
    missing = str(tmp_path / "there_is_none.npy")
    assert main(["infer", "--dt", "0.1", "--tau-range", *given.split(), missing]) == 2
    assert capsys.readouterr() == ("", f"error: {message}\n")


@pytest.mark.parametrize("given", [(1.0,), (1.0, 2.0, 3.0)])
def test_a_range_is_of_two_numbers(given):
    with pytest.raises(ValueError, match=r"tau_range must be two time constants, the lower one first; got \(1\.0,"):
        InferenceConfig(tau_range=given)


def test_inference_estimates_it(tmp_path, capsys):
    W, x, h = recorded(N=12, T=300, tau=1.4)
    taus, _ = sample_time_constants(
        time_constant_statistics(voltage=h, dt=DT, tau=(0.5, 3.0)),
        200,
        (0.1, 10.0),
        SIGMA,
        torch.Generator().manual_seed(0),
    )
    recording = Recording(x.numpy(), "here", dt=DT)
    told = infer(recording, InferenceConfig(tau=1.4, noise_std=SIGMA))
    found = infer(recording, InferenceConfig(tau_range=(0.5, 3.0), noise_std=SIGMA))
    assert abs(found.recording.tau - float(taus.mean())) < float(taus.std()) < 0.3
    assert abs(float(taus.mean()) - 1.4) < 3 * float(taus.std())
    assert any(note.startswith("tau = ") and "taken as known" in note for note in found.notes)
    assert not any(check.failed for check in found.checks)
    by_cfg = infer(
        recording, InferenceConfig(tau_range=(0.5, 3.0), method="cfg", draws=12, predictive_draws=2, steps=6)
    )
    assert any("each draw of the weights has its own" in note for note in by_cfg.notes if note.startswith("tau"))
    assert by_cfg.draws.shape == (12, 12, 12) and not any(check.failed for check in by_cfg.checks)
    off = [float((one.point_estimate - W).norm() / W.norm()) for one in (told, found, by_cfg)]
    assert max(off) < 1  # nearer than no weights at all
    narrow = infer(recording, InferenceConfig(tau_range=(0.5, 0.8)))
    assert any("at an end of its range" in note for note in narrow.notes)

    np.save(tmp_path / "x.npy", x.numpy())
    command = ["infer", str(tmp_path / "x.npy"), "--dt", "0.1", "--out", str(tmp_path / "p.nc")]
    assert main([*command, "--tau-range", "0.5", "3"]) == 0
    assert "tau = 1." in capsys.readouterr().out
    with pytest.raises(ValueError, match="here says tau = 1; leave --tau-range out"):
        infer(replace(recording, tau=1.0), InferenceConfig(tau_range=(0.5, 3.0)))
    with pytest.raises(ValueError, match="here says tau = 1"):
        untrained().condition(replace(recording, tau=1.0), tau=(0.5, 2.0))
    with pytest.raises(TypeError, match="tau must be a range"):
        untrained().condition(recording, tau=1.5)
    with pytest.raises(ValueError, match="silent"):
        infer(
            Recording(np.zeros((20, 3)), "here", dt=DT), InferenceConfig(tau_range=(0.5, 2.0), noise_std=1.0, gain=1.0)
        )
    with pytest.raises(ValueError, match="statistics have their own"):
        untrained().condition(transition_statistics(x, DT), tau=(0.5, 2.0))
