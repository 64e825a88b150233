"""The benchmark beside exact posteriors, by methods that are exact and by ones that are not."""

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr

from neurosde.cli import main
from neurosde.evaluation import exact_benchmark as module
from neurosde.evaluation.c2st import TwoSampleTest
from neurosde.evaluation.exact_benchmark import METHODS, RESOLUTION, ExactBenchmark, exact_benchmark, markdown_table
from neurosde.models.denoiser import PRESETS, PairNetwork
from neurosde.models.diffusion_cfg import CFGPosterior, PosteriorConfig

FAMILIES = ("gaussian", "sparse", "low-rank", "block")


@pytest.fixture
def untrained():
    """A posterior that has learnt nothing: exact for Gaussian weights of a known gain, and for no others."""
    torch.manual_seed(0)
    network = PairNetwork(replace(PRESETS["tiny"], families=FAMILIES, recordings=True))
    training = {"ensembles": [{"name": name, "gain": 0.5, "gain_high": 1.5} for name in FAMILIES]}
    return CFGPosterior(network, PosteriorConfig(network.config, 1.0, (5,), 80.0, False, training, gains=(0.5, 2.0)))


def test_with_the_gain_known_gaussian_methods_are_exact(untrained):
    c = ExactBenchmark(sizes=(4,), families=("gaussian",), gain=1.2, length=60, networks=4, draws=1000, thin=1, steps=6)
    found = exact_benchmark(untrained, c).squeeze(["ensemble", "neurons"])
    means = found.mean("network")
    # The exact means have the Monte-Carlo error of no draws at all: given gain and structure, W's mean is explicit.
    np.testing.assert_allclose(found["to_exact"].sel({"method": ["exact", "gaussian"]}), 0, atol=1e-9)
    np.testing.assert_allclose(found["to_exact"].sel({"method": "cfg"}), 0, atol=1e-3)
    drawn = means.sel({"method": ["exact", "cfg", "gaussian"]})
    # 1000 draws of 4 networks' 4 rows, where one direction may have all the variance; of both samples; of a root, half.
    np.testing.assert_allclose(drawn["sd"], 1, atol=4 * math.sqrt(2 * 2 / 1000 / 16) / 2)
    # Per network and direction, of 4 rows: √2 · √(2/4000), and the most extreme of 16.
    np.testing.assert_allclose(found["least_variance"].sel({"method": drawn.method}), 1, atol=5 * math.sqrt(2 / 2000))
    np.testing.assert_allclose(found["largest_variance"].sel({"method": drawn.method}), 1, atol=5 * math.sqrt(2 / 2000))
    np.testing.assert_allclose(drawn["c2st"], 0.5, atol=4 * math.sqrt(0.25 / 2000 / 4))
    for method in ("cfg", "gaussian"):
        np.testing.assert_allclose(
            found["log_score"].sel({"method": method}), found["log_score"].sel({"method": "exact"}), atol=1e-6
        )
    assert np.isnan(found["sd"].sel({"method": "ridge"})).all() and not np.isnan(found["error"]).any()
    table = markdown_table(exact_benchmark(untrained, ExactBenchmark(
        sizes=(4,), families=("gaussian",), gain=1.2, methods=("ridge",), length=60, networks=2, draws=16, thin=1
    )))  # fmt: skip
    assert table.splitlines()[2].startswith(f"| gaussian | 4 | {METHODS['ridge']} | ")
    assert table.splitlines()[2].endswith(" |  |  |  |  |")


def test_the_score_of_an_unknown_gain_is_an_average_over_gains(untrained, monkeypatch):
    """Against multivariate normal densities, weighted by their evidence, on a fine grid of gains."""
    cells, of_cell = [], module._mixture_score
    monkeypatch.setattr(module, "_mixture_score", lambda cell: cells.append(cell) or of_cell(cell))
    N, gains = 3, 0.5 + (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    c = ExactBenchmark(sizes=(N,), families=("gaussian",), methods=("exact",), length=40, networks=3, draws=16)
    found = exact_benchmark(untrained, c)["log_score"].squeeze()
    (cell,) = cells
    for k in range(3):
        U = cell.evidence.vectors[k]
        precision, cross = U @ torch.diag(cell.evidence.eigenvalues[k]) @ U.mT, cell.evidence.cross[k] @ U.mT
        v = (gains.square() / N)[:, None, None]
        C = torch.linalg.inv(precision + torch.eye(N, dtype=torch.float64) / v)
        log_evidence = 0.5 * (cross @ C * cross).sum((-1, -2)) + N / 2 * (C.logdet() - N * v.squeeze().log())
        blur = cell.resolution[k] ** 2 * torch.eye(N, dtype=torch.float64)
        of_rows = torch.distributions.MultivariateNormal(cross @ C, (C + blur).unsqueeze(1))
        density = log_evidence.log_softmax(0) + of_rows.log_prob(cell.blurred[k]).sum(-1)
        assert float(found[k]) == pytest.approx(float(density.logsumexp(0)) / N**2, abs=1e-5)
    torch.testing.assert_close(cell.blurred, cell.truth, atol=6 * RESOLUTION * 2 / math.sqrt(N), rtol=0)


def test_sparse_weights_are_told_from_a_gaussian_posterior(untrained):
    c = ExactBenchmark(sizes=(5,), families=("sparse",), methods=("exact", "gaussian"), networks=6, draws=400, thin=2)
    found = exact_benchmark(untrained, c).squeeze(["ensemble", "neurons"]).mean("network")
    assert (
        float(found["c2st"].sel({"method": "exact"})) < 0.53 and float(found["c2st"].sel({"method": "gaussian"})) > 0.7
    )
    assert float(found["error"].sel({"method": "exact"})) < float(found["error"].sel({"method": "gaussian"}))
    assert float(found["monte_carlo_error"]) < 0.1


def test_the_command(untrained, tmp_path, capsys, monkeypatch):
    """But for the classifier, whose findings other tests are about."""
    monkeypatch.setattr(module, "c2st", lambda *_, **__: TwoSampleTest(0.5, 0.1))
    untrained.save(tmp_path / "posterior.safetensors")
    out = tmp_path / "exact.nc"
    command = ["benchmark", "exact", str(tmp_path), "--N", "3", "--networks", "2", "--draws", "16", "--steps", "3"]
    assert main([*command, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "| low-rank | 3 | trained posterior | " in text and "Monte-Carlo error of exact means" in text
    with xr.open_dataset(out) as results:
        assert results["c2st"].sizes == {"ensemble": 3, "neurons": 1, "method": 4, "network": 2}
        assert results["error"].attrs["long_name"] == "relative error of the posterior mean"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--draws", "17"], "draws must be a multiple of 8"),
        (["--methods", "exact", "magic"], "methods must be of exact, cfg"),
        (["--families", "block", "--N", "5"], "known of gaussian, sparse and low-rank weights; got 'block'"),
        (["--families", "dale"], "families must be of the ensembles"),
    ],
)
def test_wrong_options_are_answered_in_a_line(untrained, tmp_path, capsys, options, message):
    untrained.save(tmp_path / "posterior.safetensors")
    command = ["benchmark", "exact", str(tmp_path), "--N", "3", "--networks", "2", "--draws", "16", "--steps", "3"]
    assert main([*command, *options, "--out", str(tmp_path / "x.nc")]) == 2
    assert message in capsys.readouterr().err


def test_without_sbi_its_methods_say_how_to_get_it(untrained, monkeypatch):
    monkeypatch.setitem(sys.modules, "sbi", None)
    with pytest.raises(ImportError, match=r"pip install 'neurosde\[sbi\]'"):
        exact_benchmark(untrained, ExactBenchmark(sizes=(3,), methods=("npe",)))
