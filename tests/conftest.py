"""Shared set-up: figures go nowhere near a display, and what a test does not seed itself is seeded here."""

import os

import pytest
import torch

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
