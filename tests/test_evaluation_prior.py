"""Statistics of sampled weights by hand and by loops; the two-sample test at its known optimum; what ratios detect."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import xarray as xr

from neurosde.cli import main
from neurosde.datasets import make_ensemble
from neurosde.evaluation import prior_comparison
from neurosde.evaluation.c2st import TwoSampleTest, c2st
from neurosde.evaluation.evaluate_prior import fresh_sets
from neurosde.evaluation.prior_comparison import evaluate_prior, thin
from neurosde.evaluation.prior_figures import worst_statistics
from neurosde.evaluation.weight_statistics import weight_statistics

S, N = 100, 20


def draws(name="gaussian", seed=0, count=1, **parameters):
    return list(fresh_sets(make_ensemble(name, **parameters), (S, N, N), count, seed))


@pytest.fixture
def without_classifier(monkeypatch):
    """Training it takes most of the time."""
    monkeypatch.setattr(prior_comparison, "c2st", lambda *_, **__: TwoSampleTest(0.5, 0.1))


def test_statistics_of_a_small_matrix_by_hand():
    W = np.array([[0.0, 2.0], [1.0, -1.0]])
    found = {name: values[0] for name, values in weight_statistics(np.stack([W, W])).per_matrix.items()}
    root = math.sqrt(2)  # J = W √2
    assert found["gain"] == pytest.approx(root * math.sqrt(6) / 2)
    assert found["mean"] == pytest.approx(root / 2)
    assert found["density"] == 0.75 and found["near-zero share"] == 0.25
    assert found["asymmetry"] == pytest.approx(2 * 1 / (2 * 6))
    assert found["reciprocity"] == pytest.approx(-1)
    assert found["sd of row norms"] == pytest.approx((2 - root) / 2)  # row norms 2, √2
    assert found["sd of column means"] == pytest.approx(0)
    assert found["sd of row means"] == pytest.approx(root / 2)
    assert found["diagonal mean"] == pytest.approx(-root / 2)
    assert found["spectral radius"] == pytest.approx(2)  # λ = 1, −2
    assert found["spectral abscissa"] == pytest.approx(1)
    assert found["cycle motif"] == pytest.approx(1 - 8)
    assert found["singular value 1"] * found["singular value 2"] == pytest.approx(2)  # |det W|
    assert "singular value 3" not in found
    assert found["sign consistency"] == pytest.approx((1 + 0) / 2)
    assert found["mixed columns"] == 0.5


def test_statistics_agree_with_loops():
    W = draws("sparse", density=0.5)[0][:3]
    found = weight_statistics(W)
    for k, one in enumerate(W):
        J = one * math.sqrt(N)
        A = J - J.mean()
        pairs = [(i, j) for i in range(N) for j in range(N)]
        chain = sum(A[i, j] * A[j, m] for i, j in pairs for m in range(N))
        convergent = sum(A[i, j] * A[i, m] for i, j in pairs for m in range(N) if m != j)
        divergent = sum(A[j, i] * A[m, i] for i, j in pairs for m in range(N) if m != j)
        size = N * sum(A[i, j] ** 2 for i, j in pairs)
        loop = sum(one[i, j] * one[j, m] * one[i, m] for i, j in pairs for m in range(N))
        columns = [column[column != 0] for column in one.T]
        expected = {
            "kurtosis": scipy.stats.kurtosis(J.ravel(), fisher=False),
            "reciprocity": np.corrcoef([(J[i, j], J[j, i]) for i, j in pairs if i != j], rowvar=False)[0, 1],
            "sd of column norms": np.std([math.sqrt(np.mean(column**2)) for column in J.T]),
            "chain motif": chain / size,
            "convergent motif": convergent / size,
            "divergent motif": divergent / size,
            "feed-forward motif": loop,
            "sign consistency": np.mean([abs(np.sign(column).mean()) for column in columns]),
            "mixed columns": np.mean([len(set(np.sign(column))) > 1 for column in columns]),
        }
        for name, value in expected.items():
            assert found.per_matrix[name][k] == pytest.approx(value, rel=1e-9), name


@pytest.mark.parametrize("name", ["gaussian", "dale", "sparse", "low-rank", "block"])
def test_statistics_do_not_depend_on_labels(name):
    W = draws(name)[0][:10]
    order = np.random.default_rng(0).permutation(N)
    before, after = weight_statistics(W), weight_statistics(W[:, order][:, :, order])
    for key, values in before.per_matrix.items():
        np.testing.assert_allclose(after.per_matrix[key], values, rtol=1e-9, atol=1e-9, err_msg=key)
    for key, values in before.pooled.items():
        np.testing.assert_allclose(np.sort(after.pooled[key]), np.sort(values), rtol=1e-7, atol=1e-7, err_msg=key)


def test_statistics_of_degenerate_matrices_are_finite():
    for W in (np.zeros((2, 4, 4)), np.ones((2, 4, 4)), np.ones((2, 1, 1))):
        assert np.isfinite(weight_statistics(W).table()).all()


def test_the_classifier_is_at_chance_for_one_law_and_near_the_optimum_for_two():
    rng = np.random.default_rng(0)
    same = [c2st(*rng.normal(size=(2, 400, 5)), seed=k).accuracy for k in range(2)]
    assert np.mean(same) == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / 800 / 2))
    for delta in (1.0, 2.0):
        first, second = rng.normal(size=(2, 400, 5))
        second[:, 0] += delta
        found, best = c2st(first, second), scipy.stats.norm.cdf(delta / 2)
        assert best - 0.04 < found.accuracy < best + 4 * found.standard_error
        assert found.standard_error == pytest.approx(math.sqrt(found.accuracy * (1 - found.accuracy) / 800))
    assert c2st(first[:20], second[:20]) == c2st(first[:20], second[:20])  # seeded


def test_the_classifier_sees_more_than_means_and_takes_constant_features():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 500, 3))
    second[:, 1] = second[:, 0]  # another copula, the same marginals
    first[:, 2] = second[:, 2] = 7.0
    assert c2st(first, second).accuracy > 0.9
    assert c2st(np.ones((20, 2)), np.ones((20, 2))).accuracy == 0.5


def test_thinning_hardly_changes_wasserstein_distances():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=100_003), 1.01 * rng.normal(size=100_003)
    exact = scipy.stats.wasserstein_distance(a, b)
    assert np.abs(thin(a) - thin(b)).mean() == pytest.approx(exact, rel=0.01)
    assert np.abs(thin(a, 1000) - thin(b, 1000)).mean() == pytest.approx(exact, rel=0.05)


def test_ratios_are_those_of_scipys_distances(without_classifier):
    sets = draws(count=5)
    result = evaluate_prior(sets[0], sets[1:])
    d = scipy.stats.wasserstein_distance
    for name, kind in (("gain", "per_matrix"), ("entry", "pooled")):
        values = [getattr(weight_statistics(one), kind)[name] for one in sets]
        ours = np.mean([d(values[0], one) for one in values[1:]])
        floor = np.mean([d(values[i], values[j]) for i in range(1, 5) for j in range(1, i)])
        assert result.table.ratio[name] == pytest.approx(ours / floor)
        assert result.table.floor[name] == pytest.approx(floor)


def test_fresh_draws_stay_below_their_null_bounds(without_classifier):
    """Five per cent would be beyond by chance, in correlated statistics."""
    beyond, means = [], []
    for k in range(6):
        sets = draws("dale" if k % 2 else "gaussian", seed=k, count=7)
        table = evaluate_prior(sets[0], sets[1:]).table
        beyond.append((table.ratio > table.null_95).mean())
        means.append(table.ratio.mean())
        assert table.ratio["density"] == table.null_95["density"] == 1
    assert np.mean(beyond) < 0.12
    assert np.mean(means) == pytest.approx(1, abs=0.1)


def test_wrong_samples_are_detected(without_classifier):
    fresh = draws(count=6)
    (right,) = draws(seed=1)
    found = evaluate_prior(1.05 * right, fresh).table
    for name in ("gain", "entry", "singular value", "eigenvalue, modulus"):
        assert found.ratio[name] > max(1.5, found.null_95[name])
    symmetric = evaluate_prior((right + right.mT) / math.sqrt(2), fresh)
    assert symmetric.table.ratio["asymmetry"] > 10 and symmetric.table.ratio["reciprocity"] > 10
    assert symmetric.table.ratio["cycle motif"] > 2
    (mixed,) = draws("dale", seed=1)
    mixed[:, 0, 0] *= -1
    table = evaluate_prior(mixed, draws("dale", count=6)).table
    assert table.ratio["mixed columns"] == table.ratio["sign consistency"] == math.inf
    assert table.ratio["density"] == 1 and not table.isna().any(axis=None)


def test_the_classifier_detects_symmetric_samples_and_no_others():
    fresh = [one[:60] for one in draws(count=3)]
    right, more = (one[:60] for one in draws(seed=1, count=2))
    wrong = evaluate_prior((right + right.mT) / math.sqrt(2), fresh)
    assert wrong.c2st.accuracy > 0.97 and len(wrong.tests) == 3
    assert evaluate_prior(more, fresh).c2st.accuracy == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / 120))


def test_the_figure_has_a_panel_of_each_statistic_that_differs_and_no_other(without_classifier):
    """Samples that are one of the fresh sets have ratios near 2/3; what is 1 of all matrices has the ratio 1."""
    fresh = draws(count=3)
    result = evaluate_prior(fresh[0], fresh)
    same = ["density", "mixed columns"]
    assert all(np.ptp([one.per_matrix[name] for one in result.fresh]) == 0 for name in same)
    assert (result.table["ratio"][same] == 1).all() and (result.table["ratio"].drop(same) < 1).all()
    for table, panels in ((result.table, 6), (result.table.loc[["gain", "mean", "kurtosis", *same]], 3)):
        axes = worst_statistics(replace(result, table=table)).axes
        assert len(axes) == panels and not {axis.get_title().partition("\n")[0] for axis in axes} & set(same)


@pytest.fixture(scope="module")
def cubes(tmp_path_factory):
    """Two cubes of one ensemble and different seeds, and one of another size."""
    folder = tmp_path_factory.mktemp("cubes")
    for name, seed, networks, size in (("a", 0, 20, 8), ("b", 1, 90, 8), ("c", 0, 20, 6)):
        command = ["build-dataset", "--out-dir", str(folder / name), "--num-networks", str(networks), "--N", str(size)]
        options = ["--T", "2", "--num-trials", "1", "--ensemble", "sparse", "--density", "0.5", "--gain-high", "2"]
        assert main([*command, *options, "--seed", str(seed), "--engine", "torch"]) == 0
    return folder


def test_the_command_draws_from_the_ensemble_of_the_configuration(cubes, capsys):
    assert main(["evaluate", "prior", str(cubes / "a" / "cube.nc"), "--repeats", "3"]) == 0
    said = capsys.readouterr().out
    assert "sparse (gain = 1.5, density = 0.5, gain_high = 2" in said and "Classifier two-sample test" in said
    out = cubes / "a" / "cube"
    assert {path.name for path in out.iterdir()} == {"results.nc", "spectra.png", "matrices.png", "statistics.png"}
    with xr.open_dataset(out / "results.nc") as results:
        assert results.sizes["fresh_set"] == 3 and results.sizes["network"] == 20
        assert results.attrs["seed"] == 0 and len(results.attrs["history"]) > 0
        with xr.open_dataset(cubes / "a" / "cube.nc") as cube:  # the same plain form
            there, here = (json.loads(one.attrs["config"])["ensemble"] for one in (cube, results))
        assert there == here == {"name": "sparse", "gain": 1.5, "gain_high": 2.0, "density": 0.5}
        assert float(results.mean_ratio.sel(kind="per matrix")) < 1.5
        assert float(results.sampled.sel(statistic="density")) == pytest.approx(0.5, abs=0.05)
        assert 0 < float(results.c2st_accuracy) < 1
        assert all(variable.attrs["long_name"] for variable in results.data_vars.values())


def test_the_command_draws_from_another_ensemble(cubes, tmp_path, capsys, without_classifier):
    command = ["evaluate", "prior", str(cubes / "a" / "cube.nc"), "--out-dir", str(tmp_path), "--repeats", "3"]
    assert main([*command, "--ensemble", "gaussian", "--gain", "1.7"]) == 0
    with xr.open_dataset(tmp_path / "results.nc") as results:
        assert float(results.ratio.sel(statistic="density")) == math.inf


def test_the_command_splits_a_reference(cubes, tmp_path, capsys, without_classifier):
    command = ["evaluate", "prior", str(cubes / "a" / "cube.nc"), "--reference", str(cubes / "b" / "cube.nc")]
    assert main([*command, "--out-dir", str(tmp_path)]) == 0
    assert "20 samples against 4 sets of networks of" in capsys.readouterr().out


def test_a_small_reference_is_compared_with_fewer_samples(cubes, tmp_path, capsys):
    command = ["evaluate", "prior", str(cubes / "b" / "cube.nc"), "--reference", str(cubes / "a" / "cube.nc")]
    assert main([*command, "--out-dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "6 samples against 3 sets" in said and "needs more matrices than 6" in said


def test_no_fresh_draw_is_in_the_dataset_of_the_same_seed(cubes):
    ensemble = make_ensemble("sparse", density=0.5, gain_high=2)
    with xr.open_dataset(cubes / "a" / "cube.nc") as cube:
        there = cube.weights.to_numpy()
    for one in fresh_sets(ensemble, (20, 8, 8), 3, 0, np.dtype("f4")):
        assert not (one[:, None] == there).all((2, 3)).any()


def test_bad_input_ends_in_one_line(cubes, tmp_path, capsys):
    a = str(cubes / "a" / "cube.nc")
    rng = np.random.default_rng(0)

    def written(name, weights, **attributes):
        array = xr.DataArray(weights, dims=("network", "post", "pre"))
        xr.Dataset({"weights": array}, attrs=attributes).to_netcdf(tmp_path / name)
        return str(tmp_path / name)

    W = rng.normal(size=(4, 8, 8))
    plain = written("plain.nc", W)
    one = written("one.nc", W[:1])
    garbled = written("garbled.nc", W, config="ensemble = dale")
    unknown = written("unknown.nc", W, config='{"ensemble": {"name": "small-world"}}')
    W[2, 0, 0] = np.nan
    broken = written("broken.nc", W)
    xr.Dataset({"activity": ("network", np.zeros(3))}).to_netcdf(tmp_path / "other.nc")
    for command, match in [
        ([str(tmp_path / "other.nc")], "must hold weights(network, post, pre)"),
        ([str(tmp_path / "none.nc")], "no such file"),
        ([plain], "names no ensemble in its config; give --ensemble NAME or --reference CUBE"),
        ([garbled], "must be JSON"),
        ([unknown], "ensemble must be one of"),
        ([one], "at least 2 networks; got 1"),
        ([broken], "weights of network 2"),
        ([a, "--reference", str(cubes / "c" / "cube.nc")], "networks of 8 neurons"),
        ([a, "--reference", plain], "at least 6 networks"),
        ([a, "--reference", a], "not among the samples"),
        ([a, "--reference", plain, "--ensemble", "dale"], "give one of them"),
        ([a, "--gain", "1"], "must come with --ensemble"),
        ([a, "--ensemble", "gaussian", "--density", "0.1"], "gaussian ensemble has the parameters"),
        ([a, "--repeats", "2"], "repeats must be at least 3"),
    ]:
        assert main(["evaluate", "prior", *command, "--out-dir", str(tmp_path / "out")]) == 2, command
        error = capsys.readouterr().err
        assert match in error and error.count("\n") == 1, error
        assert not (tmp_path / "out").exists()


def test_bad_arrays_are_named():
    W = np.zeros((4, 3, 3))
    with pytest.raises(ValueError, match="at least 3 fresh sets; got 2"):
        evaluate_prior(W, [W, W])
    with pytest.raises(ValueError, match=r"shape \(4, 3, 3\); got \(3, 3, 3\) for set 1"):
        evaluate_prior(W, [W, W[:3], W])
    with pytest.raises(ValueError, match="square"):
        evaluate_prior(W[0], [W, W, W])
    with pytest.raises(ValueError, match="one shape"):
        c2st(np.zeros((20, 3)), np.zeros((20, 4)))
    with pytest.raises(ValueError, match="at least 10 draws"):
        c2st(np.zeros((4, 3)), np.zeros((4, 3)))
    with pytest.raises(ValueError, match="finite"):
        c2st(np.full((20, 3), np.nan), np.zeros((20, 3)))


def test_help(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "prior", "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert all(option in said for option in ("--reference", "--ensemble", "--gain-high", "--density", "--repeats"))
