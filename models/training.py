"""Training a prior: noise, the whitened loss, and Lightning for the loop.

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

from neurosde.models.denoiser import PRESETS, PairNetwork
from neurosde.models.diffusion_prior import DiffusionPrior, PriorConfig, load_prior
from neurosde.models.edm import SIGMA_MIN, Evidence, fold
from neurosde.models.network_denoiser import evaluate_network
from neurosde.models.training_config import PriorTraining
from neurosde.models.training_data import training_data

LOG_SIGMA_MEAN, LOG_SIGMA_STD = 0.5, 1.6
UNIFORM_SHARE = 0.3
VALIDATION_SIGMAS = (0.003, 0.02, 0.1, 0.5, 1.0, 3.0, 8.0, 25.0)


class PriorModule(pl.LightningModule):
    """The network, its running average, the loss and the optimiser.

    Args:
        config: the training.
    """

    def __init__(self, config: PriorTraining) -> None:
        super().__init__()
        self.config = config
        self.data = training_data(config)
        sizes = replace(PRESETS[config.preset], families=self.data.families)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.network = PairNetwork(sizes, config.checkpoint_above)
        if config.start is not None:
            _start_from(self.network, config.start)
        self.average = AveragedModel(self.network, multi_avg_fn=_running_average(config.ema))
        self.average.requires_grad_(False)

    def training_step(self, batch: dict[str, Any], _: int) -> Tensor:
        """Loss of a batch."""
        step = int(batch["step"])
        generator = self._generator(1, step, self.global_rank)
        J, family = self.data.matrices(batch, generator)
        if family is not None:
            told = torch.rand(family.shape, generator=generator, device=J.device) >= self.config.family_dropout
            family = torch.where(told, family, 0)
        sigma = training_sigmas(len(J), self.config.sigma_max, generator)
        loss = denoising_loss(self.network, J, sigma, family, generator).mean()
        self.log("loss", loss.float(), prog_bar=True)
        return loss

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
        J, family = self.data.matrices(batch, self._generator(2, 0))
        generator = self._generator(2, 1)
        for sigma in VALIDATION_SIGMAS:
            levels = torch.full((len(J),), sigma, dtype=torch.float64, device=J.device)
            loss = denoising_loss(self.average.module, J, levels, family, generator).mean().float()
            for name in (f"validation/N={J.shape[-1]}/sigma={sigma}", "validation/loss"):
                self.log(name, loss, on_epoch=True, batch_size=1, sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Adam, with a warm-up and a cosine down to 0."""
        c = self.config
        optimiser = torch.optim.Adam(self.network.parameters(), lr=c.learning_rate, betas=(0.9, 0.99))

        def factor(step: int) -> float:
            return min(1.0, (step + 1) / c.warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / c.steps)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def prior(self) -> DiffusionPrior:
        """Return the prior as it is trained so far: the running average."""
        config = PriorConfig(
            self.network.config, self.data.gain_rms, tuple(dict.fromkeys(self.data.sizes)), self.config.sigma_max,
            self.data.sparse, self.config.contents() | {"steps_done": self.global_step},
        )  # fmt: skip
        network = PairNetwork(config.network)
        network.load_state_dict(self.average.module.state_dict())
        return DiffusionPrior(network, config)

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
    network: torch.nn.Module, J: Tensor, sigma: Tensor, family: Tensor | None, generator: torch.Generator
) -> Tensor:
    """Whitened denoising error of each matrix (count,): 1 for the Gaussian prior's denoiser where that is the truth."""
    noise = torch.randn(J.shape, generator=generator, dtype=J.dtype, device=J.device)
    folded = fold(J + sigma[:, None, None] * noise, sigma, Evidence.none(J.shape[-1], J.device))
    return folded.loss(evaluate_network(network, folded, sigma, family), J)


def _start_from(network: PairNetwork, name: str) -> None:
    """Take the weights of a prior over."""
    there = load_prior(name).network
    if there.config != network.config:
        raise ValueError(
            f"{name} must have the network that is to be trained, {network.config}; got {there.config}. Choose another "
            "preset, or as many ensembles."
        )
    network.load_state_dict(there.state_dict())


def _running_average(decay: float) -> Any:
    """Exponential average over the last tenth of the steps so far, at most over 1/(1 − decay)."""

    @torch.no_grad()
    def update(average: list[Tensor], present: list[Tensor], count: Tensor) -> None:
        torch._foreach_lerp_(average, present, max(1 - decay, 10.0 / (10.0 + float(count))))

    return update
