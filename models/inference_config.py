"""What there is to say about an inference: what is known of the recording, how to infer, and what to draw."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from neurosde.models.split_gibbs import SWEEPS
from neurosde.models.weight_posterior import STEPS, Refiner
from neurosde.rate_sde import Drive
from neurosde.time_constant import check_range
from neurosde.validation import check_count, check_positive, check_time_step

Method = Literal["exact", "ridge", "least-squares", "cfg"]
Likelihood = Literal["transitions", "rollout"]


@dataclass(frozen=True)
class InferenceConfig:
    """What to infer from, what is known, and how."""

    dt: float | None = field(default=None, metadata={"help": "spacing of the samples (default: as the file says)"})
    tau: float | None = field(default=None, metadata={"help": "time constant (default: as the file says, else 1)"})
    tau_range: tuple[float, ...] | None = field(
        default=None, metadata={"help": "lowest and highest time constant, where it is not known: it is estimated"}
    )
    noise_std: float | None = field(default=None, metadata={"help": "noise sigma (default: estimated)"})
    gain: float | None = field(default=None, metadata={"help": "prior: weights have variance gain^2/N (estimated)"})
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
    steps: int | None = field(default=None, metadata={"help": f"cfg: noise levels of the sampler (default {STEPS})"})
    refine: Refiner | None = field(
        default=None, metadata={"help": "refine the draws through the likelihood itself: gibbs is exact in the limit"}
    )
    sweeps: int | None = field(default=None, metadata={"help": f"refine, gibbs: sweeps (default {SWEEPS})"})
    rho: float | None = field(
        default=None, metadata={"help": "refine: how far draws may go, in units of a weight's spread"}
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
    predictive_draws: int = field(default=32, metadata={"help": "draws whose activity is simulated for comparison"})
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
            check_range(self.tau_range)
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
        for name in ("checkpoint", "family"):
            if not self.trained and getattr(self, name) is not None:
                raise ValueError(f"{name} is for method 'cfg', or refined draws; got it with {self.method!r}.")
        if self.refine not in (None, *get_args(Refiner)):
            raise ValueError(f"refine must be one of {get_args(Refiner)}; got {self.refine!r}.")
        if self.rho is not None:
            check_positive(self.rho, "rho")
            if self.refine is None:
                raise ValueError(f"rho is of a refinement; got {self.rho} without --refine.")
        if self.sweeps is not None:
            check_count(self.sweeps, "sweeps", 8)
            if self.refine != "gibbs":
                raise ValueError(f"sweeps are of refine = 'gibbs'; got {self.sweeps} with {self.refine!r}.")
        if self.likelihood not in get_args(Likelihood):
            raise ValueError(f"likelihood must be one of {get_args(Likelihood)}; got {self.likelihood!r}.")
        if self.likelihood == "rollout":
            if self.refine not in ("dps", "pigdm"):
                raise ValueError(f"likelihood 'rollout' is of refine 'dps' or 'pigdm'; got it with {self.refine!r}.")
            if self.estimate_input:
                raise ValueError("likelihood 'rollout' takes the input as known; leave estimate_input out.")
        if self.window is not None:
            check_positive(self.window, "window")
            if self.likelihood != "rollout":
                raise ValueError(f"window is of likelihood 'rollout'; got {self.window} with {self.likelihood!r}.")
        if self.guidance is not None:
            check_positive(self.guidance, "guidance", zero_ok=True)
        if self.steps is not None:
            check_count(self.steps, "steps", 2)
        check_count(self.draws, "draws", 2)
        check_count(self.predictive_draws, "predictive_draws", 0)
        if self.predictive_draws > self.draws:
            raise ValueError(f"predictive_draws must be at most draws, {self.draws}; got {self.predictive_draws}.")
        check_count(self.seed, "seed", 0)

    @property
    def trained(self) -> bool:
        """Whether draws are of a trained prior's posterior, and not of a Gaussian one's."""
        return self.method == "cfg" or self.refine is not None
