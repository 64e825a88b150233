"""neurosde: which wiring could have produced this activity, and how sure we can be.

Simulate rate networks, store ensembles of them as labelled cubes, and infer the recurrent weights W of a recording with
calibrated uncertainty. `W[i, j]` is the weight from presynaptic neuron j to postsynaptic neuron i, everywhere.
"""

from neurosde._version import __version__
from neurosde.activation import Activation
from neurosde.brownian import BrownianPath, BrownianSeeds
from neurosde.rate_sde import RateSDE
from neurosde.solve import odeint, sdeint, simulate_rate_network
from neurosde.summary import summary_stats

__all__ = [
    "Activation",
    "BrownianPath",
    "BrownianSeeds",
    "RateSDE",
    "__version__",
    "odeint",
    "sdeint",
    "simulate_rate_network",
    "summary_stats",
]
