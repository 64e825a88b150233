"""What a prior is trained on: noise levels, drawn matrices, cubes."""

import math
from dataclasses import replace

import netCDF4
import numpy as np
import pytest
import scipy.stats
import torch
import xarray as xr

from neurosde.cli import main
from neurosde.datasets.build_dataset import DatasetConfig, build_dataset
from neurosde.datasets.ensembles import Block, Dale, GainMixture, Gaussian, LowRank, Sparse
from neurosde.models import training
from neurosde.models.diffusion_prior import load_prior
from neurosde.models.training import DenoiserModule, training_sigmas
from neurosde.models.training_config import PriorTraining
from neurosde.models.training_data import DrawnMatrices, training_data
from neurosde.models.training_run import TrainingRun, train_prior

SMALL = PriorTraining(
    ensembles=(Sparse(1.5, 0.1),), sizes=(4,), preset="tiny", steps=40, batch_entries=160, warmup=5, ema=0.9
)  # fmt: skip
EVERY = TrainingRun(accelerator="cpu", log_every=1, validate_every=10)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# Noise


def mixture(log_sigma, low, high):
    uniform = (log_sigma - low) / (high - low)
    return np.where(log_sigma >= high, 1.0, 0.7 * scipy.stats.norm.cdf((log_sigma - 0.5) / 1.6) + 0.3 * uniform)


def test_noise_levels_are_log_normal_or_log_uniform():
    source = generator()
    sigma = torch.cat([training_sigmas(64, 80.0, source) for _ in range(300)]).numpy()
    low, high = math.log(2e-3), math.log(80.0)
    assert sigma.min() >= 2e-3 * (1 - 1e-12) and sigma.max() <= 80 * (1 + 1e-12)
    clamped = np.mean(sigma >= 80 * (1 - 1e-9))
    expected = 0.7 * scipy.stats.norm.sf((high - 0.5) / 1.6)
    assert abs(clamped - expected) < 4 * math.sqrt(expected / len(sigma))
    inside = np.log(sigma[sigma < 80 * (1 - 1e-9)])
    top = 1 - expected
    assert scipy.stats.kstest(inside, lambda x: mixture(x, low, high) / top).pvalue > 1e-3


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_quantiles_of_a_batch_are_stratified(share, monkeypatch):
    monkeypatch.setattr(training, "UNIFORM_SHARE", share)
    sigma = training_sigmas(50, 1e6, generator()).log()
    low, high = math.log(2e-3), math.log(1e6)
    quantiles = (sigma - low) / (high - low) if share else torch.special.ndtr((sigma - 0.5) / 1.6)
    assert sorted((50 * quantiles).floor().int().tolist()) == list(range(50))
    assert not torch.equal(sigma, sigma.sort().values)


# Drawn matrices

KINDS = [Gaussian(1.2), Dale(0.9), Sparse(1.5, 0.1), LowRank(1.0), Block(1.3), GainMixture(Sparse(0.8, 0.3), 2.0)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{type(kind).__name__}-{kind.name}")
def test_drawn_matrices_have_unit_mean_square(kind):
    data = DrawnMatrices(PriorTraining(ensembles=(kind,), sizes=(10,)))
    examples = data.examples({"N": 10, "count": 2000}, generator())
    J, family = examples.J, examples.family
    squares = J.square().mean((-1, -2))
    assert J.shape == (2000, 10, 10) and J.dtype == torch.float64 and not family.any() and data.families == ()
    assert abs(float(squares.mean()) - 1) < 4 * float(squares.std()) / math.sqrt(2000)
    assert data.sparse == (kind.name == "sparse")


def test_families_are_what_they_are_called():
    kinds = (Gaussian(1.2), Dale(0.9), Sparse(1.5, 0.1))
    data = DrawnMatrices(PriorTraining(ensembles=kinds, sizes=(8, 12)))
    assert data.families == ("gaussian", "dale", "sparse")
    squares = [N * kind.variance(N) for N in (8, 12) for kind in kinds]
    assert data.gain_rms == pytest.approx(math.sqrt(np.mean(squares)))
    firsts = set()
    for seed in range(12):
        examples = data.examples({"N": 12, "count": 31}, generator(seed))
        J, family = examples.J, examples.family
        assert torch.equal(examples.told.family, family) and not examples.evidence.cross.any()
        dale = ((J > 0).all(1) | (J < 0).all(1)).all(-1)
        sparse = (J == 0).double().mean((-1, -2)) > 0.5
        assert torch.equal(family, 1 + dale.long() + 2 * sparse.long())
        counts = family.bincount(minlength=4)[1:]
        assert counts.min() == 10 and counts.max() == 11
        firsts.add(int(counts.argmax()))
    assert firsts == {0, 1, 2}  # what is over goes to each of them
    examples = data.examples({"N": 8, "count": 1}, generator())
    assert len(examples.J) == len(examples.family) == 1


def test_batches_depend_on_seed_step_and_rank_alone():
    config = replace(SMALL, sizes=(4, 6))
    data = training_data(config)
    whole = list(data.batches(0, 0, 1))
    assert [batch["step"] for batch in whole] == list(range(40)) and {batch["N"] for batch in whole} == {4, 6}
    assert list(data.batches(17, 0, 1)) == whole[17:]
    assert [batch["count"] for batch in whole] == [160 // batch["N"] ** 2 for batch in whole]
    half = list(data.batches(0, 1, 2))
    assert [(one["step"], one["N"]) for one in half] == [(one["step"], one["N"]) for one in whole]
    assert all(one["count"] == max(1, 80 // one["N"] ** 2) for one in half)
    module, again, other = (DenoiserModule(one) for one in (config, config, replace(config, seed=1)))
    drawn = [data.examples(whole[3], one._generator(1, *key)).J
             for one, key in ((module, (3, 0)), (again, (3, 0)), (other, (3, 0)), (module, (4, 0)), (module, (3, 1)))
             ]  # fmt: skip
    assert torch.equal(drawn[0], drawn[1]) and not any(torch.equal(drawn[0], one) for one in drawn[2:])
    assert not torch.equal(data.examples(whole[3], module._generator(2, 0)).J, drawn[0])


# Cubes


def cube_of(folder, N, count=40, **options):
    values = {"num_trials": 1, "T": 2, "seed": N, "ensemble": Gaussian(1.5)} | options
    return build_dataset(DatasetConfig(folder, num_networks=count, N=N, **values))


@pytest.fixture(scope="module")
def cubes(tmp_path_factory):
    return tuple(cube_of(tmp_path_factory.mktemp("cube"), N) for N in (4, 6))


def cube_training(*paths, **options):
    return replace(SMALL, **({"dataset": paths, "ensembles": (), "batch_entries": 64} | options))


def weights_of(path, split):
    with xr.open_dataset(path) as cube:
        return torch.from_numpy(cube.weights.to_numpy()[cube.split.to_numpy() == split])


def among(matrix, matrices):
    return any(torch.equal(matrix, one) for one in matrices)


def test_weights_of_cubes(cubes):
    data = training_data(cube_training(*cubes))
    assert data.sizes == (4, 6) and data.gain_rms == pytest.approx(1.5) and not data.sparse
    stored = {N: weights_of(path, 0) for N, path in zip((4, 6), cubes, strict=True)}
    held_out = {N: weights_of(path, 1) for N, path in zip((4, 6), cubes, strict=True)}
    for batch in data.batches(0, 0, 1):
        weights = batch["weights"]
        N = weights.shape[-1]
        assert len(weights) == 64 // N**2
        assert all(among(one, stored[N]) and not among(one, held_out[N]) for one in weights)
        examples = data.examples(batch, generator())
        J, family = examples.J, examples.family
        torch.testing.assert_close(J, weights.double() * math.sqrt(N) / 1.5)
        assert not family.any()
    for batch, N in zip(data.validation(), (4, 6), strict=True):
        assert torch.equal(batch["weights"], held_out[N]) and len(held_out[N])


def test_a_stream_that_is_gone_on_with_is_the_same(cubes):
    config = cube_training(*cubes)
    whole = list(training_data(config).batches(0, 0, 1))
    for start in (0, 1, 13, 30, 39, 40):
        rest = list(training_data(config).batches(start, 0, 1))
        assert [one["step"] for one in rest] == list(range(start, 40))
        assert all(
            torch.equal(one["weights"], other["weights"]) for one, other in zip(rest, whole[start:], strict=True)
        )
    ranks = [list(training_data(config).batches(0, rank, 2)) for rank in (0, 1)]
    assert all(one["weights"].shape == other["weights"].shape for one, other in zip(*ranks, strict=True))
    assert not any(torch.equal(one["weights"], other["weights"]) for one, other in zip(*ranks, strict=True))


def test_several_cubes_of_one_size_and_of_several_gains(cubes, tmp_path):
    other = cube_of(tmp_path / "other", 4, ensemble=Sparse(0.9, 0.2), seed=9)
    config = cube_training(cubes[0], other, steps=12)
    data = training_data(config)
    assert data.sizes == (4, 4) and data.gain_rms == pytest.approx(math.sqrt((1.5**2 + 0.9**2) / 2)) and data.sparse
    prior = train_prior(config, tmp_path / "out", EVERY)
    assert prior.config.sizes == (4,) and prior.config.sparse
    assert load_prior(tmp_path / "out").config == prior.config


def test_cubes_that_will_not_do(cubes, tmp_path, capsys):
    for run, needed in ((EVERY, 62), (replace(EVERY, devices=3), 60)):
        with pytest.raises(ValueError, match=f"fewer than the {needed} of one batch; lower batch_entries"):
            train_prior(cube_training(cubes[0], batch_entries=1000), tmp_path / "refused", run)
        assert not (tmp_path / "refused").exists()
    with pytest.raises(FileNotFoundError, match="no such file"):
        training_data(cube_training(tmp_path / "none.nc"))
    unsplit = cube_of(tmp_path / "unsplit", 4, split=(1.0, 0.0, 0.0))
    with pytest.raises(ValueError, match="has no validation networks"):
        training_data(cube_training(unsplit))
    broken = cube_of(tmp_path / "broken", 4)
    with netCDF4.Dataset(broken, "a") as cube:
        k = int(np.flatnonzero(cube["split"][:] == 0)[5])
        cube["weights"][k, 0, 1] = np.nan
    with pytest.raises(ValueError, match=f"weights of network {k} in .*cube.nc must be finite; got 1 NaN"):
        train_prior(cube_training(broken), tmp_path / "out", EVERY)
    command = [
        "train",
        "prior",
        "--dataset",
        str(broken),
        "--preset",
        "tiny",
        "--batch-entries",
        "160",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert f"weights of network {k}" in error and error.count("\n") == 1
