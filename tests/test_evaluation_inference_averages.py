"""Measures as a cube says them, and their averages over tasks: against formulas, and against many repetitions."""

import math

import numpy as np
import pytest
import xarray as xr
from scipy.stats import t as student

from neurosde.evaluation.inference_averages import averages, by_ensemble
from neurosde.evaluation.inference_figures import axes_of
from neurosde.evaluation.inference_methods import METHODS
from neurosde.evaluation.inference_report import means
from neurosde.evaluation.measures import measures, values_of


def cube(values, metrics=("relative_error",), **coordinates):
    names = [f"task {k}" for k in range(len(values))]
    dims = ("task", "method", "network", "metric")
    methods = list(METHODS)[: values.shape[1]]
    coordinates = {name: ("task", list(of)) for name, of in coordinates.items()}
    return xr.Dataset(
        {"results": (dims, values)}, {"task": names, "method": methods, "metric": list(metrics), **coordinates}
    )


def test_one_task_has_students_interval():
    values = np.random.default_rng(0).normal(size=(2, 3, 5, 1))
    results = cube(values)
    found = averages(values_of(results, "relative_error"), {"first": [0], "second": [1]}, list("abc"))
    error = values[0, 1, :, 0].std(ddof=1) / math.sqrt(5)
    assert found.mean.at["b", "first"] == pytest.approx(values[0, 1, :, 0].mean())
    assert found.half.at["b", "first"] == pytest.approx(student.ppf(0.975, 4) * error)
    mean, half = means(results, ("relative_error",))
    np.testing.assert_allclose(found.mean.to_numpy().T.ravel(), mean["relative_error"])
    np.testing.assert_allclose(found.half.to_numpy().T.ravel(), half["relative_error"])


def test_intervals_hold_the_mean_over_tasks_as_often_as_they_say():
    """Four tasks whose means and spreads differ; 4000 methods are 4000 repetitions."""
    source = np.random.default_rng(1)
    level, spread = np.array([0.0, 1.0, 5.0, 9.0]), np.array([0.1, 0.5, 1.0, 1.0])
    values = level[:, None, None] + spread[:, None, None] * source.normal(size=(4, 4000, 6))
    array = xr.DataArray(values, dims=("task", "method", "network"))
    found = averages(array, {"all": range(4)}, [str(k) for k in range(4000)])
    inside = (abs(found.mean["all"] - level.mean()) < found.half["all"]).mean()
    # Satterthwaite's law is within half a percent here; four standard errors of the share are 1.4 %.
    assert abs(inside - 0.95) < 0.005 + 4 * math.sqrt(0.95 * 0.05 / 4000)


def test_means_over_fewer_tasks_are_told_apart():
    values = np.ones((3, 2, 4, 1)) * np.arange(4)[:, None]
    values[1, 0] = np.nan  # diverged
    values[2] = np.nan  # means nothing in this task, for any method
    results = cube(values, ensemble=("dale", "dale", "block"))
    sets = by_ensemble(results)
    assert sets == {"dale": [0, 1], "block": [2], "all": [0, 1, 2]}
    found = averages(values_of(results, "relative_error"), sets, ["a", "b"])
    assert found.tasks.loc["a"].tolist() == [1, 0, 1] and found.possible == {"dale": 2, "block": 0, "all": 2}
    assert found.complete.loc["a"].tolist() == [False, False, False]
    assert found.complete.loc["b"].tolist() == [True, False, True]
    assert found.mean.loc["a", "dale"] == 1.5 and math.isnan(found.mean.loc["b", "block"])
    assert by_ensemble(results.isel(task=[0, 1])) == {"dale": [0, 1]}


def test_what_was_measured_once_has_no_interval():
    constant, single = np.full((1, 1, 5, 1), 2.0), np.full((1, 1, 1, 1), 2.0)
    for values in (constant, single):
        found = averages(values_of(cube(values), "relative_error"), {"x": [0]}, ["a"])
        assert found.mean.iat[0, 0] == 2 and math.isnan(found.half.iat[0, 0])
    without = xr.DataArray(np.full((2, 1), 3.0), dims=("task", "method"))
    found = averages(without, {"x": [0, 1]}, ["a"])
    assert found.mean.iat[0, 0] == 3 and math.isnan(found.half.iat[0, 0])


def test_a_task_of_one_network_leaves_no_interval():
    values = np.random.default_rng(2).normal(size=(2, 2, 5))
    values[1, 0, 1:] = np.nan  # chains did not mix, say
    array = xr.DataArray(values, dims=("task", "method", "network"))
    found = averages(array, {"first": [0], "both": [0, 1]}, ["a", "b"])
    assert found.mean.at["a", "both"] == pytest.approx((values[0, 0].mean() + values[1, 0, 0]) / 2)
    assert found.half.isna().to_numpy().tolist() == [[False, True], [False, False]]


def test_a_cube_says_what_its_measures_are():
    metrics = ("seconds", "relative_error", "new", "newer", "empty")
    values = np.zeros((1, 2, 3, len(metrics)))
    values[..., -1] = np.nan
    results = cube(values, metrics)
    results["l_c2st"] = (("task", "method"), np.ones((1, 2)), {"long_name": "L-C2ST", "group": "Calibration"})
    results["divergence"] = (("task", "method", "network"), np.ones((1, 2, 3)),
                     {"long_name": "divergence", "units": "nats", "better": "lower", "group": "Posterior"})  # fmt: skip
    results["git_commit"] = (("task", "method"), np.full((1, 2), "abc"))
    results["of_method"] = ("method", np.ones(2))  # is no measure of a task
    found = measures(results)
    assert list(found) == ["relative_error", "divergence", "seconds", "l_c2st", "new", "newer"]
    assert found["divergence"].title == "divergence, nats" and found["divergence"].sense == "lower"
    assert found["relative_error"].sense == "lower" and found["relative_error"].group == "Recovery"
    assert found["new"].sense is None and found["new"].group == "Further measures" and found["new"].title == "new"
    assert values_of(results, "divergence").dims == ("task", "method", "network")
    said = {"long_name": ["s", "e", "a new one", "b", "c"], "units": ["s", "1", "1/tau", "1", "1"],
            "better": ["lower", "lower", "0.9", "", "higher"], "group": ["Cost", "", "Prediction", "", ""]}  # fmt: skip
    found = measures(results.assign_coords({f"metric_{key}": ("metric", of) for key, of in said.items()}))
    assert (found["new"].title, found["new"].sense, found["new"].group) == ("a new one, 1/tau", 0.9, "Prediction")
    assert found["newer"].sense is None and found["relative_error"].group == "Recovery"
    results["divergence"].attrs["better"] = "smaller"
    with pytest.raises(ValueError, match="better of 'divergence' must be 'lower', 'higher', a number or nothing"):
        measures(results)


def test_an_axis_is_seen_in_tasks_that_differ_in_it_alone():
    ensemble = ["dale", "dale", "dale", "block", "block"]
    times = [100, 1000, 1000, 100, 1000]
    neurons = [10, 10, 20, 10, 20]
    results = cube(np.zeros((5, 1, 2, 1)), ensemble=ensemble, times=times, neurons=neurons, gain=[1.5] * 5)
    # Block's two tasks differ in two coordinates and tell of neither.
    assert axes_of(results) == {"neurons": {10: [1], 20: [2]}, "times": {100: [0], 1000: [1]}}
    assert axes_of(results.isel(task=[3, 4])) == {}
