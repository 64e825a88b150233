"""Infer weights through a simulator of your own, with a trained diffusion prior and no training.

    python examples/05_refine_dps.py

The neurons here never fire below zero, which no likelihood of neurosde knows, and states are seen every fifth step,
with noise. All that is written is log p(data | W), a function of W that torch can differentiate; the prior that comes
with neurosde for Dale's law is guided by it. It takes about a minute on a CPU and prints something like

    error of W: prior 0.99, Gaussian prior and your simulator 0.58, trained prior and your simulator 0.31
    90 % intervals of the latter cover 80 % of the weights
    figure: figures/05_refine_dps.png

Such guidance is an approximation, except for Gaussian priors and likelihoods, and its intervals are too narrow. Where
the recording is one that neurosde knows, `neurosde refine` moves draws to the posterior itself.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from neurosde.datasets import sample_weight_matrix
from neurosde.models import FunctionGuidance, ScaleMixtureDenoiser, load_prior, noise_levels, sample

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--smoke", action="store_true", help="a few draws, to see that it runs")
parser.add_argument("--out", type=Path, default=Path("figures/05_refine_dps.png"))
options = parser.parse_args()
N, pairs, steps, dt, noise = 12, 40, 5, 0.1, 0.3
draws, levels = (4, 6) if options.smoke else (48, 32)


def simulate(W: Tensor, h: Tensor) -> Tensor:
    """Voltages (…, pair, neuron) five Euler steps later, of neurons that fire at rates tanh(h) for h > 0, else not."""
    for _ in range(steps):
        h = h + dt * (-h + torch.relu(torch.tanh(h)) @ W.mT)
    return h


source = torch.Generator().manual_seed(0)
truth = sample_weight_matrix(N, g=1.5, ensemble="dale", generator=1).double()
before = torch.randn(pairs, N, generator=source, dtype=torch.float64)
after = simulate(truth, before)
after = after + noise * torch.randn(after.shape, generator=source, dtype=torch.float64)


def log_prob(W: Tensor) -> Tensor:
    """Log p(data | W), less a constant, of weights (draw, post, pre)."""
    return -0.5 * ((simulate(W, before) - after) / noise).square().sum((-1, -2))


prior = load_prior("dale")
scale = prior.scale(N)
denoisers = {"Gaussian prior": ScaleMixtureDenoiser(torch.ones(1)), "trained prior": prior.denoiser()}
found = {}
for name, denoise in denoisers.items():
    guided = FunctionGuidance(denoise, log_prob, N, scale)
    found[name] = scale * sample(guided, (draws, N, N), sigmas=noise_levels(levels), generator=0)


def error(W: Tensor) -> float:
    """Relative error."""
    return float((W - truth).norm() / truth.norm())


said = ", ".join(f"{name} and your simulator {error(W.mean(0)):.2f}" for name, W in found.items())
print(f"error of W: prior {error(prior.sample(draws, N, generator=0).mean(0)):.2f}, {said}")
low, high = found["trained prior"].quantile(torch.tensor([0.05, 0.95], dtype=torch.float64), 0)
covered = float(((low <= truth) & (truth <= high)).double().mean())
print(f"90 % intervals of the latter cover {100 * covered:.0f} % of the weights")

figure = Figure(figsize=(12.5, 3.2), layout="constrained")
axes = figure.subplots(1, 4)
limit = float(truth.abs().max())
shown = {"truth": truth} | {f"{name}, mean": W.mean(0) for name, W in found.items()}
for axis, (name, W) in zip(axes, shown.items(), strict=False):
    image = axis.imshow(W.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
    axis.set(title=name, xlabel="presynaptic", ylabel="postsynaptic")
figure.colorbar(image, ax=axes[2], label="weight")
for name, W in found.items():
    axes[3].errorbar(truth.flatten(), W.mean(0).flatten(), W.std(0).flatten(), fmt=".", alpha=0.5, label=name)
axes[3].axline((0, 0), slope=1, color="black", linewidth=0.8)
axes[3].set(xlabel="true weight", ylabel="inferred weight ± sd")
axes[3].legend(fontsize="small")
options.out.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(options.out, dpi=150)
print(f"figure: {options.out}")
