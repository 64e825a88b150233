"""When `engine="auto"` takes Julia: a cost model.

Seconds of a simulation are predicted for either engine as

    call + weights · (weight + steps · reading) + steps · step + flops · flop + numbers · number
    (+ noise per call and per number, if there is noise),

weights being networks × N², numbers N × trajectories × steps, and flops those of the forward matrix products. The
constants below are what `neurosde benchmark engines` fitted to 192 kinds of work on two cores with AVX2: with them the
quicker engine is picked in 92 % of these, and the worst choice takes 2.2 times as long as the best. Gradients of one
large network with many trials are priced too high for Julia: torch is taken where Julia would be up to 1.5 times as
quick.

Starting the worker is paid for once: what Julia would have saved is added up over the calls of a process, and it is
started when the sum exceeds the cost of starting. So Julia is never started for work that torch finishes sooner, and
all calls together take at most twice the time of the best choice in hindsight (the ski-rental bound).

References:
    Competitive randomized algorithms for nonuniform problems (Karlin, Manasse, McGeoch, Owicki, 1994),
    https://doi.org/10.1007/BF01189993
"""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass

from neurosde.engines import Work
from neurosde.julia.locate import Julia, JuliaError, find_julia, julia_available
from neurosde.julia.worker import describe, worker_running


@dataclass(frozen=True)
class Costs:
    """Seconds; (forward only, forward with gradient), but for noise: (per call, per number)."""

    call: tuple[float, float]
    weight: tuple[float, float]
    reading: tuple[float, float]
    step: tuple[float, float]
    flop: tuple[float, float]
    number: tuple[float, float]
    noise: tuple[float, float]

    def seconds(self, work: Work) -> float:
        """Predicted time of a simulation (and its gradient, if one will be asked for)."""
        g = int(work.gradient)
        numbers = work.trajectories * work.neurons * work.steps
        weights = work.networks * work.neurons**2
        seconds = self.call[g] + weights * (self.weight[g] + work.steps * self.reading[g])
        seconds += work.steps * self.step[g] + numbers * self.number[g]
        seconds += 2 * numbers * work.neurons * self.flop[g]
        if work.noisy:
            seconds += self.noise[0] + numbers * self.noise[1]
        return seconds


TORCH = Costs(
    (3e-4, 8.4e-4), (8e-10, 3.4e-9), (8.2e-11, 1.7e-10), (1.6e-5, 6.6e-5), (6.6e-12, 1.8e-11), (5.7e-9, 1.6e-8),
    (1.2e-3, 1.7e-8),
)  # fmt: skip
JULIA = Costs(
    (5.3e-4, 1.3e-3), (3.4e-9, 7.1e-9), (4.1e-11, 8.2e-11), (1.9e-7, 2.4e-7), (6.4e-12, 2.9e-11), (1.1e-9, 6.5e-9),
    (2e-4, 9.3e-10),
)  # fmt: skip
START = 2.3  # seconds to start the worker and compile its kernels

_saved = 0.0
_lock = threading.Lock()
_broken: set[Julia] = set()


def julia_pays(work: Work, *, whole: bool = False) -> bool:
    """Return whether Julia is the quicker engine for this work, its start included; if so, it has been started.

    Args:
        work: what there is to do now.
        whole: it is all that there is to do: decide by it alone, not by what else this process did.

    Warns:
        UserWarning: Julia would be the quicker one, but does not start; said once.
    """
    global _saved
    gain = TORCH.seconds(work) - JULIA.seconds(work)
    if gain <= 0:
        return False
    if whole:
        due = gain > START
    elif worker_running():
        return True
    else:
        with _lock:
            _saved += gain
            due = _saved > START
    return due and julia_available() and _starts()


def _starts() -> bool:
    """Start the worker, unless this Julia has already failed to."""
    julia = find_julia()
    if julia in _broken:
        return False
    try:
        describe()
    except JuliaError as error:
        _broken.add(julia)
        warnings.warn(f'engine="auto" goes on with torch, since Julia does not start: {error}', stacklevel=2)
        return False
    return True
