"""`neurosde evaluate prior`: are sampled weight matrices of the law that their ensemble has?"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from neurosde.datasets.ensemble_options import (
    add_ensemble_options,
    ensemble_from_config,
    ensemble_from_options,
    given_parameters,
    plain_parameters,
)
from neurosde.datasets.ensembles import Ensemble
from neurosde.datasets.shards import open_cube
from neurosde.evaluation.prior_comparison import MIN_SETS, PriorEvaluation, evaluate_prior
from neurosde.evaluation.weight_statistics import check_matrices
from neurosde.options import OptionParser
from neurosde.provenance import global_attributes, whole_file
from neurosde.validation import check_count

FRESH = 1  # second word of the spawn key: no fresh draw is one of build-dataset's networks of the same seed


def fresh_sets(
    ensemble: Ensemble, shape: tuple[int, int, int], repeats: int, seed: int, dtype: np.dtype | None = None
) -> Iterator[np.ndarray]:
    """Draw sets of matrices of an ensemble, one after the other.

    Args:
        ensemble: what to draw from.
        shape: of each set, (network, post, pre).
        repeats: number of sets.
        seed: set r depends on the seed and r alone.
        dtype: of the matrices, float64 by default.
    """
    for r in range(repeats):
        (word,) = np.random.SeedSequence(seed, spawn_key=(r, FRESH)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(word >> np.uint64(1)))
        drawn = np.empty(shape, dtype or np.float64)
        for k in range(shape[0]):
            drawn[k] = ensemble.sample(shape[1], generator).weights.numpy()
        yield drawn


def as_text(result: PriorEvaluation) -> str:
    """Tables for a terminal."""
    table = result.table.drop(columns=["distance", "floor"])
    beyond = table["ratio"] > table["null_95"]
    table["beyond"] = np.where(beyond, "*", "")
    test = result.c2st
    found = (
        f"{test.accuracy:.3f} ± {test.standard_error:.3f} (0.5: indistinguishable)"
        if result.tests
        else f"needs more matrices than {result.count}"
    )
    return "\n\n".join(
        [
            "Wasserstein distance of samples to fresh draws, over that among fresh draws (1: the same law)\n"
            + table.to_string(float_format="{:.4g}".format),
            f"{int(beyond.sum())} of {len(table)} are beyond what 95 % of fresh sets show (*); 5 % would be by chance.",
            "Mean ratio\n" + result.summary.to_string(float_format="{:.4g}".format),
            f"Classifier two-sample test, accuracy: {found}",
        ]
    )


def results_dataset(result: PriorEvaluation, config: dict[str, Any]) -> xr.Dataset:
    """Return the results as a labelled dataset."""
    names = list(result.samples.per_matrix)
    meanings = {
        "ratio": "Wasserstein-1 distance of samples to fresh sets over that among fresh sets",
        "standard_error": "standard deviation of the ratio where a fresh set is taken for the samples",
        "null_95": "bound that 95 % of the ratios of further fresh sets stay below",
        "distance": "mean Wasserstein-1 distance of samples to a fresh set",
        "floor": "mean Wasserstein-1 distance between fresh sets",
        "sampled": "mean in the samples",
        "fresh": "mean in the fresh sets",
    }
    variables: dict[str, tuple[Any, ...]] = {
        name: ("statistic", result.table[name].to_numpy(), _about(meaning)) for name, meaning in meanings.items()
    }
    for name in result.summary.columns:
        label = f"{name.replace('_', ' ')} of the ratio averaged over statistics"
        variables[f"mean_{name}"] = ("kind", result.summary[name].to_numpy(), _about(label))
    variables |= {
        "sampled_value": (("network", "per_matrix"), result.samples.table(), _about("statistics of each sample")),
        "fresh_value": (
            ("fresh_set", "network", "per_matrix"),
            np.stack([one.table() for one in result.fresh]),
            _about("statistics of each fresh draw"),
        ),
        "c2st_accuracy": ((), result.c2st.accuracy, _about("mean accuracy of a classifier two-sample test")),
        "c2st_standard_error": ((), result.c2st.standard_error, _about("binomial standard error of the accuracy")),
    }
    if result.tests:
        accuracies = [one.accuracy for one in result.tests]
        variables["c2st"] = ("fresh_set", accuracies, _about("accuracy against each fresh set"))
    dataset = xr.Dataset(
        variables,
        {
            "statistic": list(result.table.index),
            "kind_of_statistic": ("statistic", list(result.table["kind"])),
            "kind": list(result.summary.index),
            "per_matrix": names,
        },
    )
    summary = f"{result.count} sampled matrices against {len(result.fresh)} sets of as many fresh draws."
    dataset.attrs = global_attributes("Sampled weights against fresh draws", summary, config, config["seed"])
    return dataset


def add_arguments(parser: OptionParser) -> None:
    """Add the options of `neurosde evaluate prior`."""
    parser.add_argument("samples", type=Path, metavar="SAMPLES", help="cube of sampled weights(network, post, pre)")
    parser.add_argument("--reference", type=Path, metavar="CUBE", help="cube of held-out draws, instead of fresh ones")
    parser.add_argument("--repeats", type=int, default=8, help="number of fresh sets (default 8)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the fresh draws (default 0)")
    parser.add_argument("--out-dir", type=Path, metavar="PATH", help="folder of results (default SAMPLES without .nc)")
    add_ensemble_options(parser, default=None)


def run(options: Namespace) -> int:
    """Compare, print the tables, write results and figures."""
    from neurosde.evaluation.prior_figures import figures  # here, since matplotlib is slow to import

    check_count(options.repeats, "repeats", MIN_SETS)
    check_count(options.seed, "seed", 0)
    path = options.samples
    samples, config = read_weights(path)
    ensemble = _ensemble(options, config)
    if ensemble is not None:
        sets = fresh_sets(ensemble, samples.shape, options.repeats, options.seed, samples.dtype)
        source = f"draws of the ensemble {_describe(ensemble)}"
    else:
        reference, config = read_weights(options.reference)
        ensemble = ensemble_from_config(config)
        samples, sets, source = _split(samples, reference, options)
    result = evaluate_prior(samples, sets, seed=options.seed)
    print(f"{len(samples)} samples against {len(result.fresh)} sets of {source}\n\n{as_text(result)}")
    folder = options.out_dir or (path.with_suffix("") if path.suffix == ".nc" else path.with_name(f"{path.name}-prior"))
    config = {name: getattr(options, name) for name in ("samples", "reference", "repeats", "seed")}
    if ensemble is not None:
        config["ensemble"] = plain_parameters(ensemble)
    with whole_file(folder / "results.nc") as temporary:
        results_dataset(result, config).to_netcdf(temporary, engine="netcdf4")
    for name, figure in figures(result, _gains(ensemble)).items():
        with whole_file(folder / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=150)
    print(f"\nResults: {folder / 'results.nc'}\nFigures: {folder}/spectra.png, matrices.png, statistics.png")
    return 0


def read_weights(path: str | Path) -> tuple[np.ndarray, dict[str, Any]]:
    """Read the weights of a cube, shape (network, post, pre), and its configuration.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: no cube, no such weights, fewer than two networks, or values that are not finite.
    """
    with open_cube(path) as cube:
        if "weights" not in cube or set(cube["weights"].dims) != {"network", "post", "pre"}:
            raise ValueError(f"{path} must hold weights(network, post, pre); got {sorted(map(str, cube.data_vars))}.")
        weights = cube["weights"].transpose("network", "post", "pre").to_numpy()
        text = str(cube.attrs.get("config", "{}"))
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"the attribute config of {path} must be JSON; got {text[:40]!r}.") from error
    return check_matrices(weights, str(path)), config if isinstance(config, dict) else {}


def _ensemble(options: Namespace, config: dict[str, Any]) -> Ensemble | None:
    """The ensemble to draw from; None where a reference is given."""
    given = sorted(given_parameters(options))
    if options.ensemble_name is None and given:
        raise ValueError(f"{', '.join(given)} must come with --ensemble NAME; got no ensemble.")
    if options.reference is not None:
        if options.ensemble_name is not None:
            raise ValueError("--reference and --ensemble are two sources of fresh draws; give one of them.")
        return None
    ensemble = ensemble_from_options(options) if options.ensemble_name else ensemble_from_config(config)
    if ensemble is None:
        raise ValueError(
            f"{options.samples} names no ensemble in its config; give --ensemble NAME or --reference CUBE."
        )
    return ensemble


def _split(
    samples: np.ndarray, reference: np.ndarray, options: Namespace
) -> tuple[np.ndarray, Iterator[np.ndarray], str]:
    """Split a reference into disjoint sets: as many as asked for, or as it has; of smaller ones if not even three."""
    if reference.shape[1] != samples.shape[1]:
        raise ValueError(
            f"{options.reference} must have networks of {samples.shape[1]} neurons, as {options.samples} has; got "
            f"{reference.shape[1]}. Build one with --N {samples.shape[1]}."
        )
    if options.reference.samefile(options.samples):
        raise ValueError(f"--reference must hold draws that are not among the samples; got {options.samples} itself.")
    repeats = max(MIN_SETS, min(options.repeats, len(reference) // len(samples)))
    size = min(len(samples), len(reference) // repeats)
    if size < 2:
        raise ValueError(
            f"{options.reference} must hold at least {2 * MIN_SETS} networks, for {MIN_SETS} sets; got "
            f"{len(reference)}. Build a larger one."
        )
    sets = (reference[k * size : (k + 1) * size] for k in range(repeats))
    return samples[:size], sets, f"networks of {options.reference}"


def _gains(ensemble: Ensemble | None) -> tuple[float, ...]:
    return () if ensemble is None else tuple(dict.fromkeys(ensemble.gain_range))


def _describe(ensemble: Ensemble) -> str:
    parameters = plain_parameters(ensemble)
    name = parameters.pop("name")
    return f"{name} ({', '.join(f'{key} = {value}' for key, value in parameters.items())})"


def _about(meaning: str) -> dict[str, str]:
    return {"long_name": meaning, "units": "1"}
