"""Training a prior or a posterior: noise, the whitened loss, and Lightning for the loop.

Step k depends on the seed, on k and on the process's rank alone: which N, which matrices, which noise. A training that
was interrupted and gone on with is therefore the same as one that never was.

Noise levels are log-normal, or, for a share of them, log-uniform over the whole range, whose ends the log-normal hardly
visits: there zeros are told from small weights, and columns of one sign from columns of none. Their quantiles are
stratified within a batch.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from neurosde.datasets.ensemble_options import plain_parameters
from neurosde.models.denoiser import PRESETS, PairNetwork
from neurosde.models.diffusion_cfg import CFGPosterior, PosteriorConfig
from neurosde.models.diffusion_prior import DiffusionPrior, PriorConfig
from neurosde.models.edm import SIGMA_MIN, fold
from neurosde.models.graphed_network import GraphedNetwork
from neurosde.models.model_files import load_network
from neurosde.models.network_denoiser import evaluate_network
from neurosde.models.structured_mean import structured_mean
from neurosde.models.teachers import Teachers
from neurosde.models.training_config import PosteriorTraining, PriorTraining
from neurosde.models.training_data import Examples, TrainingData, training_data
from neurosde.models.training_recordings import CubeRecordings, SimulatedRecordings, recorded_data

LOG_SIGMA_MEAN, LOG_SIGMA_STD = 0.5, 1.6
UNIFORM_SHARE = 0.3
FAMILY_WEIGHT = 0.02  # of the surprise at the family, beside the denoising error
_OF_FAMILIES = ("family.weight", "known.families.weight", "known.families.bias")
VALIDATION_SIGMAS = (0.003, 0.02, 0.1, 0.5, 1.0, 3.0, 8.0, 25.0)


class DenoiserModule(pl.LightningModule):
    """The network, its running average, the loss and the optimiser.

    Args:
        config: the training.
    """

    def __init__(self, config: PriorTraining) -> None:
        super().__init__()
        self.config = config
        self.data: TrainingData = (
            recorded_data(config) if isinstance(config, PosteriorTraining) else training_data(config)
        )
        self.teachers: Teachers | None = None
        if config.teachers:
            self.teachers = Teachers(config.teachers, config.ensembles, self.data.gain_rms, self.data.sizes)
        if config.preset is None and config.start is not None:
            sizes = load_network(config.start).config
        else:
            sizes = PRESETS[config.preset or "small"]
        sizes = replace(sizes, families=self.data.families, recordings=isinstance(config, PosteriorTraining))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.network = PairNetwork(sizes, config.checkpoint_above)
        if config.start is not None:
            _start_from(self.network, config.start)
        self.replayed = GraphedNetwork(self.network)
        self.average = AveragedModel(self.network, multi_avg_fn=_running_average(config.ema))
        self.average.requires_grad_(False)

    def training_step(self, batch: dict[str, Any], _: int) -> Tensor:
        """Loss of a batch."""
        step = int(batch["step"])
        generator = self._generator(1, step, self.global_rank)
        examples = self.data.examples(batch, generator)
        if self.data.families:
            examples = _forgetful(examples, self.config.family_dropout, generator)
        sigma = training_sigmas(len(examples.J), self.config.sigma_max, generator)
        trainer: Any = self.trainer
        network = self.network if trainer.world_size > 1 else self.replayed
        error, surprise = denoising_loss(network, examples, sigma, generator, self.teachers)
        loss = error.mean()
        self.log("loss", loss.float(), prog_bar=True)
        return loss + FAMILY_WEIGHT * surprise.mean()

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """Move the weights on, and their average with them: states are saved before `on_train_batch_end`."""
        super().optimizer_step(*arguments, **options)
        self.average.update_parameters(self.network)

    def on_train_batch_end(self, outputs: Any, *_: Any) -> None:
        """Look at the loss whenever it is logged."""
        trainer: Any = self.trainer
        if self.global_step % trainer.log_every_n_steps == 0:
            self._check_finite(outputs["loss"])

    def on_save_checkpoint(self, _: dict[str, Any]) -> None:
        """Keep a training that diverged out of its state."""
        self._check_finite(*self.network.parameters())

    def validation_step(self, batch: dict[str, Any], _: int) -> None:
        """Loss of the running average on held-out matrices, at fixed noise levels."""
        examples = replace(self.data.examples(batch, self._generator(2, 0)), law=None)  # the error itself
        J, generator = examples.J, self._generator(2, 1)
        average: Any = self.average.module
        for sigma in VALIDATION_SIGMAS:
            levels = torch.full((len(J),), sigma, dtype=torch.float64, device=J.device)
            loss = denoising_loss(average, examples, levels, generator)[0].mean().float()
            for name in (f"validation/N={J.shape[-1]}/sigma={sigma}", "validation/loss"):
                self.log(name, loss, on_epoch=True, batch_size=1, sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Adam, with a warm-up and a cosine down to 0."""
        c = self.config
        optimiser = torch.optim.Adam(
            self.network.parameters(), lr=c.learning_rate, betas=(0.9, 0.99), fused=self.device.type == "cuda"
        )

        def factor(step: int) -> float:
            return min(1.0, (step + 1) / c.warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / c.steps)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def model(self) -> DiffusionPrior | CFGPosterior:
        """Return what is trained so far: the running average."""
        settings: dict[str, Any] = {
            "network": self.network.config,
            "gain_rms": self.data.gain_rms,
            "sizes": tuple(dict.fromkeys(self.data.sizes)),
            "sigma_max": self.config.sigma_max,
            "sparse": self.data.sparse,
            "training": self.config.contents() | {"steps_done": self.global_step},
        }
        if isinstance(self.data, CubeRecordings):  # which the configuration does not name
            settings["training"]["of_cubes"] = [plain_parameters(kind) for kind in dict.fromkeys(self.data.ensembles)]
        network = PairNetwork(self.network.config)
        network.load_state_dict(self.average.module.state_dict())
        if isinstance(self.data, SimulatedRecordings | CubeRecordings):
            return CFGPosterior(network, PosteriorConfig(**settings, gains=self.data.gains))
        return DiffusionPrior(network, PriorConfig(**settings))

    def _check_finite(self, *tensors: Tensor) -> None:
        # Once a loss is not finite the weights and all further losses are not: to look at times is enough.
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            raise FloatingPointError(
                f"the loss is not finite at or shortly before step {self.global_step}; lower --learning-rate (now "
                f"{self.config.learning_rate:g}), or lengthen --warmup, and start anew with another --out."
            )

    def _generator(self, *key: int) -> torch.Generator:
        seed = np.random.SeedSequence((self.config.seed, *key)).generate_state(1, np.uint64)[0]
        return torch.Generator(self.device).manual_seed(int(seed >> np.uint64(1)))


def training_sigmas(count: int, sigma_max: float, generator: torch.Generator) -> Tensor:
    """Noise levels of a batch, shape (count,), float64, in random order."""
    device = generator.device
    order = torch.randperm(count, generator=generator, device=device)
    within = torch.rand(count, generator=generator, dtype=torch.float64, device=device)
    quantiles = ((order + within) / count).clamp(1e-9, 1 - 1e-9)
    low, high = math.log(SIGMA_MIN), math.log(sigma_max)
    normal = (LOG_SIGMA_MEAN + LOG_SIGMA_STD * torch.special.ndtri(quantiles)).clamp(low, high)
    everywhere = torch.rand(count, generator=generator, device=device) < UNIFORM_SHARE
    return torch.where(everywhere, low + (high - low) * quantiles, normal).exp()


def denoising_loss(
    network: PairNetwork | GraphedNetwork,
    examples: Examples,
    sigma: Tensor,
    generator: torch.Generator,
    teachers: Teachers | None = None,
) -> tuple[Tensor, Tensor]:
    """Whitened denoising error of each matrix, and the surprise at its family.

    The error is that about the mean of the matrix given its structure, where that is known, or about what a teacher of
    its ensemble says, and of the same gradient in the mean; else about the matrix
    (`neurosde.models.structured_mean`, `neurosde.models.teachers`).

    Returns:
        The error (about the matrix: 1 for the Gaussian prior's denoiser where that is the truth), and −log p(family),
        0 for a network that does not tell families, each of shape (count,), float64.
    """
    J, law, evidence = examples.J, examples.law, examples.evidence
    noise = torch.randn(J.shape, generator=generator, dtype=J.dtype, device=J.device)
    x = J + sigma[:, None, None] * noise
    folded = fold(x, sigma, evidence)
    F, families = evaluate_network(network, folded, sigma, examples.told)
    if teachers is not None:
        target = teachers.mean(x, sigma, (examples.family - 1).clamp(min=0))
    else:
        target = J if law is None else structured_mean(law, J, x, sigma, evidence)
    error = folded.loss(F, target)
    if not families.shape[-1]:
        return error, torch.zeros_like(error)
    index = (examples.family - 1).clamp(min=0)
    return error, -families.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def _forgetful(examples: Examples, dropout: float, generator: torch.Generator) -> Examples:
    """Do not tell the family of some."""
    family = examples.told.family
    told = torch.rand(family.shape, generator=generator, device=family.device) >= dropout
    return replace(examples, told=replace(examples.told, family=torch.where(told, family, 0)))


def _start_from(network: PairNetwork, name: str) -> None:
    """Take the weights of a trained network over; of ensembles that it does not know, those of one that is not told."""
    there, mine = load_network(name), network.config
    free = {name: getattr(mine, name) for name in ("families", "recordings", "blocks", "thresholds")}
    alike = replace(there.config, **free) == mine and there.config.thresholds in ((), mine.thresholds)
    if not alike or there.config.blocks > mine.blocks:
        raise ValueError(
            f"{name} must be of the sizes that are to be trained, {mine}, with as many blocks or fewer; got "
            f"{there.config}. Choose another preset."
        )
    with torch.no_grad():
        for name, parameter in network.blocks[there.config.blocks :].named_parameters():
            if name.split(".")[1] in ("update", "spread"):  # what blocks add: new ones at first nothing
                parameter.zero_()
    state, theirs = network.state_dict(), there.state_dict()
    shared = {key: value for key, value in theirs.items() if key in state and not key.startswith(_OF_FAMILIES)}
    state |= shared
    known = {family: k for k, family in enumerate(there.config.families)}
    table = theirs.get("family.weight", torch.zeros(1, mine.width))
    if mine.families:
        state["family.weight"] = table[[0, *(1 + known.get(family, -1) for family in mine.families)]]
    else:
        state["condition.2.bias"] = state["condition.2.bias"] + table[0]
    for key in _OF_FAMILIES[1:]:
        if key in theirs and key in state and set(mine.families) <= set(known):
            state[key] = theirs[key][[known[family] for family in mine.families] or [0]]
    network.load_state_dict(state)


def _running_average(decay: float) -> Any:
    """Exponential average over the last tenth of the steps so far, at most over 1/(1 − decay)."""

    @torch.no_grad()
    def update(average: list[Tensor], present: list[Tensor], count: Tensor) -> None:
        torch._foreach_lerp_(average, present, max(1 - decay, 10.0 / (10.0 + float(count))))

    return update
