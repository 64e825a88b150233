"""Shared set-up: figures go nowhere near a display, and what a test does not seed itself is seeded here."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from problems import normal

from neurosde.cli import main
from neurosde.julia import Julia, JuliaNotFoundError, find_julia
from neurosde.models import Evidence

os.environ.setdefault("MPLBACKEND", "Agg")  # read when matplotlib is first imported


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def julia() -> Julia:
    """This machine's Julia. Without one the test is skipped, or fails if NEUROSDE_REQUIRE_JULIA is 1."""
    try:
        return find_julia()
    except JuliaNotFoundError as error:
        if os.environ.get("NEUROSDE_REQUIRE_JULIA") == "1":
            pytest.fail(f"NEUROSDE_REQUIRE_JULIA is 1, but {error}")
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def evidence_of() -> Callable[..., Evidence]:
    """Evidence of a made-up recording: how much it tells is set, and what it tells is true of J but for the noise."""

    def make(N: int, low: float = 0.3, high: float = 200.0, seed: int = 0, J: torch.Tensor | None = None) -> Evidence:
        """Λ has N eigenvalues from `low` to `high`, B is J Λ and noise of covariance Λ; J (post, N) or normal."""
        U = torch.linalg.qr(normal(N, N, seed=seed))[0]
        eigenvalues = torch.logspace(math.log10(low), math.log10(high), N, dtype=torch.float64)
        J = normal(N, N, seed=seed + 1) if J is None else J
        cross = (J @ U) * eigenvalues + normal(*J.shape, seed=seed + 2) * eigenvalues.sqrt()
        return Evidence(eigenvalues, U, cross)

    return make


@pytest.fixture(scope="session")
def posteriors(tmp_path_factory) -> dict[str, Path]:
    """A cube of two networks, and posteriors of the second: exact, trained (cfg), of few exact draws, those refined."""
    folder = tmp_path_factory.mktemp("posteriors")
    files = {"cube": folder / "data" / "cube.nc"} | {
        name: folder / f"{name}.nc" for name in ("exact", "cfg", "few", "refined")
    }
    build = ["build-dataset", "--out-dir", folder / "data", "--num-networks", 2, "--N", 6, "--num-trials", 2]
    infer = ["infer", files["cube"], "--network", 1, "--predictive-draws", 6]
    for command in (
        [*build, "--T", 80, "--ensemble", "dale", "--noise-std", 0.3, "--seed", 1],
        [*infer, "--draws", 400, "--out", files["exact"]],
        [*infer, "--draws", 40, "--method", "cfg", "--steps", 12, "--out", files["cfg"]],
        [*infer, "--draws", 40, "--out", files["few"]],
        ["refine", files["few"], "--sweeps", 8, "--family", "dale", "--out", files["refined"]],
    ):
        assert main([str(word) for word in command]) == 0
    return files
