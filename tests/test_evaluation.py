"""Measures of recovery, calibration and prediction on cases whose answer is known; the report; the demo."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import xarray as xr

from neurosde.cli import main
from neurosde.evaluation.calibration import LEVELS, contraction, coverage, distance_to_exact, truth_under_posterior
from neurosde.evaluation.predictive import predictive_check
from neurosde.evaluation.recovery import recovery


def test_recovery_of_known_estimates():
    rng = np.random.default_rng(0)
    W = rng.normal(size=(30, 30))
    assert recovery(W, W) == pytest.approx(
        {"relative_error": 0, "correlation": 1, "r2": 1, "eigenvalue_error": 0, "spectral_radius_error": 0}, abs=1e-9
    )
    zero = recovery(0 * W, W)
    assert zero["relative_error"] == 1 and zero["spectral_radius_error"] == -1 and np.isnan(zero["correlation"])
    assert zero["r2"] == pytest.approx(-W.size * W.mean() ** 2 / ((W - W.mean()) ** 2).sum())
    double = recovery(2 * W, W)
    assert double["relative_error"] == pytest.approx(1) and double["correlation"] == pytest.approx(1)
    assert double["spectral_radius_error"] == pytest.approx(1)
    order = rng.permutation(30)
    assert recovery(W[order][:, order], W)["eigenvalue_error"] == pytest.approx(0, abs=1e-9)


def test_calibration_of_exact_and_of_wrong_posteriors():
    rng = np.random.default_rng(0)
    N, S = 40, 2000
    mean, factor = rng.normal(size=(N, N)), np.linalg.cholesky(np.cov(rng.normal(size=(N, 4 * N))))
    truth = mean + rng.normal(size=(N, N)) @ factor.T
    draws = mean + rng.normal(size=(S, N, N)) @ factor.T
    covered = coverage(draws, truth)
    assert np.abs(covered - LEVELS).max() < 4 * 0.5 / N  # 1600 weights, nearly independent
    assert coverage(mean + 0.3 * (draws - mean), truth)[-1] < 0.6
    found = distance_to_exact(draws, mean, factor)
    assert found["whitened_variance"] == pytest.approx(1, abs=4 * (2 / (S * N * N)) ** 0.5)
    assert found["mean_error"] == pytest.approx(found["mean_error_floor"], rel=0.1)
    assert distance_to_exact(draws + 0.1, mean, factor)["mean_error"] > 2 * found["mean_error_floor"]
    assert truth_under_posterior(truth, mean, factor)["truth_p"] > 0.01
    assert truth_under_posterior(mean + 1.2 * (truth - mean), mean, factor)["truth_p"] < 1e-6
    variance = (factor**2).sum(1).mean()
    assert contraction(draws, 2 * variance) == pytest.approx(0.5, abs=0.01)


def test_coverage_of_the_prior_is_perfect_and_its_contraction_is_zero():
    """Why coverage is never reported alone."""
    rng = np.random.default_rng(0)
    truth, draws = rng.normal(size=(40, 40)), rng.normal(size=(2000, 40, 40))
    assert np.abs(coverage(draws, truth) - LEVELS).max() < 4 * 0.5 / 40
    assert contraction(draws, 1.0) == pytest.approx(0, abs=0.01)


def test_coverage_of_few_draws_is_not_biased():
    rng = np.random.default_rng(0)
    truth, draws = rng.normal(size=(100, 200)), rng.normal(size=(19, 100, 200))
    assert coverage(draws, truth, np.array([0.9]))[0] == pytest.approx(0.9, abs=4 * (0.09 / truth.size) ** 0.5)


def test_predictive_p_values_are_uniform_for_the_right_model_and_small_for_a_wrong_one():
    rng = np.random.default_rng(0)

    def simulate(n, scale=1.0):
        return np.tanh(scale * np.cumsum(0.2 * rng.normal(size=(n, 2, 60, 4)), axis=2))

    p = [predictive_check(simulate(1)[0], simulate(19), 0.1).loc["variance", "p"] for _ in range(40)]
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.01
    wrong = predictive_check(simulate(1, 0.1)[0], simulate(19), 0.1)
    assert wrong.loc["variance", "p"] == pytest.approx(2 / 20)  # the smallest that 19 replicas can give
    assert set(wrong.columns) == {"observed", "predicted", "sd", "p"}


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="one .* shape"):
        recovery(np.ones((2, 2)), np.ones((3, 3)))
    with pytest.raises(ValueError, match="all zero"):
        recovery(np.ones((2, 2)), np.zeros((2, 2)))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--out-dir", str(folder)]) == 0
    return folder


def test_the_demo_ends_with_numbers_and_a_report(demo, capsys):
    with xr.open_dataset(demo / "report" / "results.nc") as results:
        assert float(results.relative_error.sel(estimate="mean of the draws")) < 0.5
        assert float(results.relative_error.sel(estimate="zero")) == 1
        assert float(results.contraction) > 0.7
        errors = results.relative_error.to_series()
        assert errors["point estimate (cfg)"] < min(errors["ridge (cross-validation)"], errors["least squares"])
        assert "truth_p" not in results  # of the exact Gaussian posterior
        # 900 weights, correlated within rows: at most a few times the binomial error.
        assert float(results.coverage_90) == pytest.approx(0.9, abs=4 * (0.09 / 900) ** 0.5)
        assert {"estimate", "statistic", "level"} <= set(results.dims)
        assert results.attrs["config"]
    report = (demo / "report" / "report.html").read_text()
    assert len(re.findall(r"<img [^>]*src=\"data:image/png;base64,", report)) == 5
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", report)  # self-contained
    assert {path.name for path in (demo / "report").glob("*.png")} == {
        "weights.png", "spectrum.png", "recovery.png", "coverage.png", "traces.png"
    }  # fmt: skip


def test_the_exact_posterior_is_held_against_itself_and_the_truth(tmp_path):
    """Gaussian weights of the gain that is given: the truth is a draw of the posterior."""
    folder, posterior = tmp_path / "data", tmp_path / "p.nc"
    build = ["build-dataset", "--out-dir", folder, "--num-networks", 1, "--N", 12, "--num-trials", 4, "--T", 100]
    known = ["--gain", 1.5, "--noise-std", 0.3]
    for command in (
        [*build, *known, "--seed", 2],
        ["infer", folder / "cube.nc", *known, "--out", posterior],
        ["evaluate", posterior, "--truth", folder / "cube.nc", "--out-dir", tmp_path / "report"],
    ):
        assert main([str(word) for word in command]) == 0
    with xr.open_dataset(tmp_path / "report" / "results.nc") as results:
        assert float(results.truth_p) > 1e-3
        assert abs(float(results.whitened_variance) - 1) < 4 * (2 / (144 * 256)) ** 0.5
        assert float(results.mean_error) < 1.5 * float(results.mean_error_floor)


def test_the_demo_can_be_run_again(demo, monkeypatch, tmp_path, capsys):
    """Over what the first run left, with fewer draws: the posterior and the report are written anew."""
    folder = Path(shutil.copytree(demo, tmp_path / "demo"))
    made = {path: path.stat().st_mtime_ns for path in (folder / "posterior.nc", folder / "report" / "report.html")}
    few = ["--draws", "32", "--steps", "8"]
    monkeypatch.setattr("neurosde.demo.main", lambda words: main(words + few if words[0] == "infer" else words))
    assert main(["demo", "--out-dir", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "complete already" in said and "report.html" in said
    assert not [path for path, before in made.items() if path.stat().st_mtime_ns == before]
    with xr.open_dataset(folder / "posterior.nc", group="posterior") as posterior:
        assert posterior.sizes["draw"] == 32


def test_evaluation_without_truth(demo, tmp_path, capsys):
    assert main(["evaluate", str(demo / "posterior.nc"), "--out-dir", str(tmp_path / "e")]) == 0
    said = capsys.readouterr().out
    assert "Posterior-predictive checks" in said and "Recovery" not in said
    assert len(list((tmp_path / "e").glob("*.png"))) == 3


def test_bad_evaluations_end_in_one_line(demo, tmp_path, capsys):
    np.save(tmp_path / "W.npy", np.ones((3, 3)))
    cut = tmp_path / "cut.nc"
    data = (demo / "posterior.nc").read_bytes()
    cut.write_bytes(data[: len(data) // 2])
    other = next(demo.glob("dataset*")) / "cube.nc"
    for command, match in [
        ([str(demo / "posterior.nc"), "--truth", str(tmp_path / "W.npy")], "must have the posterior's shape (30, 30)"),
        ([str(demo / "posterior.nc"), "--truth", str(tmp_path / "none.nc")], "no such file"),
        ([str(demo / "posterior.nc"), "--truth", str(other), "--network", "20"], "between 0 and 19"),
        ([str(cut)], "not a readable netCDF file"),
        ([str(other)], "is not a posterior"),
        ([str(tmp_path / "none.nc")], "no such file"),
    ]:
        assert main(["evaluate", *command, "--out-dir", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert match in error and error.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_benchmark_recovery_prints_its_table(tmp_path, capsys):
    command = ["benchmark", "recovery", "--networks", "3", "--sizes", "3", "4", "--lengths", "30"]
    assert main([*command, "--out", str(tmp_path / "r.nc")]) == 0
    said = capsys.readouterr().out
    assert said.count("| 3 | 30 |") == said.count("| 4 | 30 |") == 1 and "torch" in said
    with xr.open_dataset(tmp_path / "r.nc") as results:
        assert results.exact.sizes == {"neurons": 2, "times": 1, "network": 3}
    assert main(["benchmark", "recovery", "--networks", "1"]) == 2
    assert "networks must be at least 2" in capsys.readouterr().err


def test_help_of_every_command(capsys):
    for command in ("build-dataset", "infer", "evaluate", "demo", "benchmark"):
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0 and "usage: neurosde " + command in capsys.readouterr().out
    for words, default in ((["benchmark", "inference"], "(default: all)"), (["infer"], "(default 256)")):
        with pytest.raises(SystemExit):
            main([*words, "--help"])
        said = " ".join(capsys.readouterr().out.split())
        assert default in said and "(default )" not in said
    for wrong in ([], ["fly"], ["infer"], ["infer", "x", "--drawz", "3"]):
        with pytest.raises(SystemExit) as ended:
            main(wrong)
        assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1
