"""Shared set-up: figures go nowhere near a display."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")
