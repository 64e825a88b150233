"""Posteriors over weights."""

from neurosde.models.empirical_bayes import EmpiricalBayes, empirical_bayes, least_squares, ridge
from neurosde.models.gaussian_posterior import GaussianPosterior
from neurosde.models.inference import Inference, InferenceConfig, infer
from neurosde.models.posterior_file import open_posterior, save_posterior

__all__ = [
    "EmpiricalBayes",
    "GaussianPosterior",
    "Inference",
    "InferenceConfig",
    "empirical_bayes",
    "infer",
    "least_squares",
    "open_posterior",
    "ridge",
    "save_posterior",
]
