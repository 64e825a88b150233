"""Evaluating a posterior: against the truth where it is known, and against the recording always."""

from __future__ import annotations

import math
import warnings
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import xarray as xr

from neurosde.datasets.connectome import load_connectome
from neurosde.datasets.files import open_netcdf
from neurosde.evaluation.baselines import baseline_table
from neurosde.evaluation.calibration import (
    LEVELS,
    contraction,
    coverage,
    distance_to_exact,
    truth_under_posterior,
)
from neurosde.evaluation.predictive import predictive_check
from neurosde.evaluation.recovery import recovery
from neurosde.evaluation.report import write_report
from neurosde.models.posterior_file import open_posterior, recording_of
from neurosde.models.recorded import recording_statistics
from neurosde.options import OptionParser
from neurosde.provenance import global_attributes, whole_file


@dataclass(frozen=True)
class Evaluation:
    """Results of an evaluation.

    Attributes:
        tree: the posterior file.
        truth: W (post, pre), or None.
        recovery: a row for the posterior mean and each baseline; None without truth.
        calibration: named numbers on how sure the posterior is.
        coverage: coverage at `LEVELS`, or None without truth.
        predictive: posterior-predictive checks, or None without simulated draws.
    """

    tree: xr.DataTree
    truth: np.ndarray | None
    recovery: pd.DataFrame | None
    calibration: dict[str, float]
    coverage: np.ndarray | None
    predictive: pd.DataFrame | None


def evaluate_posterior(
    posterior: str | Path, truth: str | Path | None = None, network: int | None = None
) -> Evaluation:
    """Evaluate a posterior file.

    Args:
        posterior: file written by `neurosde infer`.
        truth: file of the true weights: a cube, or any matrix file that `load_connectome` reads.
        network: which network of the cube; None takes the one that was inferred.

    Warns where the truth is asked for of another network than the one that was inferred.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unreadable files, or a truth of another size.
    """
    tree = open_posterior(posterior)
    draws = tree["posterior"]["weights"].isel(chain=0).to_numpy()
    closed = tree["closed_form"]
    constants = tree["constant_data"]
    prior_variance = float(constants["prior_variance"])
    mean, factor = closed["mean"].to_numpy(), closed["factor"].to_numpy()
    # A trained posterior has another prior: the exact Gaussian posterior beside it is a baseline, not its target.
    gaussian = tree.attrs["method"] != "cfg" and not tree.attrs.get("refined_by")
    calibration = {"contraction": contraction(draws, prior_variance) if math.isfinite(prior_variance) else math.nan}
    if gaussian:
        calibration |= distance_to_exact(draws, mean, factor)
    predicted = tree["posterior_predictive"]["activity"].isel(chain=0).to_numpy()
    observed = tree["observed_data"]["activity"].to_numpy()
    checks = predictive_check(observed, predicted, float(constants["dt"])) if len(predicted) > 1 else None
    if truth is None:
        return Evaluation(tree, None, None, calibration, None, checks)

    inferred = tree.attrs.get("network")
    W = _read_truth(truth, network if network is not None else inferred)
    if network is not None and inferred is not None and network != inferred:
        warnings.warn(f"{posterior} is of network {inferred}; the truth is of network {network}.", stacklevel=2)
    if W.shape != mean.shape:
        raise ValueError(f"the truth in {truth} must have the posterior's shape {mean.shape}; got {W.shape}.")
    covered = coverage(draws, W)
    calibration |= {
        "coverage_50": float(covered[np.isclose(LEVELS, 0.5)][0]),
        "coverage_90": float(covered[np.isclose(LEVELS, 0.9)][0]),
    }
    if gaussian:
        calibration |= truth_under_posterior(W, mean, factor)
    statistics = recording_statistics(recording_of(tree), estimate_input=bool(tree.attrs["estimate_input"]))
    own = pd.DataFrame(
        [recovery(draws.mean(0), W), recovery(closed["point_estimate"].to_numpy(), W)],
        index=["mean of the draws", f"point estimate ({tree.attrs['method']})"],
    )
    table = pd.concat([own, baseline_table(statistics, W)]).rename_axis("estimate")
    return Evaluation(tree, W, table, calibration, covered, checks)


def results_dataset(evaluation: Evaluation, config: dict[str, str]) -> xr.Dataset:
    """Return the results as a labelled dataset."""
    e = evaluation
    variables: dict[str, xr.DataArray] = {
        name: xr.DataArray(value, attrs={"long_name": name.replace("_", " "), "units": "1"})
        for name, value in e.calibration.items()
    }
    if e.coverage is not None:
        levels = ("level", LEVELS, {"long_name": "nominal level of the central interval", "units": "1"})
        variables["coverage"] = xr.DataArray(
            e.coverage, dims="level", coords={"level": levels}, attrs={"long_name": "coverage", "units": "1"}
        )
    for table in (e.recovery, e.predictive):
        if table is not None:
            for column in table.columns:
                variables[str(column)] = xr.DataArray(
                    table[column].to_numpy(),
                    dims=str(table.index.name),
                    coords={str(table.index.name): list(table.index)},
                    attrs={"long_name": str(column).replace("_", " "), "units": "1"},
                )
    dataset = xr.Dataset(variables)
    dataset.attrs = global_attributes("Evaluation of a posterior over recurrent weights", e.tree.attrs["title"], config)
    return dataset


def as_text(evaluation: Evaluation) -> str:
    """Tables for a terminal."""
    e = evaluation
    parts = []
    if e.recovery is not None:
        parts.append("Recovery of W\n" + e.recovery.to_string(float_format="{:.3f}".format))
    numbers = pd.Series(e.calibration).to_string(float_format="{:.4g}".format)
    parts.append("Calibration\n" + numbers)
    if e.predictive is not None:
        parts.append("Posterior-predictive checks\n" + e.predictive.to_string(float_format="{:.4g}".format))
    if e.tree.attrs["notes"]:
        parts.append("Notes: " + e.tree.attrs["notes"])
    return "\n\n".join(parts)


def add_arguments(parser: OptionParser) -> None:
    """Add the options of `neurosde evaluate`."""
    parser.add_argument("posterior", type=Path, help="posterior written by neurosde infer")
    parser.add_argument("--truth", type=Path, help="true weights: a cube, or a npy, npz, csv or netCDF matrix")
    parser.add_argument("--network", type=int, help="which network of the cube (default: the one inferred)")
    parser.add_argument("--out-dir", type=Path, help="folder of the report (default: POSTERIOR without .nc)")


def run(options: Namespace) -> int:
    """Evaluate, print the tables, write results, figures and report."""
    evaluation = evaluate_posterior(options.posterior, options.truth, options.network)
    folder = options.out_dir or options.posterior.with_suffix("")
    config = {name: str(getattr(options, name)) for name in ("posterior", "truth", "network")}
    print(as_text(evaluation))
    results = results_dataset(evaluation, config)
    with whole_file(folder / "results.nc") as temporary:
        results.to_netcdf(temporary, engine="netcdf4")
    report = write_report(evaluation, folder, results.attrs)
    print(f"\nResults: {folder / 'results.nc'}\nReport:  {report}")
    return 0


def _read_truth(path: str | Path, network: int | None) -> np.ndarray:
    path = Path(path)
    if path.suffix == ".nc":
        with open_netcdf(path) as dataset:
            if "weights" in dataset and "network" in dataset["weights"].dims:
                count = dataset.sizes["network"]
                if network is None and count > 1:
                    raise ValueError(f"{path} holds {count} networks; choose one with --network.")
                if not 0 <= (network or 0) < count:
                    raise ValueError(f"network must lie between 0 and {count - 1} in {path}; got {network}.")
                return dataset["weights"].isel(network=network or 0).to_numpy().astype(np.float64)
    return load_connectome(path, dtype=torch.float64).numpy()
