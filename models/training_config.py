"""How a prior is trained, and a posterior."""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

from neurosde.datasets.ensemble_options import plain_parameters
from neurosde.datasets.ensembles import ENSEMBLES, Ensemble, make_ensemble
from neurosde.models.denoiser import Preset
from neurosde.models.edm import SIGMA_MIN
from neurosde.validation import check_count, check_positive


@dataclass(frozen=True)
class PriorTraining:
    """A training of a prior: everything that its result depends on.

    Weights come from cubes, or are drawn as they are needed from one or several ensembles.
    """

    dataset: tuple[Path, ...] = field(
        default=(), metadata={"help": "cubes to train on, each of its own N (default: draw from --ensemble)"}
    )
    ensembles: tuple[Ensemble, ...] = ()
    sizes: tuple[int, ...] = field(
        default=(10, 15, 20, 40, 50, 70, 100),
        metadata={"help": "numbers of neurons of the matrices drawn", "flags": ("--N",)},
    )
    preset: Preset | None = field(
        default=None, metadata={"help": "size of the network (default: that of --start, or small)"}
    )
    start: str | None = field(
        default=None,
        metadata={
            "help": "trained one to start from: a file or folder, or one of neurosde's (default: nothing learnt)"
        },
    )
    teachers: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "what to learn from in place of weights, for each --ensemble: a trained prior of it, or exact, the "
            "best denoiser, where that is known"
        },
    )
    steps: int = field(default=10_000, metadata={"help": "optimiser steps"})
    batch_entries: int = field(
        default=160_000, metadata={"help": "weights per step, over all processes: a batch is this over N² matrices"}
    )
    learning_rate: float = field(default=2e-3, metadata={"help": "largest step size of Adam"})
    warmup: int = field(default=300, metadata={"help": "steps until it is reached"})
    ema: float = field(default=0.999, metadata={"help": "decay of the running average, per step"})
    sigma_max: float = field(default=80.0, metadata={"help": "largest noise level, in units of a weight's spread"})
    family_dropout: float = field(
        default=0.3, metadata={"help": "how often a prior of several ensembles is not told which it sees"}
    )
    checkpoint_above: int = field(
        default=128, metadata={"help": "N above which activations are computed twice instead of kept"}
    )
    seed: int = field(default=0, metadata={"help": "seed"})

    def __post_init__(self) -> None:
        for name in ("steps", "batch_entries", "warmup", "checkpoint_above"):
            check_count(getattr(self, name), name)
        check_count(self.seed, "seed", 0)
        check_positive(self.learning_rate, "learning_rate")
        for name in ("ema", "family_dropout"):
            if check_positive(getattr(self, name), name, zero_ok=True) >= 1:
                raise ValueError(f"{name} must lie in [0, 1); got {getattr(self, name)}.")
        if check_positive(self.sigma_max, "sigma_max") <= SIGMA_MIN:
            raise ValueError(f"sigma_max must exceed {SIGMA_MIN}; got {self.sigma_max}.")
        if self.preset is not None and self.preset not in get_args(Preset):
            raise ValueError(f"preset must be one of {get_args(Preset)}; got {self.preset!r}.")
        if bool(self.dataset) == bool(self.ensembles):
            raise ValueError(
                "give either cubes or ensembles to train on, and not both: --dataset CUBE, or --ensemble NAME."
            )
        if self.teachers and self.dataset:
            raise ValueError("teachers are of ensembles; give --ensemble in place of --dataset, or no teachers.")
        names = [kind.name for kind in self.ensembles]
        if len(set(names)) < len(names):
            raise ValueError(f"ensembles must have different names; got {names}.")
        if not self.sizes:
            raise ValueError("sizes must name at least one number of neurons.")
        for N in self.sizes:
            check_count(N, "N", 2)
            for kind in self.ensembles:
                kind.variance(N)  # refuses sizes that the ensemble cannot have

    def contents(self) -> dict[str, Any]:
        """Return the configuration as plain values."""
        plain = asdict(self)
        plain["ensembles"] = [plain_parameters(kind) for kind in self.ensembles]
        plain["dataset"] = [str(path) for path in self.dataset]
        if not self.teachers:  # which trainings before there were any do not name
            del plain["teachers"]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}


@dataclass(frozen=True)
class PosteriorTraining(PriorTraining):
    """A training of a posterior: everything that its result depends on.

    Recordings come from cubes, or are simulated as they are needed, of networks that are drawn from the ensembles: by
    default all, of gains from 0.3 to 3. Ranges are two numbers between which the logarithm is uniform.
    """

    sizes: tuple[int, ...] = field(
        default=(5, 8, 10, 15, 20, 25, 40, 50, 70, 100),
        metadata={"help": "numbers of neurons of the networks drawn", "flags": ("--N",)},
    )
    family_dropout: float = field(default=0.6, metadata={"help": "how often the ensemble is not told"})
    gain_dropout: float = field(default=0.7, metadata={"help": "how often the gain is not told"})
    recording_dropout: float = field(
        default=0.1, metadata={"help": "how often there is no recording, which trains the prior"}
    )
    times: tuple[int, ...] = field(default=(50, 5000), metadata={"help": "range of times per trial"})
    trials: tuple[int, ...] = field(default=(1, 100), metadata={"help": "range of trials per network"})
    transitions: int = field(default=50_000, metadata={"help": "most transitions of one network"})
    dt: tuple[float, ...] = field(default=(0.02, 0.5), metadata={"help": "range of dt/tau"})
    noise_std: tuple[float, ...] = field(default=(0.03, 1.5), metadata={"help": "range of the noise sigma"})
    input_std: float = field(default=1.0, metadata={"help": "largest spread of the neurons' constant inputs"})
    reuse: int = field(default=16, metadata={"help": "steps that share one simulation, each of other networks"})

    def __post_init__(self) -> None:
        if not self.dataset and not self.ensembles:
            everything = tuple(make_ensemble(name, 3.0, gain=0.3) for name in ENSEMBLES)
            object.__setattr__(self, "ensembles", everything)
        super().__post_init__()
        if self.teachers:
            raise ValueError("teachers know no recordings, and teach priors alone; leave them out.")
        if self.dataset:
            defaults = {item.name: item.default for item in fields(self)}
            if given := [name for name in SIMULATED if getattr(self, name) != defaults[name]]:
                raise ValueError(
                    f"{', '.join(given)} are of simulated recordings; cubes have their own. Leave them out."
                )
        for name in ("gain_dropout", "recording_dropout"):
            if check_positive(getattr(self, name), name, zero_ok=True) >= 1:
                raise ValueError(f"{name} must lie in [0, 1); got {getattr(self, name)}.")
        for name in ("times", "trials", "dt", "noise_std"):
            low_high = getattr(self, name)
            if len(low_high) != 2 or not 0 < low_high[0] <= low_high[1]:
                raise ValueError(f"{name} must be two numbers, the lower one first and positive; got {low_high}.")
        if self.times[0] < 2 or self.dt[1] > 1:
            raise ValueError(f"times must be at least 2 and dt at most 1; got times = {self.times} and dt = {self.dt}.")
        for name in ("transitions", "reuse"):
            check_count(getattr(self, name), name)
        check_positive(self.input_std, "input_std", zero_ok=True)


SIMULATED = ("sizes", "times", "trials", "transitions", "dt", "noise_std", "input_std", "reuse")


def read_training(path: str | Path, kind: type[PriorTraining] = PriorTraining) -> dict[str, Any]:
    """Read the fields of a training from a TOML file, those that it names.

    Cubes and sizes are lists; each ensemble is a table, as in

        steps = 20000
        [[ensembles]]
        name = "sparse"
        gain = 0.8
        gain_high = 2.0
        density = 0.1

    Raises:
        FileNotFoundError: no such file.
        TypeError: a field that should be a list is none.
        ValueError: not TOML, or a name that a training does not have.
    """
    try:
        plain = tomllib.loads(Path(path).read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a TOML file: {error}.") from error
    known = {item.name for item in fields(kind)}
    if unknown := sorted(plain.keys() - known):
        raise ValueError(f"{path}: a training has the fields {sorted(known)}; got {unknown}.")
    lists = {item.name for item in fields(kind) if str(item.type).startswith("tuple")}
    for name in plain.keys() & lists:
        if not isinstance(plain[name], list):
            raise TypeError(f"{path}: {name} must be a list; got {plain[name]!r}.")
    if not all(isinstance(kind, dict) and "name" in kind for kind in plain.get("ensembles", [])):
        raise ValueError(f"{path}: each of the ensembles must be a table [[ensembles]] with a name.")
    if "ensembles" in plain:
        plain["ensembles"] = [make_ensemble(**parameters) for parameters in plain["ensembles"]]
    if "dataset" in plain:
        plain["dataset"] = [Path(cube) for cube in plain["dataset"]]
    return {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
