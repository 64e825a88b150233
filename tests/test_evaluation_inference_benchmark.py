"""`neurosde benchmark inference`: cells, the cube that gathers them, and its report."""

import hashlib
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xarray as xr

from neurosde.cli import main
from neurosde.datasets.execution import Execution
from neurosde.evaluation import inference_metrics
from neurosde.evaluation.inference_benchmark import inference_benchmark
from neurosde.evaluation.inference_cells import Cell
from neurosde.evaluation.inference_config import InferenceBenchmark
from neurosde.evaluation.inference_methods import DEFAULT, METHODS, Inferred, infer_by
from neurosde.evaluation.inference_metrics import METRICS, activity_distance, measured
from neurosde.evaluation.inference_report import calibration_table, markdown_tables, means, write_inference_report
from neurosde.evaluation.inference_tasks import DT, Task, record, suite_tasks
from neurosde.julia import choice
from neurosde.lyapunov import lyapunov_exponents
from neurosde.solve import simulate_rate_network

SPARSE = "sparse-N10-T100x2-g1.5-sigma0.3"
SMALL = InferenceBenchmark(tasks=(SPARSE,), methods=("ridge", "gaussian"), networks=3, draws=16)
BLOCK, DALE = SPARSE.replace("sparse", "block"), SPARSE.replace("sparse", "dale")  # whose exact posterior is not known
BLOCKS = replace(SMALL, tasks=(BLOCK,))
COST = ["seconds", "memory"]


@pytest.fixture
def short(monkeypatch):
    """Lyapunov exponents of a tenth of the time, for tests that say nothing of their values."""
    monkeypatch.setattr(
        inference_metrics, "lyapunov_exponents", lambda sde, time: lyapunov_exponents(sde, time=time / 10)
    )


def test_a_network_depends_on_its_task_and_its_seed_alone():
    task = Task("dale", 6, 20)
    both, one = record(task, (4, 7)), record(task, (7,))
    assert torch.equal(both.weights[1], one.weights[0]) and torch.equal(both.activity[1], one.activity[0])
    assert torch.equal(both.held_out[1].xx, one.held_out[0].xx)
    other = record(replace(task, times=21), (7,))
    assert not torch.equal(other.weights, one.weights)


def test_names_of_tasks_are_their_own():
    for suite in ("quick", "paper"):
        names = [task.name for task in suite_tasks(suite)]
        assert len(set(names)) == len(names)


def test_the_truth_as_an_estimate_has_no_error_and_chance_is_chance(short):
    recorded = record(Task("sparse", 12, 30), (0, 1, 2))
    best = measured(Inferred(recorded.weights), recorded, 0)
    assert np.allclose(best["relative_error"], 0) and np.allclose(best["lyapunov_error"], 0)
    assert np.allclose(best["edge_auc"], 1) and np.allclose(best["sign_accuracy"], 1)
    assert "coverage_90" not in best
    worse = measured(Inferred(torch.zeros_like(recorded.weights)), recorded, 0)
    assert np.allclose(worse["relative_error"], 1) and np.allclose(worse["edge_auc"], 0.5)
    assert all(a > b for a, b in zip(best["held_out"], worse["held_out"], strict=True))


def test_the_same_activity_is_at_no_distance_and_a_louder_one_at_that_of_its_loudness():
    """Of six statistics two do not feel a factor c, one goes as c and three as c²: mean |log ratio| is 7/6 log c."""
    recorded = record(Task("gaussian", 10, 200), (0, 1))
    voltage, W = recorded.voltage[1], recorded.weights[1:]
    again = simulate_rate_network(W.to(voltage), voltage[:, 0], 200, DT, 1.0, noise_std=0.3, generator=8)

    def distance(drawn, factor=1.0):
        activity = torch.stack([torch.zeros_like(again), factor * again])
        known = SimpleNamespace(task=recorded.task, voltage=recorded.voltage, activity=activity)
        return activity_distance(drawn, known, 1, 8)

    assert distance(W) < 1e-6
    assert distance(W, 0.8) == pytest.approx(7 / 6 * np.log(1 / 0.8), rel=1e-5)  # activity is float32
    assert distance(torch.cat([W, 0 * W])) > 0.1  # a draw that is nothing like them
    assert np.isnan(distance(W, 0.0))  # nothing to compare with


def test_told_the_gain_the_gaussian_posterior_is_the_exact_one():
    """Its mean is (B C)/s², C = (xx/s² + I/v)⁻¹, s² the variance of the noise of a transition's right-hand side."""
    recorded = record(Task("gaussian", 8, 60), (3,))
    found = infer_by("exact", recorded, draws=4000, seed=0, simulations=1)
    statistics, variance = recorded.statistics[0], 1.5**2 / 8
    noise = 0.3**2 / 0.1
    C = torch.linalg.inv(statistics.xx / noise + torch.eye(8, dtype=torch.float64) / variance)
    torch.testing.assert_close(found.estimate[0], statistics.yx / noise @ C, rtol=1e-8, atol=1e-10)
    error = (found.draws[:, 0].mean(0) - found.estimate[0]) / (C.diagonal() / 4000).sqrt()
    assert float(error.abs().max()) < 4.6  # of 64 standard normal numbers once in 4000


def test_finished_cells_are_kept_and_missing_ones_made(short, tmp_path):
    first = inference_benchmark(BLOCKS, tmp_path)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    assert len(files) == 2
    wider = inference_benchmark(replace(BLOCKS, methods=("ridge", "prior", "gaussian")), tmp_path)
    assert all(path.stat().st_mtime_ns == then for path, then in files.items())
    both = {"method": ["ridge", "gaussian"]}
    xr.testing.assert_equal(wider["results"].sel(both), first["results"])
    (tmp_path / "cells" / f"{BLOCK}--gaussian.json").unlink()  # as if it had been killed before
    again = inference_benchmark(BLOCKS, tmp_path)
    cost = again["metric"].isin(COST)
    xr.testing.assert_equal(again["results"].sel(both).where(~cost), first["results"].where(~cost))
    # A command that names less takes nothing away, and one of another task leaves what neither has asked for empty.
    assert again["method"].values.tolist() == ["ridge", "gaussian", "prior"]
    other = inference_benchmark(replace(BLOCKS, tasks=(DALE,), methods=("ridge",)), tmp_path)
    assert [name[:5] for name in other["task"].values] == ["dale-", "block"]
    assert json.loads(other.attrs["config"])["methods"] == again["method"].values.tolist()
    xr.testing.assert_equal(other["results"].sel({"task": [BLOCK]}), again["results"])
    assert bool(other["results"][0].sel({"method": ["gaussian", "prior"]}).isnull().all())
    assert f"Posterior, {BLOCK}" in write_inference_report(other, tmp_path).read_text()
    assert markdown_tables(other).count("| ridge (cross-validation) | 0.") == 2
    with pytest.raises(ValueError, match=r"of another benchmark \(draws = 16 there, 17 now\)"):
        inference_benchmark(replace(BLOCKS, draws=17), tmp_path)
    with pytest.raises(ValueError, match=r"json is of another benchmark \(draws = 16 there, 17 now\)"):
        inference_benchmark(replace(BLOCKS, methods=("least-squares",), draws=17), tmp_path)  # beside those of others
    (tmp_path / "cells" / f"{BLOCK}--ridge.json").write_text("{cut")
    with pytest.raises(ValueError, match="ridge.json is not a cell of this benchmark; delete it"):
        inference_benchmark(BLOCKS, tmp_path)


def test_a_cell_is_taken_again_if_what_its_numbers_depend_on_is_the_same(tmp_path, monkeypatch):
    weights = tmp_path / "posterior.safetensors"
    weights.write_bytes(b"first")
    asked = replace(SMALL, checkpoint=str(weights))
    trained, ridge = (Cell(asked.chosen[0], name, tmp_path / "cells", asked) for name in ("cfg", "ridge"))
    of = trained.contents
    assert of["checkpoint_sha256"] == hashlib.sha256(b"first").hexdigest() and "checkpoint_sha256" not in ridge.contents
    trained.folder.mkdir()
    made_by = {"neurosde_version": "0.0", "git_commit": "of long ago"}
    stored = {"of": of, "made_by": made_by, "metrics": dict.fromkeys(METRICS, [0.5] * 3), "local": None}
    trained.path.write_text(json.dumps(stored))
    assert trained.found() == json.loads(json.dumps(stored))  # whatever the commit
    cube = inference_benchmark(replace(asked, methods=("cfg",)), tmp_path)
    assert cube["git_commit"].item() == "of long ago" and cube["neurosde_version"].item() == "0.0"
    assert cube.attrs["checkpoint_sha256"] == of["checkpoint_sha256"]
    weights.write_bytes(b"second")
    with pytest.raises(ValueError, match="checkpoint_sha256 = a7937b64b8ca.* there, 16367aacb67a.* now"):
        trained.found()
    weights.write_bytes(b"first")
    trained.path.write_text(json.dumps(stored | {"of": of | {"metrics": ["kl", "taste"]}}))
    with pytest.raises(ValueError, match=r"another benchmark \(metrics .*r2, .*taste"):
        trained.found()


@pytest.mark.slow
def test_processes_find_the_same(tmp_path, monkeypatch):
    # Other tests may have started Julia in this process; the engines are the same to rounding only.
    for name in ("worker_running", "julia_available"):
        monkeypatch.setattr(choice, name, lambda: False)
    two = replace(SMALL, networks=2)
    alone = inference_benchmark(two, tmp_path / "alone")["results"]
    several = inference_benchmark(two, tmp_path / "several", Execution(workers=2))["results"]
    cost = alone["metric"].isin(COST)
    xr.testing.assert_allclose(several.where(~cost), alone.where(~cost), rtol=1e-6)
    assert bool((several.sel({"metric": "seconds"}) > 0).all())


def test_a_guidance_that_diverges_leaves_nothing_but_its_cost(tmp_path, monkeypatch):
    def diverges(*_, **__):
        raise FloatingPointError("the guidance diverged")

    monkeypatch.setattr("neurosde.evaluation.inference_cells.infer_by", diverges)
    results = inference_benchmark(replace(SMALL, methods=("cfg-pigdm",)), tmp_path)
    page = write_inference_report(results, tmp_path).read_text()
    assert f"Cost, {SPARSE}" in page and "Least error" not in page
    found = results["results"]
    cost = found["metric"].isin(COST)
    assert bool(found.where(~cost, drop=True).isnull().all()) and bool(found.where(cost, drop=True).notnull().all())


def test_the_table_of_calibration_is_of_ranks_among_draws():
    """Truths that are one more draw have uniform ranks; truths beyond all draws have not."""
    count, draws = 400, 19
    values = np.full((1, 2, count, len(METRICS)), math.nan)
    metrics = list(METRICS)
    columns = [k for k, name in enumerate(metrics) if name.startswith("rank") or name == "credibility"]
    source = np.random.default_rng(0)
    values[0, 0][:, columns] = source.integers(draws + 1, size=(count, len(columns))) / draws
    values[0, 1][:, columns] = 1.0
    results = xr.Dataset(
        {
            "results": (("task", "method", "network", "metric"), values),
            "local_c2st_overall_p": ("method", [0.4, math.nan]),
        },
        {"task": ["one"], "method": ["cfg", "prior"], "metric": metrics},
        {"config": json.dumps({"draws": draws})},
    )
    table = calibration_table(results)
    right, wrong = table.loc[METHODS["cfg"]], table.loc[METHODS["prior"]]
    assert right["p"] > 0.01 and right["tarp"] < 0.06 and right["networks"] == count
    assert wrong["p"] < 1e-10 and wrong["tarp"] > 0.4
    # Of 400 uniform credibilities the mean error is below about 0.6/√400 with a probability of 95 %.
    assert right["tarp_exact"] == wrong["tarp_exact"] == pytest.approx(0.6 / math.sqrt(count), abs=0.01)
    assert right["local"] == 0.4
    mean, half = means(results, ("credibility",))
    error = values[0, 0, :, metrics.index("credibility")].std(ddof=1) / math.sqrt(count)
    assert half["credibility"].iloc[0] == pytest.approx(1.966 * error, rel=1e-3)  # Student's, 399 degrees of freedom
    assert mean["credibility"].iloc[1] == 1


@pytest.mark.slow
def test_the_command(short, tmp_path, capsys):
    command = ["benchmark", "inference", "--tasks", SPARSE, "--networks", "2", "--draws", "8", "--out", str(tmp_path)]
    assert main([*command, "--methods", "ridge", "curbd", "cfg", "cfg-gibbs", "covariance", "precision"]) == 0
    said = capsys.readouterr().out
    assert "trained posterior, refined (split Gibbs)" in said and "| p | TARP (95 % of exact ones) |" in said
    with xr.open_dataset(tmp_path / "results.nc") as results:
        assert results["results"].dims == ("task", "method", "network", "metric")
        assert results["results"].sizes == {"task": 1, "method": 6, "network": 2, "metric": len(METRICS)}
        assert results["observed"].item() == 1 and results["ensemble"].item() == "sparse"
        errors = results["results"].sel({"metric": "relative_error", "method": ["cfg", "curbd"]}).mean("network")
        assert float(errors[0, 0]) < 1 < float(errors[0, 1])  # CURBD fits activity, not W
    page = (tmp_path / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and "Task by task</h2>" in page and "http" not in page
    assert (tmp_path / "errors.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"methods": ("lasso",)}, "methods must be of least-squares"),
        ({"tasks": ("dale-N3",)}, "tasks must be of the suite quick"),
        ({"networks": 1}, "networks must be at least 2"),
        ({"methods": ("ridge", "ridge")}, "methods must be named once each"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        InferenceBenchmark(**options)


def test_bad_tasks_and_methods(tmp_path):
    with pytest.raises(ValueError, match="ensemble must be one of"):
        Task("lattice", 10, 100)
    with pytest.raises(ValueError, match="observed must be 1"):
        Task("dale", 10, 100, observed=0.5)
    with pytest.raises(ValueError, match="method must be one of"):
        infer_by("lasso", record(Task("gaussian", 4, 10), (0,)), draws=2, seed=0, simulations=1)
    assert set(DEFAULT) < set(METHODS)
    assert Cell(Task("gaussian", 4, 10), "ridge", tmp_path, SMALL).found() is None
