"""Shared set-up: figures go nowhere near a display, and what a test does not seed itself is seeded here."""

import os

import pytest
import torch

os.environ.setdefault("MPLBACKEND", "Agg")  # read when matplotlib is first imported


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
