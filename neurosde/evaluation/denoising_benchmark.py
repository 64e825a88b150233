"""`neurosde benchmark denoising`: how far a trained prior is from the best denoiser there is, where that is known.

The best denoiser D* is E[J | J_s], so that a denoiser D errs by E‖D − J‖² = E‖D* − J‖² + E‖D − D*‖². The excess is the
last term over the one before, for each number of neurons and each noise level. D* is known for Gaussian weights of
unknown gain (quadrature over it), for sparse ones and Dale's law (the same), and for low-rank structure in a Gaussian
background (Gibbs sampling, whose Monte-Carlo error is taken out of both terms).
"""

from __future__ import annotations

import math
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm import tqdm

from neurosde.datasets.ensemble_options import ensemble_from_config
from neurosde.datasets.ensembles import Ensemble
from neurosde.evaluation.timing import hardware
from neurosde.models.analytic_low_rank import SpikedDenoiser
from neurosde.models.best_denoiser import best_denoiser
from neurosde.models.diffusion_prior import DiffusionPrior, load_prior
from neurosde.models.edm import Denoiser
from neurosde.options import OptionParser, add_options, from_options
from neurosde.provenance import global_attributes, whole_file
from neurosde.validation import check_count, check_positive

_CHUNK = 2_000_000  # matrix entries at a time; Gibbs chains hold eight times as many


@dataclass(frozen=True)
class DenoisingBenchmark:
    """What to denoise."""

    sizes: tuple[int, ...] = field(default=(10, 20, 30, 50, 100), metadata={"help": "neurons", "flags": ("--N",)})
    sigmas: tuple[float, ...] = field(
        default=(0.003, 0.03, 0.1, 0.3, 1.0, 2.0, 4.0, 8.0, 20.0), metadata={"help": "noise levels"}
    )
    matrices: int = field(default=200, metadata={"help": "matrices per cell of the table"})
    family: str | None = field(default=None, metadata={"help": "ensemble, for a prior of several"})
    seed: int = field(default=0, metadata={"help": "seed"})

    def __post_init__(self) -> None:
        for N in self.sizes:
            check_count(N, "N", 2)
        for sigma in self.sigmas:
            check_positive(sigma, "sigmas")
        check_count(self.matrices, "matrices", 2)
        check_count(self.seed, "seed", 0)


def trained_ensemble(prior: DiffusionPrior, family: str | None) -> Ensemble:
    """Return the ensemble that a prior was trained on; of several, that of the family.

    Raises:
        ValueError: it was trained on cubes, or on several ensembles and no family is given.
    """
    known = {kind["name"]: kind for kind in prior.config.training.get("ensembles", ())}
    if family is None and len(known) == 1:
        family = next(iter(known))
    if family not in known:
        raise ValueError(f"name one of the ensembles {sorted(known)} that the prior was trained on; got {family!r}.")
    ensemble = ensemble_from_config({"ensemble": known[family]})
    if ensemble is None:
        raise ValueError(f"the prior does not say what its ensemble {family} is.")
    return ensemble


def denoising_benchmark(prior: DiffusionPrior, config: DenoisingBenchmark, checkpoint: str = "") -> xr.Dataset:
    """Measure the excess error of a prior.

    Returns:
        `excess` and its `standard_error`, and `best`, the mean square error of an entry by the best denoiser over that
        of the Gaussian prior's; each (neurons, sigma).

    Raises:
        ValueError: the best denoiser is not known for what the prior was trained on.
    """
    c = config
    ensemble = trained_ensemble(prior, c.family)
    family = c.family if prior.config.network.families else None
    trained = prior.denoiser(family)
    best = best_denoiser(ensemble, prior.config.gain_rms)
    found = np.empty((3, len(c.sizes), len(c.sigmas)))
    with tqdm(total=found[0].size, unit="cell", disable=None) as progress:
        for i, N in enumerate(c.sizes):
            source = torch.Generator(prior.device).manual_seed(c.seed)
            J = ensemble.sample_weights(c.matrices, N, source) / prior.scale(N)
            for j, sigma in enumerate(c.sigmas):
                x = J + sigma * torch.randn(J.shape, generator=source, dtype=J.dtype, device=J.device)
                parts = [
                    _errors(trained, best, *part, sigma)
                    for part in zip(J.split(max(1, _CHUNK // N**2)), x.split(max(1, _CHUNK // N**2)), strict=True)
                ]
                excess, floor = torch.cat([part.cpu() for part in parts], dim=-1).numpy()
                ratio = excess.mean() / floor.mean()
                error = (excess - ratio * floor).std(ddof=1) / math.sqrt(c.matrices) / floor.mean()
                found[:, i, j] = ratio, error, floor.mean() * (1 + sigma**-2)
                progress.update()
    dims, names = ("neurons", "sigma"), ("excess", "standard_error", "best")
    about = ("excess error over the best denoiser", "standard error of the excess", "best error over the Gaussian one")
    dataset = xr.Dataset(
        {
            name: (dims, values, {"long_name": text, "units": "1"})
            for name, values, text in zip(names, found, about, strict=True)
        },
        coords={"neurons": list(c.sizes), "sigma": list(c.sigmas)},
    )
    dataset.attrs = global_attributes(
        "Excess denoising error of a prior",
        f"{checkpoint}, {c.matrices} matrices per cell. {hardware(device=prior.device)}",
        c,
        c.seed,
    )
    return dataset


def _errors(trained: Denoiser, best: Denoiser, J: Tensor, x: Tensor, sigma: float) -> Tensor:
    """Mean square of D − D* and of D* − J over the entries of each matrix, (2, matrix), less the error of D* itself."""
    s = torch.tensor(sigma, dtype=torch.float64, device=x.device)
    noise: Tensor | float = 0.0
    with torch.no_grad():
        if isinstance(best, SpikedDenoiser):
            optimal, noise = best.with_error(x, s)
        else:
            optimal = best(x, s)
        pair = (trained(x, s) - optimal, optimal - J)
    return torch.stack([difference.square().mean((-1, -2)) - noise for difference in pair])


def markdown_table(results: xr.Dataset) -> str:
    """Excess in per cent, a row per number of neurons."""
    lines = ["| N | " + " | ".join(f"σ = {sigma:g}" for sigma in results["sigma"].values) + " |"]
    lines.append("|---" * (1 + results.sizes["sigma"]) + "|")
    for N in results["neurons"].values:
        row = results.sel(neurons=N)
        cells = [
            f"{100 * value:.2f} ± {100 * error:.2f}"
            for value, error in zip(row["excess"].values, row["standard_error"].values, strict=True)
        ]
        lines.append(f"| {N} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def add_arguments(parser: OptionParser) -> None:
    """Add the options of `neurosde benchmark denoising`."""
    parser.add_argument("checkpoint", help="a trained prior: file, folder, or the name of one that comes along")
    add_options(parser, DenoisingBenchmark)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument(
        "--out", type=Path, default=Path("results/denoising.nc"), help="data (default results/denoising.nc)"
    )
    parser.set_defaults(run=run)


def run(options: Namespace) -> int:
    """Run the benchmark, print its table, write its data."""
    config = from_options(DenoisingBenchmark, options)
    prior = load_prior(options.checkpoint, options.device)
    results = denoising_benchmark(prior, config, options.checkpoint)
    with whole_file(options.out) as temporary:
        results.to_netcdf(temporary, engine="netcdf4")
    print(f"Excess denoising error of {options.checkpoint}, per cent of the best denoiser's error\n")
    print(markdown_table(results))
    print(
        f"\n{config.matrices} matrices per cell, ± standard error; {hardware(device=prior.device)}\nData: {options.out}"
    )
    return 0
