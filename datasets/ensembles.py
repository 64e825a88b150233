"""Ensembles of recurrent weight matrices: what wiring might look like before any activity is seen.

Every ensemble is a small frozen object with a `gain`, its own parameters, `sample(N, generator)` and `variance(N)`.
Gain means the same in all of them: the radius g of the disc that the bulk of the eigenvalues fills as N grows, so that
g = 1 is where a tanh network without noise starts to be active of itself. `variance` is the mean square of an entry,
which is the variance of the iid Gaussian prior that comes nearest to the ensemble.

References:
    The circular law (Bordenave, Chafaï, 2012), https://doi.org/10.1214/11-PS183
    Eigenvalue spectra of random matrices for neural networks (Rajan, Abbott, 2006),
    https://doi.org/10.1103/PhysRevLett.97.188104
    Linking connectivity, dynamics, and computations in low-rank recurrent neural networks (Mastrogiuseppe, Ostojic,
    2018), https://doi.org/10.1016/j.neuron.2018.07.003
    Transition to chaos in random networks with cell-type-specific connectivity (Aljadeff, Stern, Sharpee, 2015),
    https://doi.org/10.1103/PhysRevLett.114.088101
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import Tensor

from neurosde.brownian import as_generator
from neurosde.datasets.entry_law import EntryLaw
from neurosde.validation import check_count, check_positive


@dataclass(frozen=True)
class WeightDraw:
    """One draw of an ensemble.

    Attributes:
        weights: W (post, pre), shape (neuron, neuron), float64.
        gain: the gain it was drawn with.
        cell_type: +1 excitatory, −1 inhibitory, 0 neither, shape (neuron,), int8.
        block: cluster that each neuron belongs to, shape (neuron,), int16; all 0 where there are none.
    """

    weights: Tensor
    gain: float
    cell_type: Tensor
    block: Tensor


class Ensemble(ABC):
    """What an ensemble offers."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Name in configurations."""

    @property
    @abstractmethod
    def gain_range(self) -> tuple[float, float]:
        """Lowest and highest gain."""

    @abstractmethod
    def sample(self, N: int, generator: torch.Generator | None = None) -> WeightDraw:
        """Draw one N × N matrix."""

    @abstractmethod
    def sample_gains(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw gains, shape (count,), float64, on the generator's device."""

    @abstractmethod
    def draw_matrices(self, gains: Tensor, N: int, generator: torch.Generator | None) -> tuple[Tensor, EntryLaw]:
        """Draw a matrix of each of the gains, shape (gain, post, pre), float64, on the generator's device.

        Returns:
            The matrices, and the law of their entries once gain and structure are known.
        """

    def matrices(self, gains: Tensor, N: int, generator: torch.Generator | None) -> Tensor:
        """Draw a matrix of each of the gains, shape (gain, post, pre), float64, on the generator's device."""
        return self.draw_matrices(gains, N, generator)[0]

    def sample_weights(self, count: int, N: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw many N × N matrices, shape (count, post, pre), float64, on the generator's device."""
        return self.matrices(self.sample_gains(check_count(count, "count"), generator), N, generator)

    @abstractmethod
    def variance(self, N: int) -> float:
        """Mean square of an entry of an N × N matrix."""


@dataclass(frozen=True)
class FixedGain(Ensemble):
    """An ensemble of one gain: the radius of the disc that the bulk of the eigenvalues fills."""

    gain: float = field(default=1.5, metadata={"help": "radius of the bulk of eigenvalues", "flags": ("--g", "--gain")})

    def __post_init__(self) -> None:
        check_positive(self.gain, "gain")

    @property
    def gain_range(self) -> tuple[float, float]:
        """The one gain, twice."""
        return self.gain, self.gain

    def sample(self, N: int, generator: torch.Generator | None = None) -> WeightDraw:
        """Draw one N × N matrix."""
        return self.draw(N, self.gain, generator)

    def sample_gains(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Return the one gain, shape (count,), float64, on the generator's device."""
        device = None if generator is None else generator.device
        return torch.full((count,), self.gain, dtype=torch.float64, device=device)

    def draw(self, N: int, gain: float, generator: torch.Generator | None) -> WeightDraw:
        """Draw one N × N matrix of another gain."""
        weights = self.matrices(torch.tensor([gain], dtype=torch.float64), N, generator)[0]
        cell_type, block = self._labels(N)
        return WeightDraw(weights, gain, cell_type, block)

    def draw_matrices(self, gains: Tensor, N: int, generator: torch.Generator | None) -> tuple[Tensor, EntryLaw]:
        """Draw a matrix of each of the gains, shape (gain, post, pre), and tell the law of their entries."""
        device = "cpu" if generator is None else generator.device
        return self._draw(gains.to(device)[:, None, None], check_count(N, "N"), generator)

    def variance(self, N: int) -> float:
        """Mean square of an entry of an N × N matrix, (a + b g²)/N, of the terms of `square_terms`."""
        of_structure, of_gain = self.square_terms(N)
        return (of_structure + of_gain * self.gain**2) / N

    @abstractmethod
    def square_terms(self, N: int) -> tuple[float, float]:
        """Return a and b of N E W² = a + b g², the same for all gains g."""

    def rms_gain(self, N: int, gains: Tensor) -> Tensor:
        """Root mean square gain √(N E W²) of the ensemble, given gains, of the same shape."""
        of_structure, of_gain = self.square_terms(N)
        return (of_structure + of_gain * gains.square()).sqrt()

    @abstractmethod
    def _draw(self, gains: Tensor, N: int, generator: torch.Generator | None) -> tuple[Tensor, EntryLaw]: ...

    def _labels(self, N: int) -> tuple[Tensor, Tensor]:
        """Cell type and cluster of each neuron."""
        return torch.zeros(N, dtype=torch.int8), torch.zeros(N, dtype=torch.int16)


def _normal(*shape: int, generator: torch.Generator | None) -> Tensor:
    device = None if generator is None else generator.device
    return torch.randn(*shape, generator=generator, dtype=torch.float64, device=device)


@dataclass(frozen=True)
class Gaussian(FixedGain):
    """Iid Gaussian weights, W_ij ~ N(0, g²/N)."""

    name = "gaussian"

    def _draw(self, gains: Tensor, N: int, generator: torch.Generator | None) -> tuple[Tensor, EntryLaw]:
        scale = gains / math.sqrt(N)
        return scale * _normal(len(gains), N, N, generator=generator), EntryLaw.of(scale)

    def square_terms(self, N: int) -> tuple[float, float]:
        """N E W² = g²."""
        return 0.0, 1.0


@dataclass(frozen=True)
class Dale(FixedGain):
    """Dale's law: each neuron (column) either excites or inhibits all its targets.

    W_ij = ±s_j |z_ij|, z iid standard normal, the first `excitatory_fraction` of the neurons positive. Inhibition is
    scaled so that the mean inhibitory input is `balance` times the mean excitatory one (1: balanced).
    """

    name = "dale"
    excitatory_fraction: float = field(default=0.8, metadata={"help": "fraction of excitatory neurons"})
    balance: float = field(default=1.0, metadata={"help": "mean inhibitory over mean excitatory input"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.balance, "balance")
        if not 0 < self.excitatory_fraction < 1:
            raise ValueError(f"excitatory_fraction must lie strictly between 0 and 1; got {self.excitatory_fraction}.")

    def column_scales(self, N: int) -> Tensor:
        """Signed scale of each column at gain 1, at which the bulk's radius is 1; shape (N,), float64.

        Raises:
            ValueError: fewer than two neurons.
        """
        if N < 2:
            raise ValueError(f"Dale's law needs at least one neuron of each kind, N >= 2; got N = {N}.")
        excitatory = min(max(round(self.excitatory_fraction * N), 1), N - 1)
        scales = torch.ones(N, dtype=torch.float64)
        scales[excitatory:] = -self.balance * excitatory / (N - excitatory)
        # The bulk's radius is set by the variance about the column's mean: of |z|, 1 − 2/π.
        return scales / math.sqrt((1 - 2 / math.pi) * float(scales.square().sum()))

    def _draw(self, gains: Tensor, N: int, generator: torch.Generator | None) -> tuple[Tensor, EntryLaw]:
        scale = gains * self.column_scales(N).to(gains.device)
        return scale * _normal(len(gains), N, N, generator=generator).abs(), EntryLaw.of(scale, one_sided=True)

    def _labels(self, N: int) -> tuple[Tensor, Tensor]:
        return self.column_scales(N).sign().to(torch.int8), super()._labels(N)[1]

    def square_terms(self, N: int) -> tuple[float, float]:
        """N E W² = g²/(1 − 2/π), on average over the columns."""
        return 0.0, float(self.column_scales(N).square().sum())


@dataclass(frozen=True)
class Sparse(FixedGain):
    """Sparse Gaussian weights: each connection exists with probability `density`, W_ij ~ N(0, g²/(N·density))."""

    name = "sparse"
    density: float = field(default=0.2, metadata={"help": "probability of a connection"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.density <= 1:
            raise ValueError(f"density must lie in (0, 1]; got {self.density}.")

    def _draw(self, gains: Tensor, N: int, generator: torch.Generator | None) -> tuple[Tensor, EntryLaw]:
        uniform = torch.rand(len(gains), N, N, generator=generator, dtype=torch.float64, device=gains.device)
        exists = uniform < self.density
        scale = gains / math.sqrt(N * self.density)
        weights = scale * exists * _normal(len(gains), N, N, generator=generator)
        return weights, EntryLaw.of(scale, density=self.density)

    def square_terms(self, N: int) -> tuple[float, float]:
        """N E W² = g²."""
        return 0.0, 1.0


@dataclass(frozen=True)
class LowRank(FixedGain):
    """Low-rank structure in a random background: W = g J/√N + s/√(rN) Σ_k m_k n_kᵀ, all of J, m, n standard normal."""

    name = "low-rank"
    rank: int = field(default=2, metadata={"help": "rank of the structure"})
    strength: float = field(default=1.0, metadata={"help": "strength of the structure, on the scale of the gain"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.strength, "strength", zero_ok=True)
        check_count(self.rank, "rank")

    def _draw(self, gains: Tensor, N: int, generator: torch.Generator | None) -> tuple[Tensor, EntryLaw]:
        scale = gains / math.sqrt(N)
        background = scale * _normal(len(gains), N, N, generator=generator)
        m, n = _normal(2, len(gains), N, self.rank, generator=generator)
        structure = self.strength / math.sqrt(self.rank * N) * m @ n.mT
        return background + structure, EntryLaw.of(scale, mean=structure)

    def square_terms(self, N: int) -> tuple[float, float]:
        """N E W² = s² + g²."""
        return self.strength**2, 1.0


@dataclass(frozen=True)
class Block(FixedGain):
    """Clusters: Gaussian weights whose standard deviation is `contrast` times larger within a cluster than between."""

    name = "block"
    num_blocks: int = field(default=4, metadata={"help": "number of clusters"})
    contrast: float = field(default=3.0, metadata={"help": "weight within clusters over weight between them"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.contrast, "contrast")
        check_count(self.num_blocks, "num_blocks")

    def _profile(self, N: int) -> tuple[Tensor, float, Tensor]:
        """Relative sd of each entry (N, N), the radius of the bulk with it, and the cluster of each neuron (N,)."""
        if self.num_blocks > N:
            raise ValueError(f"{self.num_blocks} clusters need at least as many neurons; got N = {N}.")
        block = (torch.arange(N) * self.num_blocks) // N
        profile = torch.where(block[:, None] == block, self.contrast, 1.0).double()
        # Aljadeff et al.: the squared radius is the largest eigenvalue of the matrix of variances.
        radius = math.sqrt(float(np.linalg.eigvalsh(profile.square().numpy())[-1]))
        return profile, radius, block.to(torch.int16)

    def profile(self, N: int) -> tuple[Tensor, Tensor]:
        """Standard deviation of each entry at gain 1, (N, N), and the cluster of each neuron, (N,)."""
        profile, radius, block = self._profile(N)
        return profile / radius, block

    def _draw(self, gains: Tensor, N: int, generator: torch.Generator | None) -> tuple[Tensor, EntryLaw]:
        profile, radius, _ = self._profile(N)
        scale = gains / radius * profile.to(gains.device)
        return scale * _normal(len(gains), N, N, generator=generator), EntryLaw.of(scale)

    def _labels(self, N: int) -> tuple[Tensor, Tensor]:
        return super()._labels(N)[0], self._profile(N)[2]

    def square_terms(self, N: int) -> tuple[float, float]:
        """N E W² = g² where the clusters are of equal size."""
        return 0.0, N * float(self.profile(N)[0].square().mean())


@dataclass(frozen=True)
class GainMixture(Ensemble):
    """Any ensemble with a gain that is itself unknown: g uniform between the base's gain and `gain_high`."""

    base: FixedGain
    gain_high: float

    def __post_init__(self) -> None:
        check_positive(self.gain_high, "gain_high")
        if self.gain_high < self.base.gain:
            raise ValueError(f"gain_high must be at least the gain {self.base.gain}; got {self.gain_high}.")

    @property
    def name(self) -> str:
        """Name of the base ensemble."""
        return self.base.name

    @property
    def gain_range(self) -> tuple[float, float]:
        """Lowest and highest gain."""
        return self.base.gain, self.gain_high

    def sample(self, N: int, generator: torch.Generator | None = None) -> WeightDraw:
        """Draw a gain, then one N × N matrix."""
        return self.base.draw(N, float(self.sample_gains(1, generator)), generator)

    def draw_matrices(self, gains: Tensor, N: int, generator: torch.Generator | None) -> tuple[Tensor, EntryLaw]:
        """Draw a matrix of each of the gains, shape (gain, post, pre), and tell the law of their entries."""
        weights, law = self.base.draw_matrices(gains, N, generator)
        own = gains.to(weights.device)
        return weights, law.of_gains(self.base.gain / own, self.gain_high / own)

    def sample_gains(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw gains, shape (count,), float64, on the generator's device."""
        device = None if generator is None else generator.device
        share = torch.rand(count, generator=generator, dtype=torch.float64, device=device)
        return self.base.gain + share * (self.gain_high - self.base.gain)

    def variance(self, N: int) -> float:
        """Mean square of an entry, on average over the gains."""
        of_structure, of_gain = self.base.square_terms(N)
        low, high = self.gain_range
        return (of_structure + of_gain * (low**2 + low * high + high**2) / 3) / N


ENSEMBLES: dict[str, type[FixedGain]] = {kind.name: kind for kind in (Gaussian, Dale, Sparse, LowRank, Block)}


def make_ensemble(name: str, gain_high: float | None = None, **parameters: float) -> Ensemble:
    """Return the ensemble called `name`; with `gain_high`, a gain mixture.

    Raises:
        ValueError: unknown name, or a parameter that this ensemble does not have.
    """
    if name not in ENSEMBLES:
        raise ValueError(f"ensemble must be one of {sorted(ENSEMBLES)}; got {name!r}.")
    kind = ENSEMBLES[name]
    known = sorted(item.name for item in fields(kind))
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        raise ValueError(f"the {name} ensemble has the parameters {known}; got {unknown}.")
    base = kind(**parameters)
    return base if gain_high is None else GainMixture(base, gain_high)


def base_of(ensemble: Ensemble) -> FixedGain:
    """Return the ensemble of one gain that a mixture of gains is of; of one that is no mixture, itself.

    Raises:
        TypeError: neither.
    """
    if isinstance(ensemble, GainMixture):
        return ensemble.base
    if not isinstance(ensemble, FixedGain):
        raise TypeError(f"an ensemble must be a FixedGain or a GainMixture of one; got {type(ensemble).__name__}.")
    return ensemble


def is_gaussian(ensemble: Ensemble) -> bool:
    """Whether weights are iid Gaussian, but for a gain that may be unknown: sparse ones without a gap are, too."""
    base = base_of(ensemble)
    return isinstance(base, Gaussian) or (isinstance(base, Sparse) and base.density == 1)


def sample_weight_matrix(
    N: int,
    g: float = 1.5,
    *,
    ensemble: str | Ensemble = "gaussian",
    generator: int | torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    **parameters: float,
) -> Tensor:
    """Draw one recurrent weight matrix.

    Args:
        N: number of neurons.
        g: gain, the radius of the bulk of eigenvalues.
        ensemble: gaussian, dale, sparse, low-rank or block, or an ensemble object (which brings its own gain).
        generator: seed or generator.
        dtype: dtype of the result.
        **parameters: the ensemble's own, such as density=0.1.

    Returns:
        W (post, pre), shape (N, N).

    Raises:
        ValueError: unknown ensemble or parameter, or a value out of range.
    """
    if parameters and not isinstance(ensemble, str):
        raise ValueError(f"an ensemble object brings its own parameters; got {sorted(parameters)} beside it.")
    chosen = make_ensemble(ensemble, gain=g, **parameters) if isinstance(ensemble, str) else ensemble
    return chosen.sample(N, as_generator(generator)).weights.to(dtype)
