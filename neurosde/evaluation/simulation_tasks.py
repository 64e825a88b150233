"""What `neurosde benchmark simulate` runs: tasks, methods, and the options of the command."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from neurosde.evaluation.simulation_peers import (
    BACKWARD,
    FORWARD,
    PASSES,
    Case,
    Method,
    Neurosde,
    NeurosdeJulia,
    NeurosdeTorch,
    Torchdiffeq,
    TorchdiffeqAdjoint,
    TorchLoop,
    Torchsde,
    TorchsdeAdjoint,
)
from neurosde.evaluation.simulation_peers_compiled import Diffrax, JaxScan, Numba, TorchCompile
from neurosde.validation import check_count, check_positive

DT, TAU, GAIN = 0.1, 1.0, 1.5

METHODS: dict[str, tuple[str, type[Method]]] = {
    "neurosde-julia": ("neurosde julia", NeurosdeJulia),
    "neurosde-torch": ("neurosde torch", NeurosdeTorch),
    "neurosde-auto": ("neurosde auto", Neurosde),
    "torch-loop": ("torch loop", TorchLoop),
    "torch-compile": ("torch.compile", TorchCompile),
    "torchsde": ("torchsde.sdeint", Torchsde),
    "torchsde-adjoint": ("torchsde.sdeint_adjoint", TorchsdeAdjoint),
    "torchdiffeq": ("torchdiffeq.odeint", Torchdiffeq),
    "torchdiffeq-adjoint": ("torchdiffeq.odeint_adjoint", TorchdiffeqAdjoint),
    "jax": ("jax.lax.scan", JaxScan),
    "diffrax": ("diffrax Euler", Diffrax),
    "numba": ("numba", Numba),
}


@dataclass(frozen=True)
class Task:
    """M networks × K trials of N neurons at T times, each network with its own W; `passes` are run by default."""

    networks: int
    trials: int
    N: int
    T: int
    noise_std: float = 0.0
    passes: tuple[str, ...] = PASSES

    def scaled(self, scale: float) -> Task:
        """Return the task with fewer or more networks; of a single network, trials."""
        which = "networks" if self.networks > 1 else "trials"
        return replace(self, **{which: max(1, round(scale * getattr(self, which)))})

    def flops(self, which: str) -> int:
        """Floating-point operations of the matrix products of a pass."""
        products = 1 if which == FORWARD else 3  # W φ(h); and Wᵀ λ and λ φ(h)ᵀ
        return products * 2 * self.N**2 * self.networks * self.trials * (self.T - 1)

    def case(self, seed: int) -> Case:
        """Draw the task's networks and initial states."""
        sizes = (self.networks, self.trials, self.N, self.T, self.noise_std)
        return Case.draw(*sizes, dt=DT, tau=TAU, g=GAIN, seed=seed)

    def __str__(self) -> str:
        noise = f", σ = {self.noise_std:g}" if self.noise_std else ""
        return f"{self.networks} × {self.trials}, N = {self.N}, T = {self.T}{noise}"


TASKS = {
    "A": Task(1, 1, 50, 100),
    "B": Task(1000, 10, 50, 100, passes=(FORWARD,)),
    "B-noise": Task(1000, 10, 50, 100, noise_std=0.1, passes=(FORWARD,)),
    "C": Task(1, 64, 1000, 200),
    "D": Task(256, 8, 100, 200, passes=(BACKWARD,)),
}


@dataclass(frozen=True)
class SimulationBenchmark:
    """What to run, how often, and where the data go."""

    tasks: tuple[str, ...] = field(default=tuple(TASKS), metadata={"help": "tasks"})
    passes: tuple[str, ...] | None = field(
        default=None, metadata={"help": f"{' or '.join(PASSES)} (default: per task, what has a goal or is cheap)"}
    )
    methods: tuple[str, ...] = field(default=tuple(METHODS), metadata={"help": "methods"})
    repeats: int = field(default=7, metadata={"help": "measurements per task, pass and method"})
    budget: float = field(default=90.0, metadata={"help": "seconds per task and pass; then repeats are cut to 3"})
    threads: int | None = field(default=None, metadata={"help": "threads (default torch's); jax takes all cores"})
    scale: float = field(default=1.0, metadata={"help": "share of networks or trials, for a quick look"})
    dataset: bool = field(default=True, metadata={"help": "also time build-dataset against writing its bytes"})
    seed: int = field(default=0, metadata={"help": "seed"})
    out: Path = field(default=Path("results/simulate.nc"), metadata={"help": "data; the figure lies beside it"})

    def __post_init__(self) -> None:
        choices = (("tasks", self.tasks, TASKS), ("passes", self.passes, PASSES), ("methods", self.methods, METHODS))
        for name, given, known in choices:
            unknown = [item for item in given or () if item not in known]
            if unknown or given == ():
                raise ValueError(f"{name} must be some of {', '.join(known)}; got {', '.join(unknown) or 'none'}.")
        check_count(self.repeats, "repeats")
        check_count(self.seed, "seed", 0)
        check_positive(self.budget, "budget")
        check_positive(self.scale, "scale")
        if self.threads is not None:
            check_count(self.threads, "threads")

    def cells(self) -> list[tuple[str, str]]:
        """Tasks and passes to run, in the order in which they are run."""
        return [(task, which) for task in self.tasks for which in self.passes or TASKS[task].passes]

    def task(self, name: str) -> Task:
        """Return the task in the size that is run."""
        return TASKS[name].scaled(self.scale)
