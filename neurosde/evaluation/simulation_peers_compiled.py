"""What `neurosde benchmark simulate` compares with that is compiled: torch.compile, jax, diffrax and numba.

Compilation is not timed: the first call is made before. jax, diffrax and numba come with neurosde[peers].

References:
    diffrax: On neural differential equations (Kidger, 2022), https://arxiv.org/abs/2202.02435
"""

from __future__ import annotations

import importlib
import math
import time
from abc import abstractmethod
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neurosde.evaluation.simulation_peers import BACKWARD, FORWARD, Case, Method, TorchLoop, TorchMethod


class TorchCompile(TorchLoop):
    """torch.compile of the whole loop where there is one trial of one network, else of its step."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        torch.compiler.reset()  # earlier cases count towards a limit beyond which nothing is compiled
        self.loop = super().solve
        if self.single:
            self.loop = torch.compile(self.loop, dynamic=False)
        else:
            self.step = torch.compile(self.step, dynamic=False)  # type: ignore[method-assign]

    def forward(self) -> Tensor:
        """See `Method`."""
        if self.single:
            return TorchMethod.forward(self)
        with torch.no_grad():
            h, W = self.h0, self.W.mT
            path = torch.empty(self.case.shape)
            path[0] = h
            for t in range(1, len(path)):
                h = self.step(h, W, torch.randn(self.state, generator=self.generator) if self.scale else None)
                path[t] = h
        return path

    def solve(self) -> Tensor:
        """See `TorchMethod`."""
        return self.loop()


def _peer(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} is not installed; pip install 'neurosde[peers]'") from error


class JaxMethod(Method):
    """A jitted simulator of one network, mapped over networks by lax.map or vmap, whichever is quicker."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.jax = jax = _peer("jax")
        self.key = jax.random.key(case.seed)
        self.W, self.h0 = jax.numpy.asarray(case.weights.numpy()), jax.numpy.asarray(case.h0.numpy())
        # (M, T, K, N): each network's path is contiguous
        self.cotangent = jax.numpy.asarray(case.cotangent.transpose(0, 1).contiguous().numpy())
        self.chosen: dict[str, Any] = {}

    @abstractmethod
    def one(self, which: str, W: Any, h0: Any, key: Any) -> Any:
        """Path (T, K, N) of one network, for the pass `which`."""

    def forward(self) -> Any:
        """See `Method`."""
        return self._quickest(FORWARD)(self.W, self.h0, self.key)

    def backward(self) -> Any:
        """See `Method`; the path is an output too, as it is with torch."""
        return self._quickest(BACKWARD)(self.W, self.h0, self.key, self.cotangent)[1]

    def path(self, result: Any) -> Tensor:
        """See `Method`."""
        return torch.from_numpy(np.array(result)).transpose(0, 1)

    def weights_gradient(self, result: Any) -> Tensor:
        """See `Method`."""
        return torch.from_numpy(np.array(result[0]))

    def _quickest(self, which: str) -> Any:
        """Compile both ways of mapping over networks, time each once, keep the quicker."""
        if which not in self.chosen:
            ways = ["vmap"] if len(self.W) == 1 else ["map", "vmap"]
            arguments = (self.W, self.h0, self.key) + ((self.cotangent,) if which == BACKWARD else ())
            taken = {}
            for way in ways:
                run = self._compiled(which, way)
                run(*arguments)
                start = time.perf_counter()
                run(*arguments)
                taken[time.perf_counter() - start] = run
            self.chosen[which] = taken[min(taken)]
        return self.chosen[which]

    def _compiled(self, which: str, way: str) -> Any:
        jax = self.jax

        def simulate(W: Any, h0: Any, key: Any) -> Any:
            keys = jax.random.split(key, len(W))
            if way == "vmap":
                return jax.vmap(partial(self.one, which))(W, h0, keys)
            return jax.lax.map(lambda arguments: self.one(which, *arguments), (W, h0, keys))

        def differentiate(W: Any, h0: Any, key: Any, cotangent: Any) -> Any:
            path, pull = jax.vjp(lambda W, h0: simulate(W, h0, key), W, h0)
            return path, pull(cotangent)

        run = jax.jit(simulate if which == FORWARD else differentiate)
        return lambda *arguments: jax.block_until_ready(run(*arguments))


class JaxScan(JaxMethod):
    """jax.lax.scan over the steps."""

    def one(self, which: str, W: Any, h0: Any, key: Any) -> Any:
        """See `JaxMethod`; scan emits the state before each of T steps, so the last step is one too many."""
        jax, c = self.jax, self.case
        decay, gain, scale = 1 - c.dt / c.tau, c.dt / c.tau, math.sqrt(c.dt) * c.noise_std

        def step(h: Any, key: Any) -> Any:
            following = decay * h + gain * (jax.numpy.tanh(h) @ W.T)
            if scale:
                following = following + scale * jax.random.normal(key, h.shape)
            return following, h

        keys = jax.random.split(key, c.shape[0]) if scale else None
        return jax.lax.scan(step, h0, keys, length=c.shape[0])[1]


class Diffrax(JaxMethod):
    """diffrax.Euler with its default adjoint; time counts steps, so that no rounding adds one."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.diffrax, self.lineax = _peer("diffrax"), _peer("lineax")

    def one(self, which: str, W: Any, h0: Any, key: Any) -> Any:
        """See `JaxMethod`."""
        jax, dfx, c = self.jax, self.diffrax, self.case
        steps, scale = c.shape[0] - 1, math.sqrt(c.dt) * c.noise_std
        options: dict[str, Any] = {"saveat": dfx.SaveAt(t0=True, steps=True), "max_steps": steps}
        terms = dfx.ODETerm(lambda t, h, args: c.dt / c.tau * (jax.numpy.tanh(h) @ W.T - h))
        if scale:
            shape = jax.ShapeDtypeStruct(h0.shape, h0.dtype)
            if which == FORWARD:  # the quicker noise, which has no reverse mode
                noise, options["adjoint"] = dfx.UnsafeBrownianPath(shape, key), dfx.ForwardMode()
            else:
                noise = dfx.VirtualBrownianTree(0.0, float(steps), 0.5, shape, key)
            sigma = self.lineax.DiagonalLinearOperator(jax.numpy.full_like(h0, scale))
            terms = dfx.MultiTerm(terms, dfx.ControlTerm(lambda t, h, args: sigma, noise))
        return dfx.diffeqsolve(terms, dfx.Euler(), 0.0, float(steps), 1.0, h0, **options).ys


class Numba(Method):
    """numba's parallel loops over networks and trials; no gradient."""

    passes = (FORWARD,)

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        numba = _peer("numba")
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
        self.run = numba.njit(parallel=True, fastmath=True)(_numba_loops(numba.prange))

    def forward(self) -> np.ndarray:
        """See `Method`."""
        c = self.case
        return self.run(c.weights.numpy(), c.h0.numpy(), c.shape[0], c.dt / c.tau, math.sqrt(c.dt) * c.noise_std)

    def path(self, result: np.ndarray) -> Tensor:
        """See `Method`."""
        return torch.from_numpy(result).permute(2, 0, 1, 3)


def _numba_loops(prange: Any) -> Any:
    def simulate(W, h0, T, gain, scale):  # type: ignore[no-untyped-def]
        M, K, N = h0.shape
        gain, scale = np.float32(gain), np.float32(scale)
        path = np.empty((M, K, T, N), np.float32)
        for run in prange(M * K):
            m, k = run // K, run % K
            x = np.empty(N, np.float32)
            path[m, k, 0] = h0[m, k]
            for t in range(T - 1):
                h = path[m, k, t]
                for j in range(N):
                    x[j] = np.tanh(h[j])
                for i in range(N):
                    drive = np.float32(0)
                    for j in range(N):
                        drive += W[m, i, j] * x[j]
                    following = h[i] + gain * (drive - h[i])
                    if scale > 0:
                        following += scale * np.float32(np.random.standard_normal())  # noqa: NPY002
                    path[m, k, t + 1, i] = following
        return path

    return simulate
