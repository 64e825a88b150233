"""`neurosde benchmark refinement`: refiners beside the exact posterior, where prior and posterior are known.

A network of Gaussian, and one of sparse weights, both of a known gain, is recorded, and draws of its prior are refined
by each method, which has the prior's exact denoiser: what is left is the method's own error. Rows of W are independent
given the recording, so that a classifier tells draws of a row from exact ones in N dimensions.

- C2ST: its accuracy, mean over rows; ½ at best, with a standard error of ½/√(2 draws) a row.
- variance: the least and the largest ratio to the exact posterior's along an eigenvector of Λ, mean over rows.

The first row of each cell is a second set of exact draws. Sequential Monte Carlo begins from noise, row by row, with
two particles for each draw.

Results are written after every row, and a command that is given again goes on after the rows that are there.
"""

from __future__ import annotations

import math
import time
import warnings
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm import tqdm

from neurosde.datasets.ensembles import FixedGain, Gaussian, Sparse
from neurosde.evaluation.c2st import c2st
from neurosde.evaluation.kept_rows import KeptRows
from neurosde.evaluation.posterior_benchmark import network_seed, simulated
from neurosde.evaluation.timing import hardware
from neurosde.models.analytic import SpikeAndSlabDenoiser
from neurosde.models.edm import Denoiser, Evidence
from neurosde.models.exact_posterior import CHAINS, exact_posterior
from neurosde.models.guided_diffusion import GUIDANCES, Guidance, GuidedDiffusion
from neurosde.models.recorded import recording_evidence
from neurosde.models.split_gibbs import SplitGibbs
from neurosde.models.twisted_smc import TwistedSMC
from neurosde.options import OptionParser, add_options, from_options
from neurosde.provenance import global_attributes
from neurosde.validation import check_count, check_positive, check_time_step

METHODS = {
    "exact": "exact posterior, once more",
    "dps": "DPS, likelihood gradient",
    "pigdm": "ΠGDM",
    "mmps": "MMPS",
    "gibbs": "split Gibbs",
    "tds": "TDS (SMC)",
}
METRICS = {
    "c2st": ("accuracy of a classifier between draws and exact draws", "1"),
    "least_variance": ("least variance along a direction over the exact one", "1"),
    "largest_variance": ("largest variance along a direction over the exact one", "1"),
}
COSTS = {"evaluations": ("evaluations of the denoiser for each draw", "1"), "seconds": ("time that refining took", "s")}
PRIORS = ("gaussian", "sparse")
OVERSAMPLED = 2  # particles for each draw
START = 80.0  # noise that guided draws begin with: nothing of the prior's is left


@dataclass(frozen=True)
class RefinementBenchmark:
    """What to refine, and by what."""

    priors: tuple[str, ...] = field(default=PRIORS, metadata={"help": f"of {', '.join(PRIORS)}"})
    lengths: tuple[int, ...] = field(default=(100, 1000), metadata={"help": "times of the recording"})
    methods: tuple[str, ...] = field(default=tuple(METHODS), metadata={"help": f"of {', '.join(METHODS)}"})
    N: int = field(default=10, metadata={"help": "neurons; at most 10, to which sparse posteriors are summed up"})
    rows: int = field(default=4, metadata={"help": "rows of W that are compared"})
    draws: int = field(default=2000, metadata={"help": "draws"})
    gain: float = field(default=1.5, metadata={"help": "gain of the network, which is known"})
    density: float = field(default=0.2, metadata={"help": "density of sparse weights, which is known"})
    sweeps: int = field(default=160, metadata={"help": "sweeps of split Gibbs"})
    steps: int = field(default=64, metadata={"help": "noise levels of guided diffusion and SMC"})
    noise_std: float = field(default=0.3, metadata={"help": "noise sigma, which is known"})
    dt: float = field(default=0.1, metadata={"help": "step, in units of tau"})
    seed: int = field(default=0, metadata={"help": "seed"})

    def __post_init__(self) -> None:
        for name, known in (("priors", PRIORS), ("methods", tuple(METHODS))):
            if unknown := sorted(set(getattr(self, name)) - set(known)):
                raise ValueError(f"{name} must be of {', '.join(known)}; got {', '.join(unknown)}.")
        for T in self.lengths:
            check_count(T, "length", 3)
        if check_count(self.N, "N", 2) > 10:
            raise ValueError(f"N must be at most 10, where the exact posterior is summed up; got {self.N}.")
        if check_count(self.rows, "rows") > self.N:
            raise ValueError(f"rows must be at most N = {self.N}; got {self.rows}.")
        if check_count(self.draws, "draws", 2 * CHAINS) % CHAINS:
            raise ValueError(f"draws must be a multiple of {CHAINS}, the number of chains; got {self.draws}.")
        check_count(self.sweeps, "sweeps", 8)
        check_count(self.steps, "steps", 2)
        check_positive(self.gain, "gain")
        check_positive(self.noise_std, "noise_std")
        check_time_step(self.dt)

    @property
    def unit(self) -> float:
        """Unit s₀ of draws, g/√N."""
        return self.gain / math.sqrt(self.N)

    def prior(self, name: str) -> tuple[FixedGain, Denoiser]:
        """An ensemble, and its denoiser in J units, of any rows of a matrix."""
        if name == "gaussian":
            return Gaussian(self.gain), SpikeAndSlabDenoiser(1.0, 1.0)
        return Sparse(self.gain, density=self.density), SpikeAndSlabDenoiser(self.density, 1 / self.density)


def refinement_benchmark(config: RefinementBenchmark, out: Path | None = None) -> xr.Dataset:
    """Run the benchmark, or what is left of it.

    Args:
        config: what to run.
        out: file that is written after every row, and whose rows, if it is there, are not run again.

    Returns:
        Each of `METRICS` (prior, times, method, row) and of `COSTS` (prior, times, method), NaN where a method
        diverged; and `condition` of each recording (prior, times).
    """
    c = config
    shape = (len(c.priors), len(c.lengths), len(c.methods))
    dims = ("prior", "times", "method")
    data: dict[str, Any] = {
        key: ((*dims, "row"), np.full((*shape, c.rows), np.nan), _label(*about)) for key, about in METRICS.items()
    }
    data |= {key: (dims, np.full(shape, np.nan), _label(*about)) for key, about in COSTS.items()}
    condition = _label("largest over smallest eigenvalue of the precision", "1")
    data["condition"] = (dims[:2], np.full(shape[:2], np.nan), condition)
    empty = xr.Dataset(data, {"prior": list(c.priors), "times": list(c.lengths), "method": list(c.methods)})
    empty.attrs = global_attributes(
        "Refined draws beside the exact posterior", f"{c.draws} draws. {hardware()}", c, c.seed
    )
    kept = KeptRows(empty, dims, out)
    with tqdm(total=math.prod(shape), unit="row", disable=None) as progress:
        for i, name in enumerate(c.priors):
            for j, T in enumerate(c.lengths):
                missing = [k for k in range(shape[2]) if kept.missing(prior=i, times=j, method=k)]
                progress.update(shape[2] - len(missing))
                if not missing:
                    continue
                cell = _cell(name, T, c)
                for k in missing:
                    kept.add(_row(c.methods[k], cell, c), prior=i, times=j, method=k)
                    progress.update()
    return kept.results


@dataclass(frozen=True)
class _Cell:
    """A recorded network, its prior and its posterior; draws in units of s₀."""

    ensemble: FixedGain
    denoise: Denoiser
    evidence: Evidence
    exact: Tensor
    key: tuple[int, ...]


def _cell(name: str, T: int, c: RefinementBenchmark) -> _Cell:
    ensemble, denoise = c.prior(name)
    key = (c.seed, PRIORS.index(name), c.N, T)
    source = torch.Generator().manual_seed(network_seed(*key))
    _, statistics = simulated(ensemble, 1, c.N, T, trials=1, noise_std=c.noise_std, dt=c.dt, generator=source)
    noise = torch.tensor([statistics[0].noise_scale(c.noise_std)], dtype=torch.float64)
    evidence = recording_evidence(statistics).over_noise(noise.square())
    exact = exact_posterior(ensemble, evidence, c.draws, seed=c.seed).weights[:, 0] / c.unit
    return _Cell(ensemble, denoise, evidence, exact, key)


def _row(method: str, cell: _Cell, c: RefinementBenchmark) -> dict[str, Any]:
    """Return what a method costs and how far it is off; nothing but the condition where it diverged."""
    began = time.perf_counter()
    values: dict[str, Any] = {"condition": float(cell.evidence.eigenvalues.max() / cell.evidence.eigenvalues.min())}
    if method == "exact":
        again = exact_posterior(cell.ensemble, cell.evidence, c.draws, seed=c.seed + 1).weights[:, 0] / c.unit
        found: tuple[Tensor, int] | None = (again, 0)
    else:
        source = torch.Generator().manual_seed(network_seed(*cell.key, list(METHODS).index(method)))
        start = cell.ensemble.sample_weights(c.draws, c.N, source) / c.unit
        found = _refined(method, cell.denoise, start, cell.evidence.scaled(c.unit)[0], c)
    if found is not None:
        values |= {"seconds": time.perf_counter() - began, "evaluations": found[1]}
        values |= _compared(found[0], cell.exact, cell.evidence[0], c)
    return values


def _refined(
    method: str, denoise: Denoiser, start: Tensor, evidence: Evidence, c: RefinementBenchmark
) -> tuple[Tensor, int] | None:
    """Draws, of the rows that are compared at least, and evaluations; None where the method diverges for any."""
    if method == "tds":
        smc = TwistedSMC(denoise, OVERSAMPLED * c.draws // CHAINS, CHAINS, c.steps)
        rows = []
        for i in range(c.rows):
            row = Evidence(evidence.eigenvalues, evidence.vectors, evidence.cross[i : i + 1])
            rows.append(smc.sample(row, c.seed + i).draws(c.draws, c.seed)[:, 0])
        return torch.stack(rows, 1), OVERSAMPLED * c.steps
    if method in GUIDANCES:
        refiner: SplitGibbs | GuidedDiffusion = GuidedDiffusion(denoise, cast(Guidance, method), c.steps, START)
    else:
        refiner = SplitGibbs(denoise, c.sweeps)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the table says that it diverges
            found = refiner.refine(start, evidence, c.seed)
    except FloatingPointError:
        return None
    return None if bool(found.diverged.any()) else (found.draws, found.evaluations)


def _compared(found: Tensor, exact: Tensor, evidence: Evidence, c: RefinementBenchmark) -> dict[str, np.ndarray]:
    """Metrics of each row, shape (row,)."""
    assert evidence.vectors is not None
    found, exact = found[:, : c.rows], exact[:, : c.rows]
    ratio = ((found @ evidence.vectors).var(0) / (exact @ evidence.vectors).var(0)).numpy()
    told = [c2st(exact[:, i].numpy(), found[:, i].numpy(), seed=c.seed).accuracy for i in range(c.rows)]
    return {"c2st": np.array(told), "least_variance": ratio.min(-1), "largest_variance": ratio.max(-1)}


def _label(long_name: str, units: str) -> dict[str, str]:
    return {"long_name": long_name, "units": units}


def markdown_table(results: xr.Dataset) -> str:
    """A row per prior, length and method: means over rows of W."""
    head = ["prior", "T", "condition", "method", "C2ST", "variance", "evaluations", "s"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in results["prior"].values:
        for T in results["times"].values:
            for method in results["method"].values:
                cell = results.sel({"prior": name, "times": T, "method": method}).mean("row")
                start = [str(name), str(T), f"{float(cell['condition']):.0f}", METHODS[str(method)]]
                if math.isnan(float(cell["c2st"])):
                    lines.append(f"| {' | '.join([*start, 'diverged', '', '', ''])} |")
                    continue
                variance = f"{float(cell['least_variance']):.2f} … {float(cell['largest_variance']):.2f}"
                costs = [f"{float(cell['evaluations']):.0f}", f"{float(cell['seconds']):.1f}"]
                lines.append(f"| {' | '.join([*start, f'{float(cell.c2st):.3f}', variance, *costs])} |")
    return "\n".join(lines)


def add_arguments(parser: OptionParser) -> None:
    """Add the options of `neurosde benchmark refinement`."""
    add_options(parser, RefinementBenchmark)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("results/refinement-benchmark.nc"),
        help="data; rows in it are kept (default results/refinement-benchmark.nc)",
    )
    parser.set_defaults(run=run)


def run(options: Namespace) -> int:
    """Run the benchmark, print its table, write its data."""
    config = from_options(RefinementBenchmark, options)
    results = refinement_benchmark(config, options.out)
    print(markdown_table(results))
    print(f"\n{config.draws} draws, {config.rows} rows; {hardware()}\nData: {options.out}")
    return 0
