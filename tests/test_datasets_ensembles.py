"""Ensembles: moments, spectra, structure; connectomes from files."""

import numpy as np
import pytest
import torch
import xarray as xr

from neurosde.datasets import (
    Block,
    Dale,
    GainMixture,
    Gaussian,
    LowRank,
    Sparse,
    load_connectome,
    make_ensemble,
    sample_weight_matrix,
)

ALL = [
    Gaussian(1.3),
    Dale(1.3),
    Dale(0.9, excitatory_fraction=0.7, balance=1.5),
    Sparse(1.3, density=0.1),
    LowRank(1.0, rank=3, strength=0.8),
    Block(1.3, num_blocks=3, contrast=4.0),
    GainMixture(Gaussian(0.8), 2.0),
    GainMixture(Dale(0.8), 2.0),
]


@pytest.mark.parametrize("ensemble", ALL, ids=repr)
def test_variance_is_the_mean_square_of_an_entry(ensemble):
    N, draws = 30, 400
    generator = torch.Generator().manual_seed(0)
    mean_squares = np.array([float(ensemble.sample(N, generator).weights.square().mean()) for _ in range(draws)])
    standard_error = mean_squares.std() / draws**0.5
    assert abs(mean_squares.mean() - ensemble.variance(N)) < 4 * standard_error


@pytest.mark.parametrize("ensemble", [Gaussian(1.3), Sparse(1.3, 0.2), Block(1.3, 4, 3.0)], ids=repr)
def test_gain_is_the_radius_of_the_spectrum(ensemble):
    """Circular law: finite-size fluctuations of the radius are of order sqrt(log N / N), 8 % at N = 400."""
    eigenvalues = np.linalg.eigvals(ensemble.sample(400, torch.Generator().manual_seed(0)).weights.numpy())
    assert np.abs(eigenvalues).max() == pytest.approx(1.3, rel=0.1)


def test_dale_columns_have_one_sign_and_balance():
    draw = Dale(1.5, excitatory_fraction=0.8).sample(50, torch.Generator().manual_seed(0))
    assert draw.cell_type.tolist() == [1] * 40 + [-1] * 10
    assert bool((draw.weights * draw.cell_type >= 0).all())
    many = torch.stack([Dale(1.5).sample(50, torch.Generator().manual_seed(k)).weights for k in range(200)])
    row_sums = many.sum(-1)  # the mean of 200 × 50 sums of zero mean
    assert abs(float(row_sums.mean())) < 4 * float(row_sums.std()) / row_sums.numel() ** 0.5
    # The bulk: without the columns' means the entries have the variance that the gain says.
    centred = many - many.mean((0, 1))
    assert float(centred.square().sum(-1).mean()) == pytest.approx(1.5**2, rel=0.02)


def test_sparse_density_and_exact_zeros():
    weights = torch.stack([Sparse(1.0, 0.2).sample(40, torch.Generator().manual_seed(k)).weights for k in range(50)])
    share = float((weights != 0).double().mean())
    assert share == pytest.approx(0.2, abs=4 * (0.2 * 0.8 / weights.numel()) ** 0.5)


def test_low_rank_adds_that_many_large_singular_values():
    weights = LowRank(0.5, rank=2, strength=2.0).sample(200, torch.Generator().manual_seed(0)).weights
    singular = torch.linalg.svdvals(weights)
    assert singular[1] > 3 * singular[2]


def test_block_contrast():
    draw = Block(1.0, num_blocks=2, contrast=5.0).sample(60, torch.Generator().manual_seed(0))
    same = draw.block[:, None] == draw.block
    assert float(draw.weights[same].std() / draw.weights[~same].std()) == pytest.approx(5, rel=0.1)


def test_gain_mixture_spans_its_range():
    draws = [GainMixture(Gaussian(0.5), 2.0).sample(5, torch.Generator().manual_seed(k)).gain for k in range(200)]
    assert min(draws) >= 0.5 and max(draws) <= 2.0 and max(draws) - min(draws) > 1.4


def test_sample_weight_matrix_is_seeded():
    W = sample_weight_matrix(20, 1.2, ensemble="sparse", density=0.5, generator=3)
    assert W.shape == (20, 20) and W.dtype == torch.float32
    assert torch.equal(W, sample_weight_matrix(20, 1.2, ensemble="sparse", density=0.5, generator=3))
    assert torch.equal(W, sample_weight_matrix(20, ensemble=Sparse(1.2, 0.5), generator=3))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: make_ensemble("ring"), "ensemble must be one of"),
        (lambda: make_ensemble("gaussian", density=0.1), r"parameters \['gain'\]; got \['density'\]"),
        (lambda: Sparse(1.0, 0.0), "density must lie in"),
        (lambda: Dale(1.0, 1.0), "excitatory_fraction must lie strictly"),
        (lambda: Dale(1.0).sample(1), "N >= 2"),
        (lambda: Block(1.0, num_blocks=9).sample(4), "at least as many neurons"),
        (lambda: Gaussian(-1.0), "gain must be positive"),
        (lambda: GainMixture(Gaussian(2.0), 1.0), "gain_high must be at least"),
        (lambda: sample_weight_matrix(0), "N must be at least 1"),
        (lambda: sample_weight_matrix(5, ensemble=Sparse(), density=0.3), "brings its own parameters"),
    ],
)
def test_bad_parameters_are_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_connectome_from_every_kind_of_file(tmp_path):
    W = np.random.default_rng(0).normal(size=(6, 6))
    np.save(tmp_path / "a.npy", W)
    np.savez(tmp_path / "a.npz", weights=W, other=np.ones(3))
    np.savetxt(tmp_path / "bare.csv", W, delimiter=",")
    names = [f"n{k}" for k in range(6)]
    with open(tmp_path / "named.csv", "w") as handle:
        print("", *names, sep=",", file=handle)
        for name, row in zip(names, W, strict=True):
            print(name, *row, sep=",", file=handle)
    xr.Dataset({"weights": (("post", "pre"), W)}).to_netcdf(tmp_path / "a.nc")
    for name in ("a.npy", "a.npz", "bare.csv", "named.csv", "a.nc"):
        read = load_connectome(tmp_path / name, dtype=torch.float64)
        np.testing.assert_allclose(read, W, rtol=1e-12, err_msg=name)
    scaled = load_connectome(tmp_path / "a.npy", spectral_radius=1.5, transpose=True, dtype=torch.float64)
    assert np.abs(np.linalg.eigvals(scaled.numpy())).max() == pytest.approx(1.5)
    assert np.corrcoef(scaled.numpy().ravel(), W.T.ravel())[0, 1] == pytest.approx(1)


def test_an_adjacency_matrix_of_integers_is_no_header(tmp_path):
    (tmp_path / "ring.csv").write_text("0,1,2\n2,0,1\n1,2,0\n")
    np.testing.assert_array_equal(load_connectome(tmp_path / "ring.csv"), [[0, 1, 2], [2, 0, 1], [1, 2, 0]])


def test_bad_connectomes_are_named(tmp_path):
    np.save(tmp_path / "flat.npy", np.ones((3, 4)))
    np.save(tmp_path / "nan.npy", np.full((3, 3), np.nan))
    np.save(tmp_path / "acyclic.npy", np.triu(np.ones((5, 5)), 1))
    np.savez(tmp_path / "two.npz", a=np.ones((2, 2)), b=np.ones((2, 2)))
    (tmp_path / "words.csv").write_text("a,b\nx,y\n")
    (tmp_path / "broken.nc").write_bytes(b"not a file")
    (tmp_path / "W.mat").write_bytes(b"")
    (tmp_path / "W.txt").write_text("0 1")
    for name, match in [
        ("flat.npy", r"flat.npy must be square .*\(3, 4\)"),
        ("nan.npy", "finite; got 9"),
        ("two.npz", "name the one to read"),
        ("words.csv", "must hold numbers"),
        ("broken.nc", "not a readable netCDF"),
        ("W.mat", "not a readable MATLAB file"),
        ("W.txt", "must be one of .nc"),
    ]:
        with pytest.raises(ValueError, match=match):
            load_connectome(tmp_path / name)
    with pytest.raises(ValueError, match="no loops"):
        load_connectome(tmp_path / "acyclic.npy", spectral_radius=1.0)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_connectome(tmp_path / "none.npy")
    with pytest.raises(ValueError, match="got variable 'c'"):
        load_connectome(tmp_path / "two.npz", variable="c")
