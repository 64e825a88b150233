"""Shared set-up: figures go nowhere near a display, and what a test does not seed itself is seeded here."""

import os
from pathlib import Path

import pytest
import torch

from neurosde.cli import main
from neurosde.julia import Julia, JuliaNotFoundError, find_julia

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
