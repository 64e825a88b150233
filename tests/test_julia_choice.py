"""When `engine="auto"` takes Julia."""

import pytest
import torch

from neurosde.engines import Work
from neurosde.julia import choice
from neurosde.julia.locate import JuliaError


@pytest.fixture
def model(monkeypatch):
    """A cost model in which a simulation of n steps takes n seconds on torch and one on Julia, which starts in 10."""
    free = (0.0, 0.0)
    monkeypatch.setattr(choice, "TORCH", choice.Costs(free, free, free, (1.0, 2.0), free, free, free))
    monkeypatch.setattr(choice, "JULIA", choice.Costs((1.0, 1.0), *[free] * 6))
    monkeypatch.setattr(choice, "START", 10.0)
    monkeypatch.setattr(choice, "_saved", 0.0)
    state = {"running": False, "available": True, "starts": 0}

    def start():
        state["starts"] += 1

    monkeypatch.setattr(choice, "worker_running", lambda: state["running"])
    monkeypatch.setattr(choice, "julia_available", lambda: state["available"])
    monkeypatch.setattr(choice, "find_julia", lambda: "a Julia")
    monkeypatch.setattr(choice, "describe", start)
    return state


def of(steps, gradient=False):
    return Work(
        networks=1,
        trajectories=1,
        neurons=1,
        steps=steps,
        noisy=False,
        gradient=gradient,
        recorded=False,
        phi="tanh",
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def test_julia_is_never_started_for_small_work(model):
    assert not any(choice.julia_pays(of(1)) for _ in range(1000))  # nothing is gained, however often
    assert not choice.julia_pays(of(11))  # gains ten seconds, which starting takes
    assert model["starts"] == 0


def test_julia_is_started_for_large_work(model):
    assert choice.julia_pays(of(12))
    assert choice._saved == 11
    assert model["starts"] == 1


def test_gains_add_up_to_a_start(model):
    assert [choice.julia_pays(of(3)) for _ in range(6)] == [False] * 5 + [True]  # two seconds each
    assert choice.julia_pays(of(2))


def test_gradients_count(model):
    assert not choice.julia_pays(of(6))
    assert choice.julia_pays(of(6, gradient=True))


def test_a_running_worker_is_taken_where_it_is_quicker(model):
    model["running"] = True
    assert choice.julia_pays(of(2))
    assert not choice.julia_pays(of(1))


def test_julia_has_to_be_there(model):
    model["available"] = False
    assert not choice.julia_pays(of(1000))
    model["available"] = True
    assert choice.julia_pays(of(2))


def test_the_choice_for_a_whole_depends_on_nothing_else(model):
    for running in (False, True):
        model["running"] = running
        for saved in (0.0, 1e9):
            choice._saved = saved
            assert [choice.julia_pays(of(steps), whole=True) for steps in (1, 11, 12)] == [False, False, True]
            assert choice._saved == saved


def test_a_julia_that_does_not_start_is_said_once(model, monkeypatch):
    def fail():
        model["starts"] += 1
        raise JuliaError("it is broken")

    monkeypatch.setattr(choice, "describe", fail)
    monkeypatch.setattr(choice, "_broken", set())
    with pytest.warns(UserWarning, match="goes on with torch, since Julia does not start: it is broken"):
        assert not choice.julia_pays(of(12))
    assert not choice.julia_pays(of(12)) and not choice.julia_pays(of(12), whole=True)
    assert model["starts"] == 1
