"""Intervals of proportions: the binomial law, summed, and what a report shows of it."""

import math

import numpy as np
import pytest

from neurosde.cli import main
from neurosde.evaluation.proportions import binomial_band


def probability(share, count):
    """Of each count, of the binomial law as it is written."""
    k = np.arange(count + 1)
    ways = np.array([float(math.comb(count, one)) for one in k])
    return k / count, ways * share**k * (1 - share) ** (count - k)


@pytest.mark.parametrize("count", [1, 9, 36, 400])
@pytest.mark.parametrize("level", [0.5, 0.95])
def test_the_band_is_the_narrowest_with_no_more_than_its_share_on_either_side(count, level):
    chances = np.array([0.05, 0.5, 0.9, 0.99])
    low, high = binomial_band(chances, count, level)
    assert low.shape == high.shape == (4,) and (low >= 0).all() and (high <= 1).all()
    for chance, lower, upper in zip(chances, low, high, strict=True):
        shares, p = probability(chance, count)
        tail = (1 - level) / 2
        assert p[shares < lower - 1e-9].sum() < tail <= p[shares < lower + 1e-9].sum()
        assert p[shares > upper + 1e-9].sum() <= tail < p[shares > upper - 1e-9].sum()


def test_where_the_normal_law_leaves_what_is_possible_it_does_not():
    assert 0.9 + 1.96 * math.sqrt(0.09 / 9) > 1  # nine weights, as of three neurons
    low, high = binomial_band(0.9, 9)
    assert (float(low), float(high)) == (6 / 9, 1.0)
    assert [float(end) for end in binomial_band(0.0, 5)] == [0, 0] and float(binomial_band(1.0, 5)[0]) == 1


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: binomial_band([0.5, 1.2], 3), "chances must be probabilities, between 0 and 1; got 0.5 … 1.2"),
        (lambda: binomial_band(math.nan, 3), "chances must be probabilities"),
        (lambda: binomial_band(0.5, 0), "count must be"),
        (lambda: binomial_band(0.5, 3, 1.0), "level must lie between 0 and 1; got 1.0"),
    ],
)
def test_bad_input_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_the_report_of_few_weights_shows_no_impossible_band(posteriors, tmp_path):
    """Of 36 weights: 29 to 35 are within intervals of 90 %, and χ² is between 21.336 and 54.437, as tables say."""
    words = ["evaluate", posteriors["exact"], "--truth", posteriors["cube"], "--out-dir", tmp_path]
    assert main([str(word) for word in words]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "0.8056 … 0.9722" in page and f"{21.336 / 36:.4g} … {54.437 / 36:.4g}" in page
