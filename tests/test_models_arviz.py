"""Posterior files in ArviZ: its summaries against numpy, its plots against the numbers in the file."""

import contextlib
import importlib
import warnings

import arviz_base
import arviz_stats
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

from neurosde.models import open_posterior

METHODS = ("exact", "cfg", "refined")
FEW = {"post": 0, "pre": [0, 2]}

pytestmark = pytest.mark.filterwarnings(  # arviz-plots 0.8 registers its scale as matplotlib before 3.11 wanted it
    "ignore:The scale 'SquareRootScale' uses an 'axis' parameter:PendingDeprecationWarning"
)


@pytest.fixture(scope="module")
def plots():
    """arviz_plots, in its own style: version 0.8 takes the colours of matplotlib's cycle for strings."""
    with warnings.catch_warnings(), contextlib.suppress(ImportError):
        # arviz-plots 0.8 takes this module for imported, which it is not from matplotlib 3.11 on
        # (https://github.com/arviz-devs/arviz-plots/issues/500).
        warnings.simplefilter("ignore", matplotlib.MatplotlibDeprecationWarning)
        importlib.import_module("matplotlib.style.core")
    arviz_plots = importlib.import_module("arviz_plots")
    with plt.style.context("arviz-variat"):
        yield arviz_plots
    plt.close("all")


@pytest.fixture(scope="module", params=METHODS)
def tree(request, posteriors):
    return open_posterior(posteriors[request.param])


def axes_of(collection):
    return collection.viz["figure"].item().axes


def test_the_summary_is_numpys(tree):
    weights = tree["posterior/weights"].to_numpy()[0]
    found = arviz_stats.summary(tree, round_to="none")
    assert list(found.index[:7]) == [*(f"weights[0, {pre}]" for pre in range(6)), "weights[1, 0]"]
    np.testing.assert_allclose(found["mean"], weights.mean(0).ravel(), rtol=1e-10)
    np.testing.assert_allclose(found["sd"], weights.std(0).ravel(), rtol=1e-10)
    low, high = np.quantile(weights, (0.055, 0.945), axis=0)
    np.testing.assert_allclose(found["eti89_lb"], low.ravel(), rtol=1e-10)
    np.testing.assert_allclose(found["eti89_ub"], high.ravel(), rtol=1e-10)
    assert np.isfinite(found["ess_bulk"]).all() and np.isfinite(found["mcse_mean"]).all()
    assert found["r_hat"].isna().all()  # of one chain there is none; the file says so
    assert "no R-hat" in tree["posterior"].attrs["comment"]


def test_independent_draws_count_in_full(posteriors):
    """Autocorrelations of 400 draws have a spread of 1/20; a sum of some of them, over 36 weights, one below 0.1."""
    found = arviz_stats.summary(open_posterior(posteriors["exact"]), round_to="none")
    assert found["ess_bulk"].mean() / 400 == pytest.approx(1, abs=0.3)


def test_what_arviz_extracts_has_our_labels(tree):
    stacked = arviz_base.extract(tree, var_names="weights")
    assert set(stacked.dims) == {"post", "pre", "sample"}
    interval = arviz_stats.hdi(tree, prob=0.9)["weights"]
    assert interval.sizes == {"post": 6, "pre": 6, "ci_bound": 2}
    inside = (tree["posterior/weights"] >= interval[..., 0]) & (tree["posterior/weights"] <= interval[..., 1])
    assert inside.mean(("chain", "draw")).to_numpy() == pytest.approx(0.9, abs=2.5 / tree["posterior"].sizes["draw"])


def test_a_sum_is_not_taken_for_pointwise_log_likelihoods(tree):
    with pytest.raises(TypeError, match="log likelihood not found"):
        arviz_stats.loo(tree)


def test_distributions_show_the_means(tree, plots):
    mean = tree["posterior/weights"].mean(("chain", "draw"))
    found = plots.plot_dist(tree, coords=FEW, backend="matplotlib")
    for pre, axis in zip(FEW["pre"], axes_of(found), strict=True):
        assert axis.get_title() == f"weights\n{pre}" and len(axis.lines) == 2  # the density and the interval
        (point,) = axis.collections
        assert point.get_offsets()[0, 0] == pytest.approx(float(mean[0, pre]), abs=0.005)  # it rounds
        assert "mean" in axis.texts[0].get_text()


def test_a_forest_has_a_row_for_each_weight(tree, plots):
    labels, intervals = axes_of(plots.plot_forest(tree, coords={"post": 0}, backend="matplotlib"))
    assert [text.get_text() for text in labels.texts] == ["weights", *map(str, range(6))]
    points = np.concatenate([one.get_offsets() for one in intervals.collections])
    np.testing.assert_allclose(sorted(points[:, 0]), np.sort(tree["posterior/weights"].mean(("chain", "draw"))[0]))


def test_traces_are_the_draws(tree, plots):
    found = axes_of(plots.plot_trace(tree, coords=FEW, backend="matplotlib"))
    for pre, axis in zip(FEW["pre"], found, strict=True):
        np.testing.assert_array_equal(axis.lines[0].get_ydata(), tree["posterior/weights"][0, :, 0, pre])
    assert len(axes_of(plots.plot_rank(tree, coords=FEW, backend="matplotlib"))) == 2


def test_draws_before_they_were_refined_can_be_plotted(posteriors, plots):
    tree = open_posterior(posteriors["refined"])
    (axis,) = axes_of(plots.plot_trace(tree, group="unrefined", coords={"post": 0, "pre": 1}, backend="matplotlib"))
    before = open_posterior(posteriors["few"])["posterior/weights"]
    np.testing.assert_array_equal(axis.lines[0].get_ydata(), before[0, :, 0, 1])


def test_predicted_activity_lies_over_the_recorded_one(tree, plots):
    found = plots.plot_ppc_dist(tree, var_names="activity", num_samples=6, kind="ecdf", backend="matplotlib")
    (axis,) = axes_of(found)
    assert len(axis.lines) == 7  # six draws and the recording
    recorded = np.sort(tree["observed_data/activity"].to_numpy().ravel())
    x, y = axis.lines[-1].get_data()
    np.testing.assert_allclose(y, np.searchsorted(recorded, x, side="right") / len(recorded), atol=1e-12)
    found = plots.plot_ppc_tstat(tree, var_names="activity", t_stat="std", backend="matplotlib")
    assert any(
        np.allclose(one.get_offsets()[0, 0], recorded.std(), rtol=1e-4)
        for one in axes_of(found)[0].collections
        if len(one.get_offsets()) == 1
    )
