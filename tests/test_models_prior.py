"""The diffusion prior: its network, its file, its draws, and the command that draws."""

import json
import math
import resource

import pytest
import torch
import xarray as xr
from safetensors import safe_open
from safetensors.torch import save_file

from neurosde.cli import main
from neurosde.models import diffusion_prior, model_files, network_denoiser
from neurosde.models.denoiser import PRESETS, PairNetwork, PairNetworkConfig
from neurosde.models.diffusion_prior import DiffusionPrior, PriorConfig, load_prior
from neurosde.models.edm import Evidence, fold
from neurosde.models.network_denoiser import NetworkDenoiser

D = torch.float64
FAMILIES = ("gaussian", "sparse")


def network_of(families=(), preset="tiny", **options):
    """A network none of whose weights is 0."""
    config = PairNetworkConfig(**{**vars(PRESETS[preset]), "families": families})
    network = PairNetwork(config, **options)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return network


def prior_of(families=(), **options):
    training = {"ensembles": [{"name": "gaussian", "gain": 1.5}], "steps": 3}
    network = network_of(families)
    torch.nn.init.normal_(network.output.weight, std=0.01)  # close to the Gaussian prior, so that draws stay finite
    torch.nn.init.normal_(network.output.bias, std=0.01)
    return DiffusionPrior(network, PriorConfig(network.config, 1.5, (4, 6), training=training, **options))


def inputs_of(count, N, dtype=D):
    z, u = torch.randn(2, count, N, N, dtype=dtype)
    return z, 3 * u, torch.randn(count, dtype=dtype), torch.randint(3, (count,))


def difference(found, expected):
    return float(((found - expected).abs().max() / expected.abs().max()).detach())


@pytest.mark.parametrize("N", [2, 5, 9])
def test_relabelling_neurons_relabels_the_output(N):
    network = network_of(FAMILIES).to(D)
    z, u, log_sigma, family = inputs_of(3, N)
    found = network(z, u, log_sigma, family)
    for _ in range(3):
        order = torch.randperm(N)
        relabelled = network(z[:, order][:, :, order], u[:, order][:, :, order], log_sigma, family)
        assert difference(relabelled, found[:, order][:, :, order]) < 1e-11
    assert float(found.detach().std()) > 0.01


def test_weights_are_directed():
    network = network_of().to(D)
    z, u, log_sigma, _ = inputs_of(2, 6)
    assert difference(network(z.mT, u.mT, log_sigma), network(z, u, log_sigma).mT) > 0.1


def test_rows_and_columns_cannot_be_exchanged_each_on_its_own():
    """The relabelling is of neurons: the diagonal is theirs."""
    network, order = network_of().to(D), torch.tensor([1, 2, 0, 4, 3])
    z, u, log_sigma, _ = inputs_of(2, 5)
    assert difference(network(z[:, order], u[:, order], log_sigma), network(z, u, log_sigma)[:, order]) > 0.01


def test_a_batch_is_a_loop():
    network = network_of(FAMILIES).to(D)
    inputs = inputs_of(5, 4)
    alone = torch.cat([network(*(value[k : k + 1] for value in inputs)) for k in range(5)])
    assert difference(network(*inputs), alone) < 1e-11


def test_every_input_matters():
    network = network_of(FAMILIES).to(D)
    z, u, log_sigma, family = inputs_of(2, 4)
    found = network(z, u, log_sigma, family)
    for other in ((-z, u, log_sigma, family), (z, -u, log_sigma, family), (z, u, log_sigma + 1, family),
                  (z, u, log_sigma, (family + 1) % 3)):  # fmt: skip
        assert difference(network(*other), found) > 1e-3
    assert torch.equal(network(z, u, log_sigma), network(z, u, log_sigma, torch.zeros(2, dtype=torch.long)))


@pytest.mark.parametrize("N", [3, 20])
def test_an_untrained_network_is_the_gaussian_priors_denoiser(N):
    denoise = NetworkDenoiser(PairNetwork(PRESETS["tiny"]))
    for sigma in (2e-3, 1.0, 80.0):
        x = (1 + sigma) * torch.randn(4, N, N, dtype=D)
        expected = fold(x, sigma, Evidence.none(N)).posterior_mean
        torch.testing.assert_close(denoise(x, torch.tensor(sigma)), expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(expected, x / (1 + sigma**2), rtol=1e-12, atol=0)


def test_large_matrices():
    network = network_of()
    with torch.no_grad():
        found = network(*inputs_of(1, 200, torch.float32)[:3])
    assert found.shape == (1, 200, 200) and bool(found.isfinite().all())


def test_recomputing_activations_leaves_gradients_as_they_are():
    network, inputs = network_of(FAMILIES).to(D), inputs_of(2, 6)
    gradients = {}
    for above in (5, 6):
        network.checkpoint_above = above
        network.zero_grad()
        network(*inputs).square().mean().backward()
        gradients[above] = [parameter.grad.clone() for parameter in network.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(*gradients.values(), strict=True))
    assert all(float(gradient.abs().max()) > 0 for gradient in gradients[5])


@pytest.mark.parametrize(
    ("sizes", "match"),
    [({"products": 4}, "multiple of 3"), ({"width": 9, "heads": 2}, "one of heads"), ({"blocks": 0}, "at least 1")],
)
def test_sizes_that_do_not_fit(sizes, match):
    with pytest.raises(ValueError, match=match):
        PairNetworkConfig(**sizes)


# The file


def state_of(prior):
    return prior.network.state_dict()


def test_a_file_holds_all_of_it(tmp_path):
    prior = prior_of(FAMILIES, sigma_max=90.0, sparse=True)
    path = prior.save(tmp_path / "prior.safetensors")
    for place in (path, str(path), tmp_path):
        again = load_prior(place)
        assert again.config == prior.config and again.device == torch.device("cpu")
        assert all(torch.equal(value, state_of(prior)[name]) for name, value in state_of(again).items())
        assert not again.network.training
    with safe_open(path, "pt") as stored:
        assert json.loads(stored.metadata()["config"])["gain_rms"] == 1.5
        assert {"neurosde_version", "git_commit"} <= stored.metadata().keys()
    assert [one.name for one in tmp_path.iterdir()] == ["prior.safetensors"]


def test_float16_rounds(tmp_path):
    prior = prior_of()
    small = prior.save(tmp_path / "small.safetensors", torch.float16)
    again = state_of(load_prior(small))
    for name, value in state_of(prior).items():
        assert again[name].dtype == torch.float32
        torch.testing.assert_close(again[name], value, rtol=2**-11, atol=2**-24)
    assert small.stat().st_size < 0.6 * prior.save(tmp_path / "large.safetensors").stat().st_size


def header_of(path):
    with safe_open(path, "pt") as stored:
        return stored.metadata(), {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118


def test_what_is_no_prior_is_refused(tmp_path):
    path = prior_of().save(tmp_path / "prior.safetensors")
    header, tensors = header_of(path)
    config = json.loads(header["config"])
    bad = tmp_path / "bad.safetensors"

    def refused(match):
        with pytest.raises(ValueError, match=match) as caught:
            load_prior(bad)
        assert str(bad) in str(caught.value)

    whole = path.read_bytes()
    for content in (b"", b"weights", whole[: len(whole) // 2], whole[:100]):
        bad.write_bytes(content)
        refused("not a safetensors file, or is damaged")
    save_file(tensors, bad)
    refused("not a prior of neurosde")
    save_file(tensors, bad, header | {"format": "neurosde-training"})
    refused("not a prior of neurosde")
    save_file(tensors, bad, header | {"format_version": "7", "neurosde_version": "9.9"})
    refused(r"version 7, of neurosde 9\.9; neurosde \S+ reads 1\.")
    save_file(tensors, bad, {"format": header["format"]})
    refused("format version None")
    for other in (
        {**config, "network": {**config["network"], "channels": 8}},
        {**config, "network": {**config["network"], "layers": 8}},
        {**config, "colour": "red"},
        {"network": config["network"]},
        {},
    ):
        save_file(tensors, bad, header | {"config": json.dumps(other)})
        refused("does not hold the network that its header describes")
    save_file(tensors, bad, header | {"config": "{"})
    refused("does not hold the network")
    save_file({name: value for name, value in tensors.items() if name != "output.bias"}, bad, header)
    refused("does not hold the network")


def test_names_of_priors(tmp_path, monkeypatch):
    monkeypatch.setitem(model_files._FOLDER, "prior", tmp_path)
    prior_of().save(tmp_path / "gaussian.safetensors")
    assert load_prior("gaussian").config.gain_rms == 1.5
    with pytest.raises(FileNotFoundError, match=r"neither a file nor one of the priors \['gaussian'\]"):
        load_prior("dale")
    unfinished = tmp_path / "out"
    unfinished.mkdir()
    (unfinished / "state.safetensors").touch()
    with pytest.raises(FileNotFoundError, match="not trained yet; go on with neurosde train prior"):
        load_prior(unfinished)


def test_writing_that_fails_leaves_nothing(tmp_path):
    prior = prior_of()
    with pytest.raises(ValueError, match=r"NAME\.safetensors; got"):
        prior.save(tmp_path / "prior.pt")
    path = prior.save(tmp_path / "prior.safetensors")
    whole = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # as a full disk
    try:
        with pytest.raises(OSError, match="could not write .*prior.safetensors"):
            prior_of().save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [one.name for one in tmp_path.iterdir()] == ["prior.safetensors"] and path.read_bytes() == whole
    with pytest.raises(OSError, match="there is a file where its folder should be"):
        prior.save(path / "prior.safetensors")


def test_devices(tmp_path):
    path = prior_of().save(tmp_path / "prior.safetensors")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, which this shows the want of")
    for device in ("cuda", "abacus"):
        with pytest.raises(ValueError, match=f"such as cpu; got {device}"):
            load_prior(path, device)


# Draws


def test_the_same_seed_gives_the_same_draws():
    prior = prior_of(FAMILIES)
    one, again, other = (prior.sample(3, 5, steps=4, generator=seed) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert one.shape == (3, 5, 5) and one.dtype == D and not one.requires_grad
    told = prior.sample(3, 5, steps=4, generator=1, family="sparse")
    assert not torch.equal(told, one)


@pytest.mark.filterwarnings("ignore:this prior was trained with")
@pytest.mark.parametrize(("N", "steps", "levels"), [(6, None, 28), (50, None, 28), (100, None, 56), (100, 9, 9)])
def test_more_neurons_have_more_levels(N, steps, levels, monkeypatch):
    sigmas = []
    monkeypatch.setattr(NetworkDenoiser, "__call__", lambda self, x, sigma: sigmas.append(sigma) or 0 * x)
    prior_of().sample(1, N, steps=steps, generator=0)
    assert len(sigmas) == levels and sigmas[0] == 80


def test_draws_of_an_untrained_prior_are_gaussian():
    """Of the network's prior, iid N(0, g²/N)."""
    prior = DiffusionPrior(PairNetwork(PRESETS["tiny"]), PriorConfig(PRESETS["tiny"], 1.5, (6,)))
    squares = prior.sample(400, 6, steps=8, method="multistep", generator=0).square() * 6 / 1.5**2
    assert abs(float(squares.mean()) - 1) < 4 * math.sqrt(2 / squares.numel())


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"N": 1}, ValueError, "N must be at least 2; got 1"),
        ({"N": 0}, ValueError, "N must be at least 2; got 0"),
        ({"N": 2.5}, TypeError, "N must be an integer; got 2.5"),
        ({"num": 0}, ValueError, "num must be at least 1"),
        ({"steps": 1}, ValueError, "steps must be at least 2"),
        ({"method": "euler"}, ValueError, "method must be one of"),
        ({"family": "dale"}, ValueError, r"family must be one of \['gaussian', 'sparse'\]; got 'dale'"),
    ],
)
def test_draws_that_cannot_be(options, error, match):
    with pytest.raises(error, match=match):
        prior_of(FAMILIES).sample(**({"num": 2, "N": 5} | options))


def test_a_prior_of_one_ensemble_takes_no_family():
    with pytest.raises(ValueError, match="takes no family; got 'gaussian'. Leave it out"):
        prior_of().sample(2, 5, family="gaussian")


@pytest.mark.parametrize("N", [2, 3, 12, 13])
def test_sizes_far_from_those_of_the_training(N, recwarn):
    """Sizes 4 and 6 were trained with."""
    prior_of().sample(1, N, steps=2, generator=0)
    warned = [str(one.message) for one in recwarn]
    assert len(warned) == (N == 13)
    assert all("trained with 4 to 6 neurons; what it draws for N = 13 is untested" in one for one in warned)


def test_only_priors_of_sparse_ensembles_draw_zeros(monkeypatch):
    monkeypatch.setattr(diffusion_prior, "sample", lambda *_, **__: torch.full((1, 4, 4), 0.001, dtype=D))
    assert float(prior_of(sparse=True).sample(1, 4).abs().max()) == 0
    assert float(prior_of().sample(1, 4).abs().max()) == 0.001 * 1.5 / 2


@pytest.mark.parametrize(("family", "drawn"), [(None, 0.0), ("sparse", 0.0), ("mine", 0.0), ("dale", 0.001 * 1.5 / 2)])
def test_a_prior_that_is_told_a_family_without_zeros_draws_none(family, drawn, monkeypatch):
    monkeypatch.setattr(diffusion_prior, "sample", lambda *_, **__: torch.full((1, 4, 4), 0.001, dtype=D))
    prior = prior_of(("dale", "sparse", "mine"), sparse=True)
    assert float(prior.sample(1, 4, family=family).abs().max()) == drawn


@pytest.mark.parametrize(
    ("families", "trained", "family", "signed"),
    [
        (("dale", "gaussian"), ["dale", "gaussian"], "dale", True),
        (("dale", "gaussian"), ["dale", "gaussian"], "gaussian", False),
        (("dale", "gaussian"), ["dale", "gaussian"], None, False),
        ((), ["dale"], None, True),
        ((), ["gaussian"], None, False),
        ((), [], None, False),
    ],
)
def test_columns_of_priors_that_know_of_dales_law_have_one_sign(families, trained, family, signed, monkeypatch):
    J = torch.tensor([[[1.0, -1.0], [-0.001, 0.001]]], dtype=D)
    monkeypatch.setattr(diffusion_prior, "sample", lambda *_, **__: J)
    network = network_of(families)
    training = {"ensembles": [{"name": name} for name in trained]}
    prior = DiffusionPrior(network, PriorConfig(network.config, 1.0, (2, 4), training=training))
    W = prior.sample(1, 2, family=family) * math.sqrt(2)
    assert torch.equal((W * W.sum(-2, keepdim=True) > 0).all(), torch.tensor(signed))
    assert difference(W.abs(), J.abs()) < 1e-15


@pytest.mark.parametrize("preset", ["tiny", "spectral"])
def test_without_gradients_the_network_says_the_same(preset):
    """Memory is reused then, and all else is alike."""
    network = network_of(FAMILIES, preset).to(D)
    z, u = torch.randn(2, 3, 7, 7, dtype=D)
    inputs = (z, u, torch.tensor([-3.0, 0.0, 2.0], dtype=D), torch.tensor([0, 1, 2]))
    expected = network(*inputs)
    kept = [one.clone() for one in inputs]
    with torch.no_grad():
        found = network(*inputs)
    assert difference(found, expected.detach()) < 1e-12
    assert all(torch.equal(one, before) for one, before in zip(inputs, kept, strict=True))


def test_what_blocks_add_to_is_kept_in_full_precision():
    network = network_of()
    P, H, condition = torch.randn(16, 2, 5, 5), torch.randn(2, 5, 32), torch.randn(2, 32)
    with torch.autocast("cpu", torch.bfloat16):
        found = network.blocks[0](P, H, condition)
    assert [one.dtype for one in found] == [torch.float32, torch.float32]


def test_chunks_and_leading_axes(monkeypatch):
    prior = prior_of(FAMILIES)
    prior.network.to(D)
    denoise = prior.denoiser("sparse")
    x, sigma = torch.randn(2, 3, 4, 4, dtype=D), torch.tensor([0.1, 1.0, 30.0], dtype=D)
    found = denoise(x, sigma)
    alone = torch.stack([torch.stack([denoise(one, s) for one, s in zip(row, sigma, strict=True)]) for row in x])
    assert found.shape == x.shape and difference(found, alone) < 1e-12
    same = denoise(x, torch.tensor(0.5))
    assert difference(same, denoise(x, torch.full((2, 3), 0.5))) < 1e-12
    assert difference(same, torch.stack([denoise(row, torch.full((3,), 0.5)) for row in x])) < 1e-12
    for entries in (1, 33, 50):
        monkeypatch.setitem(network_denoiser._CHUNK, "cpu", entries)
        assert difference(denoise(x, sigma), found) < 1e-12


def test_a_gpu_that_is_too_small(monkeypatch):
    denoise = prior_of().denoiser()

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(denoise.network, "answer", full)
    with pytest.raises(MemoryError, match="too small for matrices of 4 x 4; sample on the CPU"):
        denoise(torch.zeros(1, 4, 4), torch.tensor(1.0))


# The command


def test_the_command_writes_a_cube(tmp_path, capsys):
    prior_of().save(tmp_path / "prior.safetensors")
    out = tmp_path / "new" / "draws.nc"
    command = ["sample", "prior", str(tmp_path), "--N", "5", "--num", "3", "--steps", "4", "--seed", "7"]
    assert main([*command, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 3 matrices of 5 neurons\n"
    with xr.open_dataset(out) as cube:
        assert cube.weights.dims == ("network", "post", "pre") and cube.sizes == {"network": 3, "post": 5, "pre": 5}
        assert all({"units", "long_name"} <= array.attrs.keys() for array in cube.variables.values())
        config = json.loads(cube.attrs["config"])
        assert cube.attrs["seed"] == 7 and config["seed"] == 7 and config["steps"] == 4 and config["N"] == 5
        assert config["ensemble"] == {"name": "gaussian", "gain": 1.5} and config["training"]["steps"] == 3
        expected = load_prior(tmp_path).sample(3, 5, steps=4, generator=7).float()
        assert torch.equal(torch.from_numpy(cube.weights.to_numpy()), expected)
    assert main(["info", str(out)]) == 0
    said = capsys.readouterr().out
    assert "network 3 x post 5 x pre 5" in said and "gaussian (gain = 1.5)" in said
    assert main(["plot", str(out), "--out", str(tmp_path / "draws.png")]) == 2
    error = capsys.readouterr().err
    assert "must hold activity(network, …)" in error and error.count("\n") == 1
    assert main(["train", "prior", "--dataset", str(out), "--out", str(tmp_path / "again")]) == 2
    assert "is not a whole cube" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["missing"], "missing is neither a file nor one of the priors"),
        (["{}", "--N", "1"], "N must be at least 2; got 1"),
        (["{}", "--out", "draws.csv"], "must be a netCDF file"),
        (["{}", "--N", "6", "--family", "dale"], "takes no family"),
        (["{}", "--device", "abacus"], "such as cpu; got abacus"),
    ],
)
def test_the_command_says_what_is_wrong(options, match, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = prior_of().save(tmp_path / "prior.safetensors")
    assert main(["sample", "prior", *(option.format(path) for option in options)]) == 2
    error = capsys.readouterr().err
    assert match in error and error.count("\n") == 1
    assert [one.name for one in tmp_path.iterdir()] == ["prior.safetensors"]
