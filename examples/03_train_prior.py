"""Train a small diffusion prior over weights that obey Dale's law, and compare its draws with the real ones.

    python examples/03_train_prior.py

trains for about a minute on a CPU and prints something like

    columns of one sign: 92.7 % of drawn neurons, 100.0 % of fresh ones
    spectral radius: 2.02 ± 0.70 drawn, 2.03 ± 0.77 fresh
    figure: figures/03_train_prior.png

A training that was interrupted goes on where it was when the command is given again; name another folder, --prior, to
train anew.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from neurosde.datasets.ensembles import make_ensemble
from neurosde.models.training_config import PriorTraining
from neurosde.models.training_run import train_prior

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
parser.add_argument("--out", type=Path, default=Path("figures/03_train_prior.png"))
parser.add_argument("--prior", type=Path, default=Path("results/03_prior"), help="folder of the prior")
options = parser.parse_args()

ensemble = make_ensemble("dale", gain=0.8, gain_high=2.0)  # a gain that nobody knows
training = PriorTraining(
    ensembles=(ensemble,), sizes=(8, 12, 20), preset="tiny", steps=20 if options.smoke else 1000, batch_entries=6400
)
prior = train_prior(training, options.prior)

N, count = 16, 20 if options.smoke else 500  # a size that it was not trained with
drawn = prior.sample(count, N, generator=0, progress=True)
fresh = ensemble.sample_weights(count, N, torch.Generator().manual_seed(1))

radii, signs = [], []
for W in (drawn, fresh):
    radii.append(torch.linalg.eigvals(W).abs().amax(-1))
    signs.append(100 * float((W.sign().mean(-2).abs() == 1).double().mean()))
print(f"columns of one sign: {signs[0]:.1f} % of drawn neurons, {signs[1]:.1f} % of fresh ones")
moments = [float(moment(radius)) for radius in radii for moment in (torch.mean, torch.std)]
print("spectral radius: {:.2f} ± {:.2f} drawn, {:.2f} ± {:.2f} fresh".format(*moments))

figure = Figure(figsize=(10, 3.2), layout="constrained")
axes = figure.subplots(1, 4)
for axis, W, title in zip(axes, (drawn[0], fresh[0]), ("drawn", "fresh"), strict=False):
    order = W.mean(0).argsort(descending=True)  # excitatory neurons first
    limit = float(W.abs().max())
    axis.imshow(W[order][:, order].numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
    axis.set(title=title, xlabel="presynaptic", ylabel="postsynaptic")
for W, colour, name in ((drawn, "#b2182b", "drawn"), (fresh, "#2166ac", "fresh")):
    eigenvalues = torch.linalg.eigvals(W[:50]).flatten().numpy()
    axes[2].plot(eigenvalues.real, eigenvalues.imag, ".", color=colour, markersize=2, alpha=0.5, label=name)
    bins = np.linspace(-3, 3, 61)
    axes[3].hist(W.flatten().numpy(), bins, histtype="step", density=True, color=colour, label=name)
axes[2].set(title="eigenvalues", xlabel="real", ylabel="imaginary", aspect="equal")
axes[3].set(title="weights", xlabel="weight", ylabel="density", yscale="log")
axes[3].legend(frameon=False)
options.out.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(options.out, dpi=150)
print(f"figure: {options.out}")
