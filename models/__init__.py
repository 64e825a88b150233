"""Priors and posteriors over weights."""

from neurosde.models.analytic import ScaleMixtureDenoiser, SpikeAndSlabDenoiser, SpikeAndSlabMixtureDenoiser
from neurosde.models.analytic_dale import DaleDenoiser
from neurosde.models.analytic_low_rank import SpikedDenoiser
from neurosde.models.best_denoiser import best_denoiser
from neurosde.models.diffusion_cfg import CFGPosterior
from neurosde.models.diffusion_prior import DiffusionPrior, load_prior
from neurosde.models.dps import DiffusionPosteriorSampling, MomentMatching, PseudoinverseGuidance
from neurosde.models.edm import Denoiser, Evidence, fold, largest_sigma, noise_levels
from neurosde.models.empirical_bayes import EmpiricalBayes, empirical_bayes, least_squares, ridge
from neurosde.models.function_guidance import FunctionGradient, FunctionGuidance
from neurosde.models.gaussian_posterior import GaussianPosterior
from neurosde.models.guidance import ClassifierFreeGuidance
from neurosde.models.guided_diffusion import GuidedDiffusion
from neurosde.models.inference import Inference, infer
from neurosde.models.inference_config import InferenceConfig
from neurosde.models.lyapunov import folding_time, lyapunov_time
from neurosde.models.model_files import pretrained_names
from neurosde.models.posterior_file import open_posterior, save_posterior
from neurosde.models.rollout import RolloutLikelihood
from neurosde.models.samplers import sample
from neurosde.models.split_gibbs import SplitGibbs
from neurosde.models.twisted_smc import TwistedSMC

__all__ = [
    "CFGPosterior",
    "ClassifierFreeGuidance",
    "DaleDenoiser",
    "Denoiser",
    "DiffusionPosteriorSampling",
    "DiffusionPrior",
    "EmpiricalBayes",
    "Evidence",
    "FunctionGradient",
    "FunctionGuidance",
    "GaussianPosterior",
    "GuidedDiffusion",
    "Inference",
    "InferenceConfig",
    "MomentMatching",
    "PseudoinverseGuidance",
    "RolloutLikelihood",
    "ScaleMixtureDenoiser",
    "SpikeAndSlabDenoiser",
    "SpikeAndSlabMixtureDenoiser",
    "SpikedDenoiser",
    "SplitGibbs",
    "TwistedSMC",
    "best_denoiser",
    "empirical_bayes",
    "fold",
    "folding_time",
    "infer",
    "largest_sigma",
    "least_squares",
    "load_prior",
    "lyapunov_time",
    "noise_levels",
    "open_posterior",
    "pretrained_names",
    "ridge",
    "sample",
    "save_posterior",
]
