"""Recordings from elsewhere go in, posteriors that others can read come out."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
import xarray as xr

from neurosde.cli import main
from neurosde.datasets.recordings import Recording, read_recording
from neurosde.evaluation.calibration import truth_under_posterior
from neurosde.models import InferenceConfig, infer, open_posterior, prediction, save_posterior

N, T, TRIALS, DT, SIGMA, GAIN = 6, 150, 3, 0.1, 0.3, 1.3


def another_program(seed=0, current=None, trials=TRIALS):
    """Simulate a network with numpy alone."""
    rng = np.random.default_rng(seed)
    W = GAIN / np.sqrt(N) * rng.normal(size=(N, N))
    h = rng.normal(size=(trials, N))
    activity = np.empty((trials, T, N))
    for t in range(T):
        activity[:, t] = np.tanh(h)
        drift = -h + np.tanh(h) @ W.T + (0 if current is None else current)
        h = h + DT * drift + np.sqrt(DT) * SIGMA * rng.normal(size=h.shape)
    return W, activity


def closed_form(activity, noise_std=SIGMA, variance=GAIN**2 / N):
    """Mean and covariance of a row of W, from the textbook."""
    h = np.arctanh(activity)
    X = activity[:, :-1].reshape(-1, N)
    Y = ((h[:, 1:] - h[:, :-1]) / DT + h[:, :-1]).reshape(-1, N)
    s2 = noise_std**2 / DT
    covariance = np.linalg.inv(X.T @ X / s2 + np.eye(N) / variance)
    return (covariance @ X.T @ Y / s2).T, covariance


def write_csv(path, activity, header):
    with open(path, "w") as handle:
        if header:
            print("trial", "time", *[f"n{k}" for k in range(N)], sep=",", file=handle)
        for trial, rows in enumerate(activity):
            for t, row in enumerate(rows):
                print(*([trial, round(t * DT, 6)] if header else []), *row, sep=",", file=handle)


@pytest.mark.parametrize("kind", ["npy", "npz", "csv", "nc"])
def test_a_foreign_recording_gives_the_closed_form(tmp_path, kind):
    """The whole road, from the command line: file → posterior → report, against the textbook."""
    W, activity = another_program(trials=TRIALS)
    path, out = tmp_path / f"recording.{kind}", tmp_path / "posterior.nc"
    if kind == "npy":
        np.save(path, activity)
    elif kind == "npz":
        np.savez(path, activity=activity, something_else=np.ones((2, 2)))
    elif kind == "csv":
        write_csv(path, activity, header=True)
    else:
        xr.Dataset({"rates": (("time", "trial", "neuron"), activity.swapaxes(0, 1))}).to_netcdf(path)
    known = ["--noise-std", str(SIGMA), "--gain", str(GAIN), "--dt", str(DT)]
    assert main(["infer", str(path), *known, "--draws", "2000", "--out", str(out)]) == 0
    mean, covariance = closed_form(activity)
    with xr.open_datatree(out) as tree:
        np.testing.assert_allclose(tree["closed_form/mean"], mean, rtol=1e-8, atol=1e-10)
        factor = tree["closed_form/factor"].to_numpy()
        np.testing.assert_allclose(factor @ factor.T, covariance, rtol=1e-7, atol=1e-12)
        draws = tree["posterior/weights"].isel(chain=0).to_numpy()
        z = (draws.mean(0) - mean) / np.sqrt(np.diag(covariance) / 2000)
        assert np.abs(z).max() < 4.5  # of 36 standard normals
        lp = scipy.stats.multivariate_normal(np.zeros(N), covariance).logpdf(draws[:5] - mean).sum(-1)
        np.testing.assert_allclose(tree["sample_stats/lp"][0, :5], lp, rtol=1e-8)
    np.save(tmp_path / "W.npy", W)
    assert main(["evaluate", str(out), "--truth", str(tmp_path / "W.npy")]) == 0
    report = (tmp_path / "posterior" / "report.html").read_text()
    with xr.open_dataset(tmp_path / "posterior" / "results.nc") as results:
        expected = np.linalg.norm(mean - W) / np.linalg.norm(W)
        found = float(results.relative_error.sel(estimate="point estimate (exact)"))
        assert found == pytest.approx(expected, rel=1e-6)
        assert f"{found:.4g}" in report


def test_without_header_or_trials(tmp_path):
    _, activity = another_program(trials=1)
    write_csv(tmp_path / "bare.csv", activity, header=False)
    np.save(tmp_path / "single.npy", activity[0].astype(np.float32))
    bare, single = read_recording(tmp_path / "bare.csv"), read_recording(tmp_path / "single.npy")
    assert bare.activity.shape == single.activity.shape == (1, T, N)
    assert single.activity.dtype == np.float32  # its precision is information
    np.testing.assert_allclose(bare.activity, activity)


def test_tables_as_pandas_and_others_write_them(tmp_path):
    _, activity = another_program(trials=1)
    table = pd.DataFrame(activity[0])
    for name, write in {
        "numbered.csv": lambda p: table.to_csv(p),
        "unindexed.csv": lambda p: table.to_csv(p, index=False),
        "named.csv": lambda p: table.add_prefix("n").to_csv(p),
        "bare.csv": lambda p: table.to_csv(p, index=False, header=False),
    }.items():
        write(tmp_path / name)
        np.testing.assert_allclose(read_recording(tmp_path / name).activity, activity, err_msg=name)
    single = pd.DataFrame(np.concatenate([[0.0], activity[0, 1:, 0]]))
    single.to_csv(tmp_path / "single.csv", index=False, header=False)
    assert read_recording(tmp_path / "single.csv").activity.shape == (1, T, 1)  # a first rate of 0 is no header
    for delimiter in (" ", ";"):
        np.savetxt(tmp_path / "other.csv", activity[0], delimiter=delimiter)
        with pytest.raises(ValueError, match="commas between its columns"):
            read_recording(tmp_path / "other.csv")


def test_one_trial_may_be_given_as_a_matrix():
    _, activity = another_program(trials=1)
    assert Recording(activity[0], "here").activity.shape == (1, T, N)


def test_a_foreign_time_axis_can_be_overruled(tmp_path):
    _, activity = another_program(trials=1)
    data = xr.Dataset({"rates": (("time", "neuron"), activity[0])}, coords={"time": np.arange(T)})
    data.to_netcdf(tmp_path / "r.nc")
    with pytest.warns(UserWarning, match="says dt = 1; 0.1 is used"):
        result = infer(tmp_path / "r.nc", InferenceConfig(dt=DT, draws=2, predictive_draws=0))
    assert result.recording.dt == DT


def test_predictive_draws_are_bounded_in_memory(monkeypatch):
    _, activity = another_program()
    monkeypatch.setattr(prediction, "PREDICTIVE_BYTES", 3 * 4 * activity.size)
    result = infer(Recording(activity, "here", dt=DT), InferenceConfig(draws=40))
    assert len(result.predicted) == 3 and "3 of 32 predictive draws" in " ".join(result.notes)


def test_predictive_draws_follow_the_draws_unless_they_are_said():
    assert [InferenceConfig(draws=draws).predicted_draws for draws in (16, 32, 256)] == [16, 32, 32]
    assert InferenceConfig(draws=256, predictive_draws=0).predicted_draws == 0
    assert InferenceConfig(draws=256, predictive_draws=40).predicted_draws == 40
    with pytest.raises(ValueError, match="predictive_draws must be at most draws, 16; got 17. Leave it out"):
        InferenceConfig(draws=16, predictive_draws=17)
    here = Recording(another_program()[1], "here", dt=DT)
    assert len(infer(here, InferenceConfig(draws=16)).predicted) == 16


def test_a_cut_npz_and_absurd_numbers_are_one_line(tmp_path, capsys):
    np.savez(tmp_path / "r.npz", activity=another_program()[1])
    whole = (tmp_path / "r.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    for options in (
        ["cut.npz", "--dt", "0.1"],
        ["r.npz", "--dt", "1e308"],
        ["r.npz", "--dt", "0.1", "--gain", "1e300"],
    ):
        assert main(["infer", str(tmp_path / options[0]), *options[1:], "--out", str(tmp_path / "p.nc")]) == 2
        assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "p.nc").exists()


def test_what_is_not_given_is_estimated_and_said(tmp_path, capsys):
    _, activity = another_program()
    np.save(tmp_path / "r.npy", activity)
    assert main(["infer", str(tmp_path / "r.npy"), "--dt", "0.1", "--out", str(tmp_path / "p.nc")]) == 0
    said = capsys.readouterr().out
    assert "gain = " in said and "noise_std = " in said and "estimated from the recording" in said
    tree = open_posterior(tmp_path / "p.nc")
    # 3 × 149 × 6 residuals: σ̂ has a relative standard error of 1/√(2·2682) = 1.4 %.
    assert float(tree["constant_data/noise_std"]) == pytest.approx(SIGMA, rel=4 * 0.014)
    assert "estimated" in tree.attrs["notes"]
    assert json.loads(tree.attrs["config"])["draws"] == 256


def test_posterior_file_is_what_arviz_expects(tmp_path):
    arviz = pytest.importorskip("arviz_base", reason="arviz-base is an optional check")
    result = infer(Recording(another_program()[1], "here", dt=DT), InferenceConfig(draws=40))
    path = save_posterior(result, tmp_path / "p.nc")
    tree = arviz.from_netcdf(path) if hasattr(arviz, "from_netcdf") else xr.open_datatree(path)
    with tree:
        stacked = arviz.extract(tree, var_names="weights")
        assert stacked.sizes == {"post": N, "pre": N, "sample": 40}
        assert tree["posterior/weights"].dims == ("chain", "draw", "post", "pre")
        assert tree["posterior_predictive/activity"].dims == ("chain", "draw", "trial", "time", "neuron")
        for node in tree.subtree:
            assert all({"long_name", "units"} <= set(node[name].attrs) for name in node.data_vars)


def test_cubes_bring_their_settings_and_must_not_be_contradicted(tmp_path, capsys):
    options = [
        "--num-networks",
        "3",
        "--N",
        "5",
        "--T",
        "60",
        "--tau",
        "2",
        "--input-std",
        "0.4",
        "--drive",
        "unscaled",
    ]
    assert main(["build-dataset", "--out-dir", str(tmp_path), *options]) == 0
    cube, out = str(tmp_path / "cube.nc"), str(tmp_path / "p.nc")
    assert main(["infer", cube, "--network", "1", "--out", out]) == 0
    tree = open_posterior(out)
    assert float(tree["constant_data/tau"]) == 2 and tree.attrs["drive"] == "unscaled" and tree.attrs["network"] == 1
    with xr.open_dataset(cube) as data:
        np.testing.assert_allclose(tree["constant_data/input"], data.input[1], rtol=1e-6)
        truth = data.weights[1].to_numpy().astype(float)
        found = truth_under_posterior(truth, tree["closed_form/mean"].to_numpy(), tree["closed_form/factor"].to_numpy())
        assert found["truth_p"] > 1e-3
    capsys.readouterr()
    for wrong, match in [
        (["--network", "1", "--tau", "1"], "says tau = 2.0; got tau = 1.0"),
        (["--network", "1", "--dt", "0.2"], "says dt = 0.1"),
        (["--network", "3"], "between 0 and 2"),
        ([], "holds 3 networks"),
    ]:
        assert main(["infer", cube, *wrong, "--out", out]) == 2
        error_line = capsys.readouterr().err
        assert match in error_line and error_line.count("\n") == 1


def test_an_unknown_input_is_estimated():
    """Left out, a constant input biases the posterior beyond its own width; estimated, the truth is a draw again."""
    current = np.linspace(-1, 1, N)
    square = {True: 0.0, False: 0.0}
    errors = []
    networks = 30
    for seed in range(networks):
        W, activity = another_program(seed, current)
        for estimate in square:
            config = InferenceConfig(noise_std=SIGMA, gain=GAIN, estimate_input=estimate, draws=2, predictive_draws=2)
            result = infer(Recording(activity, "here", dt=DT), config)
            square[estimate] += float(result.posterior.whiten(torch.as_tensor(W)).square().sum())
            if estimate:
                errors += list((result.input - current) / result.input_sd)
    freedom = networks * N * N
    low, high = scipy.stats.chi2(freedom).ppf([0.0005, 0.9995])
    assert low < square[True] < high
    assert scipy.stats.kstest(errors, "norm").pvalue > 0.01
    assert square[False] > 1.5 * high


@pytest.mark.parametrize("method", ["exact", "ridge", "least-squares"])
def test_methods(method):
    W, activity = another_program()
    result = infer(Recording(activity, "here", dt=DT), InferenceConfig(method=method, draws=8, predictive_draws=4))
    assert result.draws.shape == (8, N, N) and result.predicted.shape == (4, TRIALS, T, N)
    z = result.posterior.whiten(torch.as_tensor(W))
    assert scipy.stats.chi2(N * N).sf(float(z.square().sum())) > 1e-3
    np.testing.assert_allclose(result.point_estimate, result.posterior.mean, rtol=1e-7, atol=1e-9)
    assert np.isnan(result.posterior.contraction) == (method == "least-squares")


def test_same_seed_same_draws():
    recording = Recording(another_program()[1], "here", dt=DT)
    one, two, other = (infer(recording, InferenceConfig(seed=seed, draws=4, predictive_draws=2)) for seed in (1, 1, 2))
    assert torch.equal(one.draws, two.draws) and np.array_equal(one.predicted, two.predicted)
    assert not torch.equal(one.draws, other.draws)


def test_voltage_and_time_varying_input_from_npz(tmp_path):
    rng = np.random.default_rng(0)
    W, h = GAIN / np.sqrt(N) * rng.normal(size=(N, N)), rng.normal(size=N)
    current = 8 * rng.normal(size=(T, N))
    voltage = np.empty((T, N))
    for t in range(T):
        voltage[t] = h
        h = h + DT * (-h + W @ np.tanh(h) + current[t]) + np.sqrt(DT) * SIGMA * rng.normal(size=N)
    activity = np.tanh(voltage).astype(np.float32)
    np.savez(tmp_path / "r.npz", activity=activity, voltage=voltage, input=current, dt=DT, tau=1.0)
    result = infer(tmp_path / "r.npz")
    assert result.statistics.count == T - 1 and result.statistics.dropped == 0
    square = float(result.posterior.whiten(torch.as_tensor(W)).square().sum())
    assert 1e-3 < scipy.stats.chi2(N * N).cdf(square) < 1 - 1e-3
    save_posterior(result, tmp_path / "p.nc")
    np.save(tmp_path / "W.npy", W)
    assert main(["evaluate", str(tmp_path / "p.nc"), "--truth", str(tmp_path / "W.npy")]) == 0


@pytest.mark.parametrize(
    ("name", "make", "options", "match"),
    [
        ("missing.npy", lambda p: None, [], "no such file"),
        ("r.txt", lambda p: p.write_bytes(b""), [], "must be one of .nc, .npz, .npy, .csv"),
        ("data", lambda p: p.mkdir(), [], "is a folder; name a file in it"),
        ("r.npy", lambda p: np.save(p, np.zeros((5, 3))), [], "give dt (--dt)"),
        ("r.npy", lambda p: np.save(p, np.zeros(5)), ["--dt", "0.1"], "at least two times; got shape (5,)"),
        ("r.npy", lambda p: np.save(p, np.full((5, 3), np.nan)), ["--dt", "0.1"], "finite; got 15"),
        ("r.npy", lambda p: np.save(p, np.full((5, 3), 1.5)), ["--dt", "0.1"], "strictly between -1.0 and 1.0"),
        ("r.npy", lambda p: np.save(p, np.array(["a"])), ["--dt", "0.1"], "must hold real numbers"),
        ("r.npy", lambda p: np.save(p, np.zeros((5, 3))), ["--dt", "-1"], "dt must be positive"),
        ("r.npy", lambda p: np.save(p, np.zeros((5, 3))), ["--dt", "0.1", "--network", "0"], "only cubes"),
        ("r.npy", lambda p: np.save(p, np.zeros((5, 3))), ["--dt", "0.1", "--noise-std", "-1"], "non-negative"),
        ("r.npy", lambda p: np.save(p, np.zeros((5, 3))), ["--dt", "0.1", "--draws", "1"], "draws must be at least 2"),
        ("r.npy", lambda p: p.write_bytes(b"\x93NUMPY"), ["--dt", "0.1"], "not a readable numpy file"),
        ("r.npz", lambda p: np.savez(p, a=np.zeros((5, 3)), b=np.zeros((5, 3))), [], "name the one to read"),
        ("r.csv", lambda p: p.write_text("a,b\n1,x\n"), ["--dt", "0.1"], "must hold numbers"),
        ("r.csv", lambda p: p.write_text(""), ["--dt", "0.1"], "not a csv table"),
        ("r.csv", lambda p: p.write_text("time,a\n0,0.1\n1,0.2\n3,0.1\n"), [], "evenly spaced"),
        ("r.csv", lambda p: p.write_text("trial,a\n0,0.1\n0,0.2\n1,0.1\n"), ["--dt", "1"], "of one length"),
        ("r.nc", lambda p: p.write_bytes(b"CDF"), [], "not a readable netCDF"),
        ("r.nc", lambda p: xr.Dataset({"dt": 0.1}).to_netcdf(p), [], "no array that could be 'activity'"),
        (
            "r.nc",
            lambda p: xr.Dataset({"activity": (("time", "unit"), np.zeros((5, 3)))}).to_netcdf(p),
            ["--dt", "0.1"],
            "must have dims (trial,) time, neuron",
        ),
        (
            "r.npy",
            lambda p: np.save(p, np.random.default_rng(0).uniform(-0.5, 0.5, (4, 6))),
            ["--dt", "0.1", "--method", "least-squares"],
            "record longer",
        ),
        ("r.npy", lambda p: np.save(p, np.zeros((5, 3))), ["--dt", "0.1", "--out", "p.txt"], "name it *.nc"),
    ],
)  # fmt: skip
def test_bad_recordings_end_in_one_line(tmp_path, capsys, monkeypatch, name, make, options, match):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / name)
    before = sorted(tmp_path.iterdir())
    assert main(["infer", name, *options]) == 2
    error = capsys.readouterr().err
    assert match in error and error.count("\n") == 1 and error.startswith("error: ")
    assert sorted(tmp_path.iterdir()) == before


def test_a_recording_of_more_neurons_than_times_is_asked_for_its_axes():
    activity = np.random.default_rng(0).uniform(-0.5, 0.5, (40, 3))
    config = InferenceConfig(noise_std=1.0, gain=1.0, draws=2, predictive_draws=0)
    with pytest.warns(UserWarning):  # what it says of the model is nothing
        asked, silent = (
            any("are the axes (time, neuron)?" in note for note in infer(Recording(one, "here", dt=0.1), config).notes)
            for one in (activity.T, activity)
        )
    assert asked and not silent


@pytest.mark.parametrize(("neurons", "said"), [(1, True), (2, False)])
def test_a_recording_of_one_neuron_is_asked_for_its_axes(neurons, said):
    activity = another_program(trials=1)[1][..., :neurons]
    found = infer(Recording(activity, "here", dt=DT), InferenceConfig(draws=2, predictive_draws=0))
    assert any("there is one neuron" in note for note in found.notes) == said


def test_an_array_is_no_recording():
    with pytest.raises(TypeError, match=r"a Recording or the path of a file; got ndarray\. Give an array as Record"):
        infer(np.zeros((5, 3)))


def test_a_long_step_is_warned_of_and_goes_on(tmp_path, capsys):
    np.save(tmp_path / "r.npy", np.random.default_rng(0).uniform(-0.5, 0.5, (40, 3)))
    assert main(["infer", str(tmp_path / "r.npy"), "--dt", "1.5", "--out", str(tmp_path / "p.nc")]) == 0
    assert "warning: dt = 1.5 is larger than tau" in capsys.readouterr().err


def test_a_silent_recording_is_handled(tmp_path):
    """A network that never fires says nothing: the posterior is the prior where the gain is known."""
    config = InferenceConfig(dt=DT, noise_std=SIGMA, gain=GAIN, draws=4, predictive_draws=2)
    with pytest.warns(UserWarning, match="the noise is less than noise_std says"):
        result = infer(Recording(np.zeros((1, 50, N)), "silence"), config)
    assert result.posterior.contraction == pytest.approx(0, abs=1e-9)


def test_an_unwritable_posterior_leaves_nothing(tmp_path, capsys):
    np.save(tmp_path / "r.npy", another_program()[1])
    (tmp_path / "file").write_text("not a folder")
    out = tmp_path / "file" / "p.nc"
    assert main(["infer", str(tmp_path / "r.npy"), "--dt", "0.1", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "a file where its folder should be" in error and error.count("\n") == 1
    assert main(["build-dataset", "--out-dir", str(tmp_path / "file")]) == 2
    assert "a file where its folder should be" in capsys.readouterr().err


def test_import_is_light():
    heavy = "('matplotlib', 'pytorch_lightning', 'netCDF4', 'scipy.signal', 'juliacall')"
    script = f"import sys, neurosde; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
