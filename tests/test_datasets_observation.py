"""Observation: each step against its closed form, and what stays aligned with what."""

import json

import numpy as np
import pytest
import scipy.signal
import scipy.stats
import xarray as xr

from neurosde.cli import main
from neurosde.datasets import Dale, validate_cube
from neurosde.datasets import observe_command as module
from neurosde.datasets.build_dataset import DatasetConfig, build_dataset
from neurosde.datasets.observation import Observation, bin_means, exponential_filter, observe
from neurosde.datasets.recordings import Recording, read_recording

DT = 0.1


def recording(trials=2, T=20, N=6, seed=0, **options):
    activity = np.random.default_rng(seed).uniform(-0.9, 0.9, (trials, T, N))
    return Recording(activity, "here", dt=DT, tau=1.0, **options)


@pytest.fixture
def cube(tmp_path):
    config = DatasetConfig(
        tmp_path / "whole", num_networks=5, N=10, num_trials=2, T=20, input_std=0.3, voltage=True, ensemble=Dale(1.2)
    )
    return build_dataset(config)


def test_impulse_response_of_the_filter():
    impulse = np.zeros((1, 40, 2))
    impulse[0, 3] = 1.0, -2.0
    seen = observe(Recording(impulse, "here", dt=DT), Observation(decay_time=0.5)).activity
    a = np.exp(-DT / 0.5)
    expected = np.where(np.arange(40) >= 3, (1 - a) * a ** (np.arange(40.0) - 3), 0)
    np.testing.assert_allclose(seen[0], expected[:, None] * [1.0, -2.0], rtol=1e-12, atol=1e-15)
    first = np.zeros((1, 40, 1))
    first[0, 0] = 1.0  # what is there at the start is taken to have been there before
    seen = observe(Recording(first, "here", dt=DT), Observation(decay_time=0.5)).activity
    np.testing.assert_allclose(seen[0, :, 0], a ** np.arange(40), rtol=1e-12)


def test_the_filter_is_scipys_and_keeps_constants():
    x = np.random.default_rng(0).normal(size=(3, 50, 4))
    known = scipy.signal.lfilter([0.3], [1, -0.7], x, axis=1, zi=0.7 * x[:, :1])[0]
    np.testing.assert_allclose(exponential_filter(x, 0.7), known, rtol=1e-12)
    np.testing.assert_allclose(exponential_filter(np.full((9, 1), 0.4), 0.7), 0.4, rtol=1e-12)


def test_variance_of_the_noise_and_of_filtered_noise():
    """White noise of variance s² through the filter has variance s² (1 − a)/(1 + a), and a as its autocorrelation."""
    silent = Recording(np.zeros((1, 4000, 5)), "here", dt=DT)
    white = observe(silent, Observation(noise=0.2, seed=1)).activity
    assert 0.001 < scipy.stats.chi2(white.size).cdf((white**2).sum() / 0.2**2) < 0.999
    seen = observe(silent, Observation(noise=0.2, seed=1, decay_time=0.3)).activity[:, 100:]
    a = np.exp(-DT / 0.3)
    relative = np.sqrt(2 / seen.size * (1 + a**2) / (1 - a**2))  # of the variance of an AR(1) process
    assert abs(seen.var() / (0.2**2 * (1 - a) / (1 + a)) - 1) < 4 * relative
    lagged = (seen[:, 1:] * seen[:, :-1]).mean() / (seen**2).mean()
    assert abs(lagged - a) < 4 * np.sqrt((1 - a**2) / seen.size)


def test_bins_are_means():
    r = recording(T=11)
    seen = observe(r, Observation(bin_size=3))
    expected = np.stack([r.activity[:, k : k + 3].mean(1) for k in (0, 3, 6)], axis=1)
    np.testing.assert_allclose(seen.activity, expected, rtol=1e-12)
    assert seen.dt == pytest.approx(0.3)
    assert bin_means(np.arange(7.0), 2).tolist() == [0.5, 2.5, 4.5]
    with pytest.raises(ValueError, match="at least two bins of 11 samples; got 6"):
        observe(r, Observation(bin_size=6))


def test_the_order_is_noise_filter_bins():
    """Steps one by one give the same as all at once, and not in another order."""
    steps = [Observation(neurons=(4, 1)), Observation(noise=0.1, seed=7), Observation(decay_time=0.4)]
    steps.append(Observation(bin_size=2))
    r = recording()
    one_by_one = r
    for step in steps:
        one_by_one = observe(one_by_one, step)
    at_once = observe(r, Observation(neurons=(4, 1), noise=0.1, seed=7, decay_time=0.4, bin_size=2))
    np.testing.assert_allclose(at_once.activity, one_by_one.activity, rtol=1e-12)
    assert at_once.dt == one_by_one.dt
    other = r
    for step in (steps[0], steps[2], steps[1], steps[3]):
        other = observe(other, step)
    assert np.abs(at_once.activity - other.activity).max() > 0.01
    assert [one["bin_size"] for one in json.loads(one_by_one.observation)] == [1, 1, 1, 2]


def test_what_goes_with_a_recording():
    r = recording(T=20, voltage=np.random.default_rng(1).normal(size=(2, 20, 6)), input=np.arange(6.0))
    few = observe(r, Observation(neurons=(5, 0)))
    np.testing.assert_array_equal(few.activity, r.activity[..., [5, 0]])
    np.testing.assert_array_equal(few.voltage, r.voltage[..., [5, 0]])
    np.testing.assert_array_equal(few.input, [5, 0])
    noisy = observe(r, Observation(noise=0.1, seed=3))
    assert noisy.voltage is None and noisy.input is r.input or np.array_equal(noisy.input, r.input)
    assert json.loads(noisy.observation) == [
        {"noise": 0.1, "decay_time": None, "bin_size": 1, "seed": 3, "fraction": None, "dt": 0.1,
         "neurons": [0, 1, 2, 3, 4, 5], "of": 6}
    ]  # fmt: skip
    moving = observe(recording(input=r.voltage), Observation(bin_size=2))
    np.testing.assert_allclose(moving.input[:, 3], r.voltage[:, 6:8].mean(1))
    single = Recording(r.activity.astype(np.float32), "here", dt=DT)
    assert observe(single, Observation(noise=0.1)).activity.dtype == np.float32


def test_subsampling_keeps_the_weights_of_those_kept(cube):
    with xr.open_dataset(cube) as whole:
        seen = observe(whole, Observation(fraction=0.4, seed=2))
        kept = seen.neuron.to_numpy()
        assert len(kept) == 4 and (np.diff(kept) > 0).all()
        for i, post in enumerate(kept):
            for j, pre in enumerate(kept):
                np.testing.assert_array_equal(seen.weights[:, i, j], whole.weights[:, post, pre])
        np.testing.assert_array_equal(seen.weights.sel(post=kept[1], pre=kept[0]), seen.weights[:, 1, 0])
        for name in ("activity", "voltage", "initial_state", "input", "cell_type", "observed", "block"):
            np.testing.assert_array_equal(seen[name], whole[name].isel(neuron=kept), err_msg=name)
        validate_cube(seen)
        assert "observation" not in whole.attrs
        again, other = (observe(whole, Observation(fraction=0.4, seed=seed)) for seed in (2, 3))
        assert again.identical(seen) and not np.array_equal(other.neuron, kept)


def test_hidden_neurons_stay_marked(cube):
    with xr.open_dataset(cube) as whole:
        hidden = whole.load().copy(deep=True)
    hidden["observed"][:, 3] = 0
    seen = observe(observe(hidden, Observation(neurons=(7, 3, 2))), Observation(neurons=(1, 0)))
    assert seen.neuron.to_numpy().tolist() == [3, 7]
    np.testing.assert_array_equal(seen.observed, np.tile([0, 1], (5, 1)))
    told = json.loads(seen.attrs["observation"])
    assert [step["neurons"] for step in told] == [[7, 3, 2], [3, 7]] and [step["of"] for step in told] == [10, 3]


def test_the_command_writes_a_cube(cube, tmp_path, capsys, monkeypatch):
    out = tmp_path / "seen" / "cube.nc"
    options = ["--fraction", "0.5", "--noise", "0.05", "--decay-time", "0.3", "--bin-size", "2", "--seed", "4"]
    assert main(["observe", str(cube), *options, "--out", str(out)]) == 0
    assert "5 networks, 2 trials, 10 times, 5 neurons" in capsys.readouterr().out
    with xr.open_dataset(cube) as whole, xr.open_dataset(out) as seen:
        validate_cube(seen)
        known = observe(whole, Observation(fraction=0.5, noise=0.05, decay_time=0.3, bin_size=2, seed=4))
        xr.testing.assert_equal(seen, known)
        assert "voltage" not in seen and seen.attrs["observation"] == known.attrs["observation"]
        assert all(seen[name].attrs.keys() == known[name].attrs.keys() for name in seen.variables)
        np.testing.assert_allclose(seen.time, 0.05 + 0.2 * np.arange(10))
        assert seen.time.attrs["units"] == "tau" and seen.attrs["config"] == whole.attrs["config"]
        assert "neurosde observe" in seen.attrs["history"] and whole.attrs["history"] in seen.attrs["history"]
    assert read_recording(out, network=3).dt == pytest.approx(0.2)
    monkeypatch.setattr(module, "BLOCK_BYTES", 2 * 4 * 2 * 20 * 10)  # two networks a block
    assert main(["observe", str(cube), *options, "--out", str(tmp_path / "blocks.nc")]) == 0
    with xr.open_dataset(out) as one, xr.open_dataset(tmp_path / "blocks.nc") as blocks:
        xr.testing.assert_identical(one.drop_attrs(), blocks.drop_attrs())


def test_one_network_is_observed_as_among_others(cube):
    with xr.open_dataset(cube) as whole:
        o = Observation(noise=0.2, fraction=0.5, bin_size=2)
        alone, among = observe(whole.sel(network=3), o), observe(whole, o).sel(network=3)
        np.testing.assert_array_equal(alone.activity, among.activity)
        noise = observe(whole, Observation(noise=0.2)).activity - whole.activity
        assert abs(np.corrcoef(noise[0].to_numpy().ravel(), noise[1].to_numpy().ravel())[0, 1]) < 0.2


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"fraction": 0.0}, "fraction must be positive"),
        ({"fraction": 1.2}, "fraction must lie above 0 and at most at 1; got 1.2"),
        ({"fraction": 0.5, "neurons": (1,)}, "give one of them"),
        ({"neurons": (1, 1)}, "different positions"),
        ({"neurons": (-1,)}, "neurons must be at least 0"),
        ({"noise": -1.0}, "noise must be non-negative"),
        ({"decay_time": 0.0}, "decay_time must be positive"),
        ({"bin_size": 0}, "bin_size must be at least 1"),
    ],
)
def test_bad_observations_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        Observation(**options)


def test_observations_that_do_not_fit(cube, tmp_path, capsys):
    with pytest.raises(ValueError, match="neurons must lie between 0 and 5; got 6"):
        observe(recording(), Observation(neurons=(6,)))
    with pytest.raises(ValueError, match="decay_time takes recordings that say how far"):
        observe(Recording(np.zeros((5, 2)), "here"), Observation(decay_time=1.0))
    out = tmp_path / "o.nc"
    for arguments, match in (
        ([str(cube), "--out", str(out)], "nothing to observe by was given"),
        ([str(cube), "--noise", "0.1", "--out", str(cube)], "is what is to be observed"),
        ([str(cube), "--noise", "0.1", "--out", "o.txt"], "name it *.nc"),
        ([str(cube), "--bin-size", "15", "--out", str(out)], "at least two bins of 20"),
        ([str(tmp_path / "no.nc"), "--noise", "0.1", "--out", str(out)], "no such file"),
    ):
        assert main(["observe", *arguments]) == 2
        error = capsys.readouterr().err
        assert match in error and error.count("\n") == 1
    assert not out.exists() and not list(tmp_path.glob(".*.part"))
