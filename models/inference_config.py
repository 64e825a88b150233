"""What there is to say about an inference: what is known of the recording, how to infer, and what to draw."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from neurosde.models.diffusion_prior import STEPS
from neurosde.models.refiner_options import Refiner
from neurosde.models.split_gibbs import NEAR_RHO, NEAR_SWEEPS, PRIOR_SWEEPS, SWEEPS
from neurosde.rate_sde import Drive
from neurosde.time_constant import check_range
from neurosde.validation import check_count, check_positive, check_time_step

Method = Literal["exact", "ridge", "least-squares", "cfg"]
Likelihood = Literal["transitions", "rollout"]
PREDICTIVE_DRAWS = 32


@dataclass(frozen=True)
class InferenceConfig:
    """What to infer from, what is known, and how."""

    dt: float | None = field(default=None, metadata={"help": "spacing of the samples (default: as the file says)"})
    tau: float | None = field(default=None, metadata={"help": "time constant (default: as the file says, else 1)"})
    tau_range: tuple[float, float] | None = field(
        default=None, metadata={"help": "lowest and highest time constant, where it is not known: it is estimated"}
    )
    noise_std: float | None = field(default=None, metadata={"help": "noise sigma (default: estimated)"})
    gain: float | None = field(
        default=None, metadata={"help": "prior: weights have variance gain^2/N (default: estimated)"}
    )
    method: Method = field(default="exact", metadata={"help": "how to infer"})
    checkpoint: str | None = field(
        default=None, metadata={"help": "cfg, refine: a trained posterior, its file or name (default base)"}
    )
    family: str | None = field(
        default=None, metadata={"help": "cfg, refine: the ensemble, where it is known (default: open)"}
    )
    guidance: float | None = field(
        default=None, metadata={"help": "cfg: weight of the guidance; 1, the default, is calibrated, others are not"}
    )
    steps: int | None = field(
        default=None, metadata={"help": f"cfg: noise levels of the sampler (default {STEPS}, more of many neurons)"}
    )
    closing: bool = field(
        default=True,
        metadata={
            "help": "cfg, refine gibbs: close draws by sweeps of Gibbs sampling given the structure that was found, of "
            "ensembles for which that is known (default)"
        },
    )
    refine: Refiner | None = field(
        default=None, metadata={"help": "refine the draws through the likelihood itself: gibbs is exact in the limit"}
    )
    prior: str | None = field(
        default=None,
        metadata={"help": "refine: a trained prior of weights, its file or name (default: that of the checkpoint)"},
    )
    sweeps: int | None = field(
        default=None,
        metadata={
            "help": f"refine, gibbs: sweeps, at least 8 (default: of method cfg, unguided, {NEAR_SWEEPS}, of others "
            f"{SWEEPS}, with a prior {PRIOR_SWEEPS})"
        },
    )
    rho: float | None = field(
        default=None,
        metadata={
            "help": "refine: how far draws may go, in units of a weight's spread (default: of gibbs and method cfg, "
            f"unguided, {NEAR_RHO}, of other methods 1, with a prior 3 √N; of mmps, pigdm and dps 3)"
        },
    )
    likelihood: Likelihood = field(
        default="transitions",
        metadata={"help": "refine, dps and pigdm: of each step, or through the simulator, by roll-outs of windows"},
    )
    window: float | None = field(
        default=None,
        metadata={"help": "refine, rollout: length of a window (default: half a time constant, or less in chaos)"},
    )
    estimate_input: bool = field(default=False, metadata={"help": "an unknown constant input drives each neuron"})
    drive: Drive | None = field(default=None, metadata={"help": "drive convention (default: as the file says)"})
    draws: int = field(default=256, metadata={"help": "posterior draws"})
    predictive_draws: int | None = field(
        default=None,
        metadata={"help": f"draws whose activity is simulated (default {PREDICTIVE_DRAWS}, or all of fewer draws)"},
    )
    seed: int = field(default=0, metadata={"help": "seed of the draws"})
    network: int | None = field(default=None, metadata={"help": "which network of a cube"})
    variable: str | None = field(default=None, metadata={"help": "which array of the file (default activity)"})
    cut_trials: bool = field(default=False, metadata={"help": "cut an NWB series into the file's trials"})

    def __post_init__(self) -> None:
        if self.dt is not None:
            check_time_step(self.dt, self.tau)
        for name in ("tau", "gain"):
            if getattr(self, name) is not None:
                check_positive(getattr(self, name), name)
        if self.tau_range is not None:
            check_range(self.tau_range, name="tau_range")
            if self.tau is not None:
                raise ValueError(f"give --tau or --tau-range; got {self.tau} and {self.tau_range}.")
        if self.noise_std is not None:
            check_positive(self.noise_std, "noise_std", zero_ok=True)
        if self.method not in get_args(Method):
            raise ValueError(f"method must be one of {get_args(Method)}; got {self.method!r}.")
        if self.method not in ("exact", "cfg") and self.gain is not None:
            raise ValueError(f"method {self.method!r} has no prior gain; leave it out, or use method 'exact'.")
        for name in ("guidance", "steps"):
            if self.method != "cfg" and getattr(self, name) is not None:
                raise ValueError(f"{name} is for method 'cfg'; got it with {self.method!r}.")
        if not self.closing and not self.trained:
            raise ValueError(f"closing is for method 'cfg', or draws refined by 'gibbs'; got it with {self.method!r}.")
        for name in ("checkpoint", "family"):
            if not self.trained and getattr(self, name) is not None:
                raise ValueError(f"{name} is for method 'cfg', or refined draws; got it with {self.method!r}.")
        if self.refine not in (None, *get_args(Refiner)):
            raise ValueError(f"refine must be one of {get_args(Refiner)}; got {self.refine!r}.")
        self._check_refinement()
        if self.guidance is not None:
            check_positive(self.guidance, "guidance", zero_ok=True)
        if self.steps is not None:
            check_count(self.steps, "steps", 2)
        check_count(self.draws, "draws", 2)
        if self.predictive_draws is not None and check_count(self.predictive_draws, "predictive_draws", 0) > self.draws:
            raise ValueError(
                f"predictive_draws must be at most draws, {self.draws}; got {self.predictive_draws}. Leave it out, or "
                "take more draws."
            )
        check_count(self.seed, "seed", 0)

    def _check_refinement(self) -> None:
        """Raise ValueError for settings of another refinement than the one that is asked for, or of none."""
        refined = "where draws are not refined" if self.refine is None else f"with {self.refine!r}"
        if self.rho is not None:
            check_positive(self.rho, "rho")
            if self.refine is None:
                raise ValueError(
                    f"rho is how far refined draws may go; got {self.rho} {refined}. Leave rho out, or add refine, one "
                    f"of {get_args(Refiner)}."
                )
        if self.prior is not None:
            if self.refine is None:
                raise ValueError(
                    f"prior is what draws are refined by; got {self.prior!r} {refined}. Leave prior out, or add "
                    f"refine, one of {get_args(Refiner)}."
                )
            if self.gain is not None:
                raise ValueError(f"a prior has gains of its own; got gain = {self.gain:g}. Leave gain or prior out.")
        if self.sweeps is not None:
            check_count(self.sweeps, "sweeps", 8)
            if self.refine != "gibbs":
                raise ValueError(
                    f"sweeps are for draws refined by 'gibbs'; got {self.sweeps} {refined}. Leave sweeps out, or "
                    "choose 'gibbs'."
                )
        if self.likelihood not in get_args(Likelihood):
            raise ValueError(f"likelihood must be one of {get_args(Likelihood)}; got {self.likelihood!r}.")
        if self.likelihood == "rollout":
            if self.refine not in ("dps", "pigdm"):
                raise ValueError(
                    f"likelihood 'rollout' is for draws refined by 'pigdm' or 'dps'; got it {refined}. Leave "
                    "likelihood out, or choose 'pigdm'."
                )
            if self.estimate_input:
                raise ValueError("likelihood 'rollout' takes the input as known; leave estimate_input out.")
        if self.window is not None:
            check_positive(self.window, "window")
            if self.likelihood != "rollout":
                raise ValueError(
                    f"window is for likelihood 'rollout'; got {self.window} with {self.likelihood!r}. Leave window "
                    "out, or choose 'rollout'."
                )

    @property
    def predicted_draws(self) -> int:
        """Number of draws whose activity is simulated: as many as are asked for, by default all of few."""
        return min(PREDICTIVE_DRAWS, self.draws) if self.predictive_draws is None else self.predictive_draws

    @property
    def trained(self) -> bool:
        """Whether draws are of a trained prior's posterior, and not of a Gaussian one's."""
        return self.method == "cfg" or self.refine is not None
