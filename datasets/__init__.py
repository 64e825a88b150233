"""Ensembles of networks, their activity, and the labelled cubes that hold both."""

from neurosde.datasets.connectome import load_connectome
from neurosde.datasets.ensembles import (
    Block,
    Dale,
    GainMixture,
    Gaussian,
    LowRank,
    Sparse,
    make_ensemble,
    sample_weight_matrix,
)
from neurosde.datasets.generation import generate_activity_trials
from neurosde.datasets.loaders import CubeDataset, loader
from neurosde.datasets.schema import validate_cube

__all__ = [
    "Block",
    "CubeDataset",
    "Dale",
    "GainMixture",
    "Gaussian",
    "LowRank",
    "Sparse",
    "generate_activity_trials",
    "load_connectome",
    "loader",
    "make_ensemble",
    "sample_weight_matrix",
    "validate_cube",
]
