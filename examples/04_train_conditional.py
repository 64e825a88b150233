"""Train a small diffusion posterior on recordings of networks that obey Dale's law, and infer networks it never saw.

    python examples/04_train_conditional.py

trains for about a minute on a CPU and prints something like

    error of W: ridge 0.69, exact Gaussian posterior 0.66, trained posterior 0.34
    90 % intervals cover 88 % of the weights
    figure: figures/04_train_conditional.png

The posterior that comes with neurosde, `CFGPosterior.from_pretrained("base")`, was trained on five ensembles and all
sizes in the same way. A training that was interrupted goes on where it was when the command is given again; name
another folder, --posterior, to train anew.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

from neurosde.datasets.ensembles import make_ensemble
from neurosde.datasets.generation import generate_activity_trials
from neurosde.likelihood import transition_statistics
from neurosde.models.empirical_bayes import empirical_bayes, ridge
from neurosde.models.gaussian_posterior import GaussianPosterior
from neurosde.models.training_config import PosteriorTraining
from neurosde.models.training_run import train_posterior

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
parser.add_argument("--out", type=Path, default=Path("figures/04_train_conditional.png"))
parser.add_argument("--posterior", type=Path, default=Path("results/04_posterior"), help="folder of the posterior")
options = parser.parse_args()

ensemble = make_ensemble("dale", gain=0.8, gain_high=2.0)  # a gain that nobody knows
training = PosteriorTraining(
    ensembles=(ensemble,), sizes=(8, 12, 20), preset="tiny", steps=10 if options.smoke else 1000, batch_entries=6400,
    times=(50, 500), trials=(1, 10), transitions=2000,
)  # fmt: skip
model = train_posterior(training, options.posterior)

N, count, sigma = 16, 3 if options.smoke else 30, 0.3  # a size that it was not trained with
weights = ensemble.sample_weights(count, N, torch.Generator().manual_seed(1))
statistics = []
for k, W in enumerate(weights):
    _, h = generate_activity_trials(W, 2, 100, 0.1, noise_std=sigma, generator=k, return_h=True)
    statistics.append(transition_statistics(voltage=h, dt=0.1))

posterior = model.condition(statistics, noise_std=sigma)
gaussian = [
    GaussianPosterior.from_statistics(one, sigma, empirical_bayes(one, noise_std=sigma).prior_variance)
    for one in statistics
]
estimates = {
    "ridge": torch.stack([ridge(one) for one in statistics]),
    "exact Gaussian posterior": torch.stack([one.mean for one in gaussian]),
    "trained posterior": posterior.mean,
}
errors = {name: (W - weights).flatten(1).norm(dim=1) / weights.flatten(1).norm(dim=1) for name, W in estimates.items()}
print("error of W: " + ", ".join(f"{name} {float(error.mean()):.2f}" for name, error in errors.items()))
low, high = posterior.interval(0.9, draws=19 if options.smoke else 128)
print(
    f"90 % intervals cover {100 * float(((low <= weights) & (weights <= high)).double().mean()):.0f} % of the weights"
)

figure = Figure(figsize=(12.5, 3.2), layout="constrained")
axes = figure.subplots(1, 4)
limit = float(weights[0].abs().max())
shown = {
    "truth": weights[0],
    **{name: estimates[name][0] for name in ("exact Gaussian posterior", "trained posterior")},
}
for axis, (name, W) in zip(axes, shown.items(), strict=False):
    image = axis.imshow(W.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
    axis.set(title=name, xlabel="presynaptic", ylabel="postsynaptic")
figure.colorbar(image, ax=axes[2], label="weight")
axes[3].boxplot([error.numpy() for error in errors.values()], tick_labels=["ridge", "Gaussian", "trained"])
axes[3].set(ylabel="relative error of W", ylim=(0, None), title=f"{count} networks")
options.out.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(options.out, dpi=150)
print(f"figure: {options.out}")
