"""Splitting matrices by their singular values, and networks that see it."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from neurosde.datasets.ensembles import LowRank
from neurosde.models import graphed_network
from neurosde.models.denoiser import PRESETS, PairNetwork, PairNetworkConfig
from neurosde.models.graphed_network import GraphedNetwork
from neurosde.models.model_files import load_network
from neurosde.models.spectral import spectrum
from neurosde.models.training import DenoiserModule
from neurosde.models.training_config import PriorTraining

D = torch.float64
THRESHOLDS = (2.5, 4.2, 6.5)


def of_singular_values(squares, N, seed=0):
    """Matrices with these squared singular values over N, the rest of them 0."""
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(N, N, generator=generator, dtype=D))[0] for _ in range(2))
    values = torch.zeros(N, dtype=D)
    values[: len(squares)] = (N * torch.tensor(squares, dtype=D)).sqrt()
    return U @ torch.diag(values) @ V.mT, U, V


def test_parts_above_a_threshold_are_those_of_the_singular_value_decomposition():
    N, squares = 20, (9.0, 5.2, 3.4, 1.5)
    Z, U, V = of_singular_values(squares, N)
    found = spectrum(Z.unsqueeze(0), THRESHOLDS)
    for k, c in enumerate(THRESHOLDS):
        r = sum(square > c for square in squares)
        left, right = U[:, :r] @ U[:, :r].mT, V[:, :r] @ V[:, :r].mT
        # 0.8 away from a threshold a step whose slope there is 1.5¹⁴/(2L), L < 11, is as good as one.
        torch.testing.assert_close(found.above[0, k], left @ Z, rtol=0, atol=1e-9)
        torch.testing.assert_close(found.projections[0, k], N**0.5 * left, rtol=0, atol=1e-9)
        torch.testing.assert_close(found.projections[0, len(THRESHOLDS) + k], N**0.5 * right, rtol=0, atol=1e-9)
        assert float(found.counts[0, k]) == pytest.approx(r, abs=1e-9)


def test_at_a_threshold_a_singular_value_counts_half():
    Z, _, _ = of_singular_values((THRESHOLDS[1],), 8)
    assert spectrum(Z.unsqueeze(0), THRESHOLDS).counts[0].tolist() == pytest.approx([1, 0.5, 0], abs=1e-9)


def test_single_precision_follows_double_for_matrices_of_any_size_and_spread():
    generator = torch.Generator().manual_seed(0)
    for scale in (0.0, 0.1, 1.0, 30.0):
        Z = scale * torch.randn(2, 60, 60, generator=generator, dtype=D)
        single, double = spectrum(Z.float(), THRESHOLDS), spectrum(Z, THRESHOLDS)
        assert bool((double.counts > -1e-9).all() and (double.counts < 60 + 1e-9).all())
        assert bool(single.above.isfinite().all())
        # Rounding moves eigenvalues by up to 1e-7 of the largest, and thus counts by the step's slope there.
        slope = 1.5**14 / (2 * max(THRESHOLDS[0], 4 * scale**2))
        assert float((single.counts - double.counts).abs().max()) < 60 * slope * 1e-6 * max(1.0, 4 * scale**2)


def test_rotations_of_either_side_are_followed():
    generator = torch.Generator().manual_seed(1)
    Z = 1.3 * torch.randn(3, 15, 15, generator=generator, dtype=D)
    Q, R = (torch.linalg.qr(torch.randn(15, 15, generator=generator, dtype=D))[0] for _ in range(2))
    here, there = spectrum(Z, THRESHOLDS), spectrum(Q @ Z @ R.mT, THRESHOLDS)
    torch.testing.assert_close(there.above, Q @ here.above @ R.mT)
    torch.testing.assert_close(there.projections[:, :3], Q @ here.projections[:, :3] @ Q.mT)
    torch.testing.assert_close(there.projections[:, 3:], R @ here.projections[:, 3:] @ R.mT)
    torch.testing.assert_close(there.counts, here.counts)


def test_derivatives_are_those_of_finite_differences():
    Z = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(2), dtype=D, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: tuple(vars(spectrum(x, (1.0,))).values()), (Z,), atol=1e-5)


def awake(config: PairNetworkConfig, seed=0) -> PairNetwork:
    """A network whose every weight matters."""
    torch.manual_seed(seed)
    network = PairNetwork(config).double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network


def test_relabelling_neurons_relabels_what_a_network_with_thresholds_says():
    network = awake(replace(PRESETS["tiny"], thresholds=THRESHOLDS))
    generator = torch.Generator().manual_seed(3)
    z, u = 2 * torch.randn(2, 2, 9, 9, generator=generator, dtype=D)
    order, sigma = torch.randperm(9, generator=generator), torch.tensor([-1.0, 1.0], dtype=D)
    moved = [x[:, order][:, :, order] for x in (z, u)]
    torch.testing.assert_close(network(*moved, sigma), network(z, u, sigma)[:, order][:, :, order])
    blind = replace(network.config, thresholds=())
    state = {name: value for name, value in network.state_dict().items() if not name.startswith("spectral")}
    other = PairNetwork(blind).double()
    other.load_state_dict(state)
    assert float((other(z, u, sigma) - network(z, u, sigma)).detach().abs().max()) > 0.01


def test_a_network_with_thresholds_starts_from_one_without():
    config = PriorTraining(ensembles=(LowRank(1.5),), sizes=(6,), preset="spectral", start="gaussian", batch_entries=72)
    network, start = DenoiserModule(config).network, load_network("gaussian")
    assert network.config.thresholds and not start.config.thresholds
    z, u = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(4))
    sigma = torch.tensor([-2.0, 0.0, 2.0])
    torch.testing.assert_close(network(z, u, sigma), start(z, u, sigma))
    with pytest.raises(ValueError, match="must be of the sizes that are to be trained"):
        DenoiserModule(replace(config, preset="tiny"))


def test_thresholds_must_be_positive():
    with pytest.raises(ValueError, match="thresholds"):
        PairNetworkConfig(thresholds=(2.0, -1.0))


def test_a_gpu_too_small_to_record_passes_makes_them_as_they_are(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(graphed_network, "Replay", full)
    network = PairNetwork(PRESETS["tiny"])
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    z, u = torch.randn(2, 5, 6, 6)
    inputs = (z, u, torch.randn(5), torch.zeros(5, dtype=torch.long))
    replayed = GraphedNetwork(network)
    with torch.no_grad():
        expected = network.answer(*inputs, None, None)[0]
        for _ in range(6):
            torch.testing.assert_close(replayed._replayed((5, 6, 6, 0), inputs, 0)[0], expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("preset", ["tiny", "spectral"])
def test_replayed_passes_give_the_gradients_of_the_network_itself(preset):
    torch.manual_seed(0)
    network = PairNetwork(PRESETS[preset]).cuda()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    replayed = GraphedNetwork(network)
    for N in (6, 11, 6):
        z, u = torch.randn(2, 5, N, N, device="cuda")
        sigma, family = torch.randn(5, device="cuda"), torch.zeros(5, dtype=torch.long, device="cuda")
        gradients = []
        for one in (replayed, network):
            F = one.answer(z, u, sigma, family, None, one.split(z))[0]
            F.square().sum().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
            network.zero_grad(set_to_none=True)
            del F
        here, there = gradients
        assert float((here - there).norm()) < 0.05 * float(there.norm())  # TF32 has 10 bits


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("preset", ["tiny", "spectral"])
def test_replayed_passes_without_gradients_are_those_of_the_network_itself(preset):
    torch.manual_seed(0)
    network = PairNetwork(PRESETS[preset]).cuda().eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    replayed, kept = GraphedNetwork(network), []
    with torch.no_grad():
        for N in (6, 6, 7, 6, 6, 8, 7, 7, 9, 8, 8, 9, 9, 10, 10, 10, 10, 6, 6, 6, 6):  # more shapes than are kept
            z, u = torch.randn(2, 5, N, N, device="cuda")
            sigma, family = torch.randn(5, device="cuda"), torch.zeros(5, dtype=torch.long, device="cuda")
            kept.append([one.answer(z, u, sigma, family, None, one.split(z))[0] for one in (replayed, network)])
    for here, there in kept:  # results stay when others are made
        torch.testing.assert_close(here, there)
