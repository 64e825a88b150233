"""Recordings that a posterior is trained on, and its training."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr

from neurosde.cli import main
from neurosde.datasets.build_dataset import DatasetConfig, build_dataset
from neurosde.datasets.ensembles import Dale, GainMixture, Gaussian, LowRank, Sparse, make_ensemble
from neurosde.likelihood import transition_statistics
from neurosde.models.diffusion_cfg import CFGPosterior
from neurosde.models.diffusion_prior import load_prior
from neurosde.models.edm import fold
from neurosde.models.network_denoiser import evaluate_network
from neurosde.models.training import DenoiserModule, denoising_loss
from neurosde.models.training_config import PosteriorTraining, PriorTraining, read_training
from neurosde.models.training_recordings import (
    LENGTHS,
    CubeRecordings,
    SimulatedRecordings,
    simulated_sums,
)
from neurosde.models.training_run import TrainingRun, train_posterior

D = torch.float64
KINDS = (GainMixture(Gaussian(0.5), 2.0), GainMixture(Dale(0.5), 2.0), Sparse(1.2))
SMALL = PosteriorTraining(
    ensembles=KINDS, sizes=(4, 6), preset="tiny", steps=24, batch_entries=200, warmup=5, ema=0.9, times=(10, 60),
    trials=(1, 4), reuse=3,
)  # fmt: skip
EVERY = TrainingRun(accelerator="cpu", log_every=1, validate_every=8)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_sums_are_those_of_the_transitions():
    """Nearly without noise y = Wφ; the sums at a length are those of a recording that ends there."""
    W = 1.3 / 2 * torch.randn(5, 4, 4, dtype=D, generator=generator())
    noise, current = torch.full((5,), 1e-4, dtype=D), torch.randn(5, 4, dtype=D, generator=generator(1))
    xx, yx = simulated_sums(W, 3, [20, 50], 0.1, noise, current, generator(2))
    assert xx.shape == yx.shape == (2, 5, 4, 4)
    for k in range(2):
        error = (yx[k] - W @ xx[k]).norm() / yx[k].norm()
        assert float(error) < 1e-3
    short, _ = simulated_sums(W, 3, [20], 0.1, noise, current, generator(2))
    torch.testing.assert_close(short[0], xx[0])
    assert bool((torch.linalg.eigvalsh(xx[1] - xx[0]) > -1e-6 * xx.max()).all())  # more transitions say more


def test_the_noise_is_what_it_is_said_to_be():
    """(B − WΛ) is Σξφᵀ/s: its trace against Λ⁻¹ has the mean N² in the limit of many transitions."""
    N, count = 3, 200
    W = torch.zeros(count, N, N, dtype=D)  # activity that noise alone makes
    noise = torch.linspace(0.1, 1.0, count, dtype=D)
    xx, yx = simulated_sums(W, 2, [2000], 0.2, noise, torch.zeros(count, N, dtype=D), generator())
    square = ((yx[0] @ torch.linalg.inv(xx[0])) * yx[0]).sum((-1, -2))
    assert abs(float(square.mean()) - N**2) < 4 * math.sqrt(2 * N**2 / count)
    ratio = float(square[:100].mean() / square[100:].mean())  # whatever the noise
    assert abs(math.log(ratio)) < 4 * math.sqrt(2 * 2 / (N**2 * 100))


def test_examples_are_in_the_units_of_their_recordings():
    config = replace(SMALL, batch_entries=20_000, reuse=1, gain_dropout=0.5, recording_dropout=0.2)
    data = SimulatedRecordings(config)
    batch = next(iter(data.batches(0, 0, 1)))
    one = data.examples(batch, generator())
    N, count = one.J.shape[-1], len(one.J)
    assert data.families == ("gaussian", "dale", "sparse") and set(one.family.tolist()) == {1, 2, 3}
    without = one.evidence.eigenvalues.amax(-1) == 0
    assert abs(float(without.double().mean()) - 0.2) < 4 * math.sqrt(0.16 / count)
    assert torch.equal(without, ~one.evidence.cross.flatten(1).any(1))
    told = one.told.gain_known
    assert abs(float(told.double().mean()) - 0.5) < 4 * math.sqrt(0.25 / count)
    squares = one.J.square().mean((-1, -2))
    of_told = squares[told]
    assert abs(float(of_told.mean()) - 1) < 4 * float(of_told.std()) / math.sqrt(len(of_told))
    assert 0.5 < float(squares[~told].mean()) < 2  # measured by the recording
    # The Gaussian posterior of a Gaussian network of known gain is right: its whitened errors are of unit size.
    exact = told & (one.family == 1)
    evidence = one.evidence[exact]
    J = one.J[exact]
    folded = fold(J + 80 * torch.randn(J.shape, dtype=D, generator=generator(1)), 80.0, evidence)
    loss = folded.loss(torch.zeros_like(J), J)
    assert abs(float(loss.mean()) - 1) < 4 * math.sqrt(2 / (N**2 * len(J)))


def test_simulations_are_shared_by_steps_but_networks_are_not():
    data = SimulatedRecordings(SMALL)
    batches = list(data.batches(0, 0, 1))
    assert [batch["step"] for batch in batches] == list(range(24))
    for N in (4, 6):
        mine = [batch for batch in batches if batch["N"] == N]
        assert [(one["number"], one["part"]) for one in mine] == [divmod(k, 3) for k in range(len(mine))]
        drawn = [data.examples(one, generator()) for one in mine[:3]]
        entries = [set(one.evidence.cross.flatten(1)[:, 0].tolist()) - {0.0} for one in drawn]
        assert not entries[0] & entries[1] and not entries[1] & entries[2]
    again = SimulatedRecordings(SMALL)
    one, other = (source.examples(batches[7], generator(5)) for source in (data, again))
    assert torch.equal(one.J, other.J) and torch.equal(one.evidence.cross, other.evidence.cross)
    assert list(again.batches(9, 0, 1)) == batches[9:]
    rank = SimulatedRecordings(SMALL).examples(batches[7] | {"rank": 1}, generator(5))
    assert rank.J.shape == one.J.shape and not torch.equal(rank.J, one.J)
    held_out, trained = (
        SimulatedRecordings(SMALL).examples(batch, generator(5)) for batch in (data.validation()[0], batches[0])
    )
    assert not {*held_out.J.flatten().tolist()} & {*trained.J.flatten().tolist()} - {0.0}


def test_each_network_is_seen_at_several_lengths():
    data = SimulatedRecordings(replace(SMALL, times=(20, 40), reuse=1, recording_dropout=0.0, batch_entries=640))
    one = data._recordings({"N": 4, "count": 40, "number": 0, "rank": 0}, torch.device("cpu"))
    assert len(one.weights) == 40 and len(one.weights.unique(dim=0)) == 40 // LENGTHS
    traces = one.evidence.eigenvalues.sum(-1).view(LENGTHS, -1)
    assert bool((traces.diff(dim=0) > 0).all())


def test_root_mean_square_gains():
    data = SimulatedRecordings(replace(SMALL, ensembles=(GainMixture(LowRank(0.5), 2.0), Gaussian(0.4))))
    assert data.gains == pytest.approx((0.4, math.sqrt(5.0)))


def test_going_on_is_as_if_never_interrupted(tmp_path, monkeypatch):
    whole = train_posterior(SMALL, tmp_path / "whole", EVERY)
    original = DenoiserModule.on_train_batch_end

    def then(self, *arguments):
        original(self, *arguments)
        if self.global_step == 11:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DenoiserModule, "on_train_batch_end", then)
        train_posterior(SMALL, tmp_path / "cut", replace(EVERY, checkpoint_minutes=1e-6))
    assert (tmp_path / "cut" / "state.safetensors").exists()
    cut = train_posterior(SMALL, tmp_path / "cut", EVERY)
    states = [one.network.state_dict() for one in (whole, cut)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert CFGPosterior.from_pretrained(tmp_path / "cut").config == whole.config
    with pytest.raises(ValueError, match="of another training"):
        train_posterior(replace(SMALL, reuse=2), tmp_path / "cut", EVERY)


def test_the_command_and_its_file(tmp_path, capsys):
    file = tmp_path / "training.toml"
    file.write_text(
        'preset = "tiny"\nsizes = [4]\nsteps = 3\nbatch_entries = 100\ntimes = [10, 30]\nreuse = 2\n'
        '[[ensembles]]\nname = "dale"\ngain = 0.5\ngain_high = 1.5\n'
    )
    config = PosteriorTraining(**read_training(file, PosteriorTraining))
    assert config.times == (10, 30) and config.ensembles == (GainMixture(Dale(0.5), 1.5),)
    command = ["train", "cfg", "--config", str(file), "--out", str(tmp_path / "out"), "--accelerator", "cpu"]
    assert main(command) == 0
    assert "posterior.safetensors: trained, 3 steps" in capsys.readouterr().out
    assert main(command) == 0 and "is trained already" in capsys.readouterr().out
    for k, start in enumerate((tmp_path / "out" / "posterior.safetensors", tmp_path / "out")):
        options = ["--start", str(start), "--out", str(tmp_path / f"next{k}"), "--accelerator", "cpu"]
        assert main([*command[:-4], *options]) == 0
    with pytest.raises(ValueError, match="a training has the fields"):
        read_training(file)


@pytest.mark.parametrize("names", [("dale",), ("dale", "gaussian"), ("block", "dale")])
def test_it_starts_from_a_trained_one_whatever_ensembles_that_knows(names):
    """What it answers to a recording is what the trained one answers, told the ensemble where both know it."""
    ensembles = tuple(make_ensemble(name, 2.0, gain=0.5) for name in names)
    config = replace(SMALL, preset=None, start="base", ensembles=ensembles, sizes=(6,))
    network, there = DenoiserModule(config).network, CFGPosterior.from_pretrained("base").network
    data = SimulatedRecordings(config)
    one = data.examples(next(iter(data.batches(0, 0, 1))), generator())
    sigma = torch.full((len(one.J),), 0.7, dtype=D)
    folded = fold(one.J, sigma, one.evidence)
    told = {name: 1 + k for k, name in enumerate(there.config.families)} if len(names) > 1 else {"dale": 0}
    for mine, name in enumerate(names if len(names) > 1 else ("dale",), start=1 if len(names) > 1 else 0):
        both = [
            evaluate_network(net, folded, sigma, replace(one.told, family=torch.full_like(one.told.family, family)))[0]
            for net, family in ((network, mine), (there, told[name]))
        ]
        torch.testing.assert_close(*both, rtol=1e-4, atol=1e-4)


def test_a_deeper_network_starts_from_a_shallower_one():
    """Its further blocks at first add nothing, and they are not stuck there."""
    config = PriorTraining(ensembles=(Dale(1.5),), sizes=(6,), preset="deep", start="gaussian", batch_entries=72)
    module, there = DenoiserModule(config), load_prior("gaussian").network
    assert len(module.network.blocks) == 6 and len(there.blocks) == 4
    z, u = torch.randn(2, 2, 6, 6, generator=generator())
    torch.testing.assert_close(module.network(z, u, torch.zeros(2)), there(z, u, torch.zeros(2)), rtol=1e-5, atol=1e-5)
    module.network(z, u, torch.zeros(2)).square().mean().backward()
    assert float(module.network.blocks[5].update.weight.grad.abs().max()) > 0


@pytest.mark.parametrize("preset", ["tiny", "small"])  # base is deep
def test_a_start_of_other_sizes(preset):
    with pytest.raises(ValueError, match="must be of the sizes that are to be trained"):
        DenoiserModule(replace(SMALL, preset=preset, start="base"))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"times": (50,)}, "times must be two numbers, the lower one first"),
        ({"noise_std": (1.0, 0.5)}, "noise_std must be two numbers"),
        ({"dt": (0.1, 1.5)}, "dt at most 1"),
        ({"recording_dropout": 1.0}, r"recording_dropout must lie in \[0, 1\)"),
        ({"reuse": 0}, "reuse must be"),
        ({"input_std": -1.0}, "input_std must be"),
    ],
)
def test_trainings_that_cannot_be(changes, match):
    with pytest.raises(ValueError, match=match):
        replace(SMALL, **changes)


@pytest.mark.slow
def test_it_learns_more_of_a_recording_than_a_gaussian_prior_does(tmp_path):
    """Dale's law, N = 8: held-out networks and noise are the same for both, so the differences have a sign."""
    config = PosteriorTraining(
        ensembles=(GainMixture(Dale(0.8), 2.0),), sizes=(8,), preset="tiny", steps=200, batch_entries=6400, warmup=20,
        ema=0.98, times=(30, 200), trials=(1, 4),
    )  # fmt: skip
    posterior = train_posterior(config, tmp_path, TrainingRun(accelerator="cpu", validate_every=100))
    data = SimulatedRecordings(replace(config, seed=1, gain_dropout=0.99, recording_dropout=0.0, reuse=1))
    one = data.examples({"N": 8, "count": 200, "number": 0, "part": 0, "rank": 0}, generator())
    losses = []
    untrained = DenoiserModule(config).network
    for network in (untrained, posterior.network):
        with torch.no_grad():
            sigma = torch.full((len(one.J),), 80.0, dtype=D)
            losses.append(denoising_loss(network, one, sigma, generator(3))[0].numpy())
    gained = losses[0] - losses[1]
    assert gained.mean() > 4 * gained.std() / math.sqrt(len(gained)) and np.mean(losses[1]) < 0.9


# Cubes


def cube_of(folder, ensemble, N):
    settings = {"num_networks": 24, "num_trials": 2, "T": 30, "noise_std": 0.3, "seed": N, "split": (0.75, 0.25, 0.0)}
    return build_dataset(DatasetConfig(folder, N=N, ensemble=ensemble, **settings))


CUBES = PosteriorTraining(
    dataset=("none.nc",), preset="tiny", steps=6, batch_entries=120, warmup=2, ema=0.9, recording_dropout=0.0
)


@pytest.fixture(scope="module")
def cubes(tmp_path_factory):
    return tuple(cube_of(tmp_path_factory.mktemp("cube"), kind, N) for kind, N in zip(KINDS[:2], (4, 6), strict=True))


def test_cubes_give_what_was_recorded(cubes):
    data = CubeRecordings(replace(CUBES, dataset=cubes, gain_dropout=0.0))
    assert data.families == ("gaussian", "dale") and data.sizes == (4, 6)
    of_dale = math.sqrt(6 * Dale(1.0).variance(6))  # the root mean square of gains, over the gain
    assert data.gains == pytest.approx((0.5, 2.0 * of_dale))
    for batch in data.validation():
        path = cubes[batch["cube"]]
        examples = data.examples(batch, generator())
        with xr.open_dataset(path) as cube:
            held_out = cube.isel(network=cube.split.to_numpy() == 1)
            N = held_out.sizes["neuron"]
            for k in range(len(examples.J)):
                one = held_out.isel(network=k)
                statistics = transition_statistics(
                    one.activity.to_numpy(), 0.1, float(one.tau), input=one.input.to_numpy()
                )
                gain = float(one.gain) if N == 4 else float(one.gain) * of_dale
                scale = gain / math.sqrt(N)
                Lambda, B = statistics.precision(0.3)
                folded = fold(torch.zeros(N, N, dtype=D), 1.0, examples.evidence[k]).posterior_mean
                direct = scale * B @ torch.linalg.inv(scale**2 * Lambda + 2 * torch.eye(N, dtype=D))
                torch.testing.assert_close(folded, direct, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(examples.J[k] * scale, torch.from_numpy(one.weights.to_numpy()).double())
        assert (examples.family == 1 + batch["cube"]).all() and bool(examples.told.gain_known.all())


def test_a_training_on_cubes_goes_on_and_is_benchmarked(cubes, tmp_path, capsys):
    command = [
        "train", "cfg", "--dataset", *map(str, cubes), "--preset", "tiny", "--steps", "6", "--batch-entries", "120",
        "--warmup", "2", "--accelerator", "cpu", "--out", str(tmp_path),
    ]  # fmt: skip
    assert main(command) == 0 and main(command) == 0
    assert "is trained already" in capsys.readouterr().out
    posterior = CFGPosterior.from_pretrained(tmp_path)
    assert posterior.families == ("gaussian", "dale") and posterior.config.gains[0] == pytest.approx(0.5)
    benchmark = ["benchmark", "posterior", str(tmp_path), "--N", "5", "--lengths", "20", "--networks", "3"]
    assert main([*benchmark, "--draws", "3", "--steps", "3", "--out", str(tmp_path / "x.nc")]) == 0
    assert "| dale | 5 | 20 |" in capsys.readouterr().out


def test_a_posterior_of_one_ensemble_is_benchmarked_too(cubes, tmp_path, capsys):
    config = replace(CUBES, dataset=cubes[:1])
    train_posterior(config, tmp_path, TrainingRun(accelerator="cpu"))
    benchmark = ["benchmark", "posterior", str(tmp_path), "--N", "5", "--lengths", "20", "--networks", "3"]
    assert main([*benchmark, "--draws", "3", "--steps", "3", "--out", str(tmp_path / "x.nc")]) == 0
    assert "| gaussian | 5 | 20 |" in capsys.readouterr().out


def test_cubes_that_no_posterior_can_be_trained_on(cubes, tmp_path):
    with pytest.raises(ValueError, match="times, reuse are of simulated recordings"):
        replace(CUBES, times=(5, 50), reuse=2)
    with pytest.raises(ValueError, match="either cubes or ensembles"):
        replace(CUBES, ensembles=KINDS)
    with pytest.raises(FileNotFoundError):
        CubeRecordings(CUBES)
    unsaid = tmp_path / "unsaid.nc"
    with xr.open_dataset(cubes[0]) as cube:
        plain = cube.load()
    plain.attrs["config"] = "{}"
    plain.to_netcdf(unsaid)
    with pytest.raises(ValueError, match="does not say which ensemble it is of"):
        CubeRecordings(replace(CUBES, dataset=(unsaid,)))
    assert PosteriorTraining().ensembles and not PosteriorTraining(dataset=("a.nc",)).ensembles
