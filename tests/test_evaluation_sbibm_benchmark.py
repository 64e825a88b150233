"""The benchmark on sbibm's tasks: what is exact is found to be, a command that was killed goes on, bad input."""

import math

import numpy as np
import pytest
import xarray as xr
from scipy.stats import norm

from neurosde.cli import main
from neurosde.evaluation import sbibm_benchmark as module
from neurosde.evaluation.published_c2st import published_c2st
from neurosde.evaluation.sbibm_benchmark import SbibmBenchmark, markdown_table, sbibm_benchmark
from neurosde.evaluation.sbibm_published import METHODS, PUBLISHED
from neurosde.evaluation.sbibm_tasks import TASKS
from neurosde.models.vector_diffusion import VectorTraining

OPTIONS = ["--tasks", "two_moons", "gaussian_linear", "--simulations", "1000", "--observations", "2", "--draws", "20"]


class Exact:
    """What a perfect training would return."""

    def __init__(self, task):
        self.task = task

    def sample(self, x, draws, *, steps, generator):
        return self.task.posterior(x, draws, generator)


def test_a_perfect_posterior_is_told_from_no_other(monkeypatch):
    """Each of 400 rows is told right with a chance of ½: the accuracy is within four binomial standard errors."""
    by_dim = {task.dim: task for task in TASKS.values()}
    monkeypatch.setattr(module, "train_vector_posterior", lambda theta, *_, **__: Exact(by_dim[theta.shape[1]]))
    found = sbibm_benchmark(SbibmBenchmark(tasks=("two_moons",), simulations=(1000,), observations=1, draws=200))
    for name in ("c2st", "c2st_standardised", "c2st_exact"):
        np.testing.assert_allclose(found[name], 0.5, atol=4 * math.sqrt(0.25 / 400))


def test_sbibms_classifier_finds_what_can_be_found():
    """Of two normal laws 2 apart nothing tells more than Φ(1); a boundary at ½ from the middle tells (Φ(½) + Φ(1½))/2.

    The classifier's is to be nearer than that. Both bounds but for four binomial standard errors of 3000 rows.
    """
    source = np.random.default_rng(0)
    reference, other = source.normal(size=(1500, 1)), source.normal(2.0, size=(1500, 1))

    def error(accuracy):
        return 4 * math.sqrt(accuracy * (1 - accuracy) / 3000)

    best, least = norm.cdf(1.0), norm.cdf([0.5, 1.5]).mean()
    for standardise in (False, True):
        found = published_c2st(reference, other, standardise=standardise)
        assert least - error(least) < found < best + error(best)
    # A unit that is small hides what is different, unless draws are standardised, by the reference alone.
    small = 1e-6 * np.concatenate([reference, other], axis=1), 1e-6 * np.concatenate([reference + 2, other], axis=1)
    assert published_c2st(*small, standardise=False) < 0.5 + error(0.5)
    assert published_c2st(*small, standardise=True) > least - error(least)
    # Of a law 10⁴ as wide next to nothing, Φ(0.1) − ½, is on the reference's side of a boundary at 1000 of its spreads.
    far = 1.5 - norm.cdf(0.1)
    assert published_c2st(reference, 3.0 + 1e4 * reference, standardise=True) > far - error(far)


def test_samples_that_cannot_be_compared():
    good = np.random.default_rng(0).normal(size=(20, 2))
    for first, second, match in (
        (good, good[:, :1], r"of one shape; got \(20, 2\) and \(20, 1\)"),
        (good[:4], good[:4], "at least 5 draws, one for each fold; got 4"),
        (good, good * np.nan, "must be finite"),
        (good * [1, 0], good, r"features \[1\] of the reference do not vary"),
    ):
        with pytest.raises(ValueError, match=match):
            published_c2st(first, second, standardise=True)


@pytest.fixture
def trainings(monkeypatch):
    """Short trainings, of which the numbers of pairs are noted, and a quick number in place of sbibm's classifier."""
    noted = []
    train = module.train_vector_posterior

    def short(theta, x, config, **options):
        noted.append((theta.shape[1], len(theta)))
        return train(theta, x, VectorTraining(width=8, blocks=1, steps=2, seed=config.seed), **options)

    monkeypatch.setattr(module, "train_vector_posterior", short)
    monkeypatch.setattr(module, "published_c2st", lambda a, b, standardise: (a > b).mean())
    return noted


def test_a_command_that_was_stopped_goes_on_after_the_rows_it_has(tmp_path, capsys, monkeypatch, trainings):
    out = tmp_path / "sbibm.nc"
    command = ["benchmark", "sbibm", *OPTIONS, "--steps", "4", "--out", str(out)]
    whole = tmp_path / "whole.nc"
    assert main([*command[:-1], str(whole)]) == 0
    assert trainings == [(2, 1000), (10, 1000)]
    run_row = module._row

    def stopped(task, simulations, c):
        if task.name == "gaussian_linear":
            raise KeyboardInterrupt
        return run_row(task, simulations, c)

    with monkeypatch.context() as patched:
        patched.setattr(module, "_row", stopped)
        assert main(command) == 130
    trainings.clear()
    assert main(command) == 0
    assert trainings == [(10, 1000)]
    trainings.clear()
    assert main(command) == 0 and not trainings  # nothing is left to do
    said = capsys.readouterr().out
    with xr.open_dataset(out) as results, xr.open_dataset(whole) as expected:
        for name in ("c2st", "c2st_standardised", "c2st_exact"):
            assert results[name].dims == ("task", "simulations", "observation")
            xr.testing.assert_equal(results[name], expected[name])
        assert not results["seconds"].isnull().any() and results["seconds"].attrs["units"] == "s"
        assert markdown_table(results) in said
    row = next(line.split(" | ") for line in said.splitlines() if line.startswith("| two_moons"))
    assert row[1] == "1000" and row[6] == "0.667 / 0.724"

    assert main([*command, "--seed", "1"]) == 2
    said = capsys.readouterr().err
    assert "another benchmark (seed = 0 there, 1 now, training = {" in said and "choose another --out" in said
    out.write_text("nothing")
    assert main(command) == 2
    assert "is no result of this benchmark" in capsys.readouterr().err


def test_one_observation_has_no_standard_error(trainings):
    found = sbibm_benchmark(SbibmBenchmark(tasks=("two_moons",), simulations=(20,), observations=1, draws=20, steps=2))
    row = markdown_table(found).splitlines()[-1]
    assert "±" not in row and row.count("/") == 1  # plain / standardised; nothing was published for 20


def test_published_figures_are_accuracies_of_known_tasks():
    for (task, count), figures in PUBLISHED.items():
        assert task in TASKS and count in (1000, 10_000) and len(figures) == len(METHODS)
        assert all(0.5 < value < 1 for pair in figures for value in pair)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tasks": ("sir",)}, "tasks must be of two_moons, gaussian_linear, slcp; got sir"),
        ({"tasks": ()}, "tasks must be one or several"),
        ({"simulations": (1000, 1000)}, "each named once; got 1000 1000"),
        ({"simulations": (10,)}, "simulations must be at least 20; got 10"),
        ({"observations": 0}, "observations must be at least 1"),
        ({"draws": 9}, "draws must be at least 10"),
    ],
)
def test_bad_input_says_what_was_expected(options, match):
    with pytest.raises(ValueError, match=match):
        SbibmBenchmark(**options)
