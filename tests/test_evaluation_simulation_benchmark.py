import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
import xarray as xr

from neurosde.cli import main
from neurosde.engines import Work
from neurosde.evaluation.engine_calibration import EngineCalibration, fitted_costs, judged
from neurosde.evaluation.simulation_benchmark import simulation_benchmark
from neurosde.evaluation.simulation_peers import BACKWARD, FORWARD, PASSES, Case, TorchLoop
from neurosde.evaluation.simulation_report import goals_table, times_figure, times_table
from neurosde.evaluation.simulation_tasks import METHODS, TASKS, SimulationBenchmark, Task
from neurosde.julia.choice import Costs

QUICK = ("neurosde-torch", "torch-loop", "torchsde", "torchsde-adjoint", "torchdiffeq", "torchdiffeq-adjoint")


@pytest.mark.parametrize("sizes", [(1, 1, 5, 12, 0.0), (1, 3, 5, 12, 0.0), (4, 3, 5, 12, 0.0), (4, 3, 5, 12, 0.2)])
def test_every_method_follows_the_scheme(sizes):
    case = Case.draw(*sizes, dt=0.1, tau=1.3, g=1.5, seed=1)
    h = case.h0.double().requires_grad_()
    W = case.weights.double().requires_grad_()
    expected, state = [h], h
    for _ in range(sizes[3] - 1):
        state = state + case.dt / case.tau * (torch.einsum("mij,mkj->mki", W, state.tanh()) - state)
        expected.append(state)
    path = torch.stack(expected)
    gradients = torch.autograd.grad(path, (W, h), case.cotangent.double())
    for method in QUICK:
        simulator = METHODS[method][1](case)
        if case.noise_std > 0:
            if simulator.noise:
                assert simulator.path(simulator.solve().detach()).shape == path.shape
                assert all(torch.isfinite(gradient).all() for gradient in simulator.backward())
            continue
        for result in (simulator.forward(), simulator.solve().detach()):
            torch.testing.assert_close(simulator.path(result).double(), path.detach(), rtol=1e-5, atol=1e-5)
        if method.endswith("adjoint"):  # continuous adjoints are off by O(dt)
            continue
        for found, gradient in zip(simulator.backward(), gradients, strict=True):
            torch.testing.assert_close(found.double(), gradient, rtol=1e-4, atol=1e-4)


def test_noise_of_every_method_has_its_strength():
    sigma, dt = 0.3, 0.1
    case = Case.draw(50, 4, 20, 3, sigma, dt=dt, tau=1.0, g=1.5, seed=2)
    drift = torch.einsum("mij,mkj->mki", case.weights, case.h0.tanh()) - case.h0
    for method in ("neurosde-torch", "torch-loop", "torchsde"):
        simulator = METHODS[method][1](case)
        for result in (simulator.forward(), simulator.solve().detach()):
            noise = (simulator.path(result)[1] - case.h0 - dt * drift) / dt**0.5
            assert abs(noise.std() / sigma - 1) < 5 / (2 * noise.numel()) ** 0.5


def test_operations_and_sizes():
    task = Task(networks=3, trials=7, N=11, T=5)
    products = 3 * 7 * 4 * 11**2  # networks x trials x steps, each W times a vector
    assert task.flops(FORWARD) == 2 * products and task.flops(BACKWARD) == 6 * products
    assert TASKS["D"].scaled(0.1) == Task(26, 8, 100, 200, passes=(BACKWARD,))
    assert TASKS["C"].scaled(0.25) == Task(1, 16, 1000, 200)
    assert TASKS["A"].scaled(0.001) == TASKS["A"]


def test_data_are_labelled_and_the_floor_follows_from_the_peak():
    tasks, saved, threads = ("A", "B-noise"), [], torch.get_num_threads()
    methods = ("torch-loop", "torchdiffeq", "neurosde-auto")
    config = SimulationBenchmark(tasks, PASSES, methods, repeats=2, scale=0.003, dataset=False, threads=1)
    for data in simulation_benchmark(config):
        saved.append(float(data.results.count()))
    assert data.results.dims == ("task", "pass", "method", "repeat") and data.results.attrs["units"] == "s"
    assert len(saved) == 4 and saved == sorted(saved)
    assert data.attrs["left_out"] == "{}"
    there = data.results.notnull().all("repeat")
    assert there.isel(method=[0, 2]).all()
    assert there.isel(method=1).sel(task="A").all() and not there.isel(method=1).sel(task="B-noise").any()
    for task in tasks:
        flops = TASKS[task].scaled(config.scale).flops(FORWARD)
        floor = data.floor.sel(task=task)
        np.testing.assert_allclose(floor.sel({"pass": FORWARD}), flops / (1e9 * data.peak))
        np.testing.assert_allclose(floor.sel({"pass": BACKWARD}), 3 * floor.sel({"pass": FORWARD}))
    assert (data.path_error.sel(task="A") < 1e-5).all() and (data.gradient_error.sel(task="A") < 1e-4).all()
    assert data.attrs["torch_version"] == torch.__version__
    assert data.attrs["threads"] == 1 and torch.get_num_threads() == threads
    table = times_table(data)
    assert table.count("\n") == 6 and "| neurosde auto |" in table
    goals = goals_table(data)
    assert "| A forward: torchsde.sdeint ÷ neurosde julia | – | ≥ 50 | – |" in goals and "D forward" not in goals
    assert len(times_figure(data).axes) == 4


def test_a_method_on_another_path_is_left_out(monkeypatch):
    class Wrong(TorchLoop):
        def forward(self):
            return super().forward() * 1.01

    monkeypatch.setitem(METHODS, "torchsde", ("wrong", Wrong))
    config = SimulationBenchmark(
        ("A",), None, ("torchsde", "torch-loop"), repeats=1, scale=0.01, dataset=False, threads=1
    )
    *_, data = simulation_benchmark(config)
    times = data.results.sel({"task": "A", "pass": FORWARD, "repeat": 0}).to_numpy()
    assert np.isnan(times[0]) and times[1] > 0
    assert "its path is off by 1.0e-02" in next(iter(json.loads(data.attrs["left_out"])))


def test_goals_compare_with_the_quickest_form_of_torch_and_with_the_floor():
    methods = ("neurosde-julia", "neurosde-torch", "neurosde-auto", "torch-loop", "torchsde-adjoint", "torchsde")
    seconds = {
        ("A", FORWARD): (5e-5, 9e-4, 6e-5, 8e-4, np.nan, 2e-3),
        ("B", FORWARD): (0.04, 0.2, 0.2, 0.3, np.nan, 1.0),
        ("D", BACKWARD): (0.1, 0.5, 0.1, 0.4, 3.0, 1.0),
    }
    goals = {
        "A forward: torchsde.sdeint ÷ neurosde julia": "40 | ≥ 50 | no",
        "A forward: neurosde julia (stretch)": "50 µs | ≤ 60 µs | yes",
        "A forward: neurosde auto ÷ neurosde julia (quicker engine)": "1.2 | ≤ 1.3 | yes",
        "B forward: neurosde torch (best torch form) ÷ neurosde julia": "5 | ≥ 6 | no",
        "B forward: torchsde.sdeint ÷ neurosde julia": "25 | ≥ 12 | yes",
        "B forward: neurosde julia ÷ floor (stretch)": "1.6 | ≤ 1.6 | yes",
        "B forward: neurosde auto ÷ neurosde julia (quicker engine)": "5 | ≤ 1.3 | no",
        "D forward+backward: torch loop ÷ neurosde julia": "4 | ≥ 4 | yes",
        "D forward+backward: torchsde.sdeint ÷ neurosde julia": "10 | ≥ 7 | yes",
        "D forward+backward: torchsde.sdeint_adjoint ÷ neurosde julia": "30 | ≥ 25 | yes",
        "D forward+backward: neurosde julia ÷ floor (stretch)": "2 | ≤ 1.6 | no",
        "D forward+backward: neurosde auto ÷ neurosde julia (quicker engine)": "1 | ≤ 1.3 | yes",
        "build-dataset ÷ writing its bytes": "1.5 | ≤ 2 | yes",
    }
    tasks = ("A", "B", "D")
    dims = ("task", "pass", "method", "repeat")
    data = xr.Dataset(
        {
            "results": (dims, np.full((3, 2, len(methods), 3), np.nan)),
            "floor": (dims[:2], [[1e-6, np.nan], [0.025, np.nan], [np.nan, 0.05]]),
            "build_dataset": (("what", "build"), [[3.0, 0.5, 9.0], [2.0, 1.0, 2.0]]),
        },
        coords={"task": list(tasks), "pass": list(PASSES), "method": list(methods)},
    )
    for (task, which), times in seconds.items():
        data["results"].loc[task, which] = np.outer(times, [1.0, 1.2, 0.8])
    rows = goals_table(data).splitlines()[2:]
    assert sorted(rows) == sorted(f"| {what} | {found} |" for what, found in goals.items())


@pytest.mark.parametrize(
    "options, match",
    [
        ({"tasks": ("A", "E")}, "tasks must be some of A, B, B-noise, C, D; got E"),
        ({"passes": ("sideways",)}, "passes must be some of forward, forward\\+backward; got sideways"),
        ({"methods": ("torch-loop", "tensorflow")}, "methods must be some of .*torch-loop.*; got tensorflow"),
        ({"methods": ()}, "got none"),
        ({"repeats": 0}, "repeats must be at least 1"),
        ({"scale": 0.0}, "scale must be"),
        ({"threads": 0}, "threads must be at least 1"),
    ],
)
def test_what_cannot_be_run_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        SimulationBenchmark(**options)


def test_the_command_writes_data_and_figure_and_says_what_is_missing(tmp_path, capsys):
    out = tmp_path / "results" / "simulate.nc"
    methods = ["torch-loop", "neurosde-auto", "numba"]
    command = ["benchmark", "simulate", "--tasks", "D", "--methods", *methods, "--repeats", "1", "--scale", "0.004"]
    command += ["--threads", "1"]
    assert main([*command, "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert said.err == "" and "| torch loop |" in said.out and "build-dataset, task B:" in said.out
    assert (out.parent / "simulate.png").stat().st_size > 1000 and len(list(out.parent.iterdir())) == 2
    with xr.open_dataset(out) as data:
        assert list(data["pass"].values) == [FORWARD, BACKWARD] and (data.build_dataset[:, 0] > 0).all()
        assert json.loads(data.attrs["config"])["scale"] == 0.004
        if data.attrs["numba_version"] == "not installed":
            assert "numba is not installed; pip install 'neurosde[peers]'" in said.out
    assert main(["benchmark", "simulate", "--tasks", "Z"]) == 2
    assert "tasks must be some of" in capsys.readouterr().err


def test_interrupted_it_keeps_what_was_measured(tmp_path, capsys, monkeypatch):
    class Interrupted(TorchLoop):
        def backward(self):
            raise KeyboardInterrupt

    monkeypatch.setitem(METHODS, "torchsde", ("interrupted", Interrupted))
    out = tmp_path / "simulate.nc"
    command = ["benchmark", "simulate", "--tasks", "A", "--methods", "torchsde", "torch-loop", "--repeats", "1"]
    assert main([*command, "--scale", "0.01", "--threads", "1", "--out", str(out)]) == 130
    assert "interrupted: this is what was measured" in capsys.readouterr().out
    with xr.open_dataset(out) as data:
        assert data.results.sel({"pass": FORWARD}).notnull().all()
        assert data.results.sel({"pass": BACKWARD}).isnull().all()


def works():
    return [
        Work(M, M * K, N, steps, noisy, gradient, False, "tanh", torch.float32, torch.device("cpu"))
        for M, K, N, steps, noisy, gradient in itertools.product(
            (1, 30), (1, 20), (10, 50, 200), (10, 100), (False, True), (False, True)
        )
    ]


def test_constants_are_found_from_the_times_that_they_predict():
    slow = Costs((2e-4, 5e-4), (1e-9, 4e-9), (5e-11, 1e-10), (1e-5, 4e-5), (1e-11, 3e-11), (2e-9, 8e-9), (4e-4, 1e-8))
    fast = Costs((3e-4, 6e-4), (3e-9, 7e-9), (4e-11, 8e-11), (0.0, 0.0), (5e-12, 2e-11), (3e-10, 1e-9), (0.0, 1e-9))
    seconds = np.array([[costs.seconds(work) for work in works()] for costs in (slow, fast)])
    for costs, times in zip((slow, fast), seconds, strict=True):
        found = fitted_costs(works(), times)
        for name, pair in dataclasses.asdict(costs).items():
            np.testing.assert_allclose(getattr(found, name), pair, rtol=1e-6, atol=1e-18)
    assert judged(works(), seconds, (slow, fast)) == (1.0, 1.0)
    share, worst = judged(works(), seconds, (fast, slow))  # always the other one
    assert share == 0.0 and worst == pytest.approx((seconds.max(0) / seconds.min(0)).max())


def test_constants_that_the_grid_does_not_show_are_zero():
    quiet = [work for work in works() if not work.noisy and not work.gradient]
    costs = Costs((2e-4, 0.0), (1e-9, 0.0), (5e-11, 0.0), (1e-5, 0.0), (1e-11, 0.0), (2e-9, 0.0), (0.0, 0.0))
    found = fitted_costs(quiet, np.array([costs.seconds(work) for work in quiet]))
    np.testing.assert_allclose(dataclasses.astuple(found), dataclasses.astuple(costs), rtol=1e-6, atol=1e-18)


def test_the_grid_leaves_out_what_is_too_large():
    tasks = EngineCalibration(sizes=(10, 1000), networks=(1, 1000), trials=(1,), lengths=(11,)).tasks()
    assert {(task.networks, task.N) for task in tasks} == {(1, 10), (1000, 10), (1, 1000)}
    assert {task.noise_std > 0 for task in tasks} == {False, True}
    with pytest.raises(ValueError, match="lengths must be at least 2; got 1"):
        EngineCalibration(lengths=(1,))


def test_engines_are_timed_and_their_constants_said(tmp_path, capsys, julia):
    out = tmp_path / "engines.nc"
    sizes = ["--sizes", "5", "20", "--networks", "1", "3", "--trials", "2", "--lengths", "3", "11"]
    assert main(["benchmark", "engines", *sizes, "--repeats", "2", "--threads", "1", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    for name in ("TORCH", "JULIA"):
        written = next(line for line in said.splitlines() if line.startswith(f"{name} = "))
        assert isinstance(eval(written.partition(" = ")[2], {"Costs": Costs}), Costs)
    assert "START = " in said and "of 32 cases" in said
    with xr.open_dataset(out) as data:
        assert data.seconds.dims == ("engine", "work", "repeat") and (data.seconds > 0).all() and (data.start > 0).all()
        assert set(data.steps.values) == {2, 10} and set(data.neurons.values) == {5, 20}
        assert int(data.gradient.sum()) == int(data.noisy.sum()) == 16


def test_without_julia_engines_cannot_be_compared(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("NEUROSDE_JULIA", str(tmp_path / "none"))
    assert main(["benchmark", "engines", "--out", str(tmp_path / "engines.nc")]) == 2
    assert "NEUROSDE_JULIA" in capsys.readouterr().err and not list(tmp_path.iterdir())
