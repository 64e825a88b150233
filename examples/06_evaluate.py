"""How much does a longer recording tell? The exact posterior over W against the length of the recording.

    python examples/06_evaluate.py

prints a line for each length, among them

    T =  100: relative error 0.847, contraction 0.29, 90 % coverage 0.904
    T = 3000: relative error 0.360, contraction 0.86, 90 % coverage 0.907
    figure: figures/06_evaluate.png
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from neurosde.datasets import generate_activity_trials, sample_weight_matrix
from neurosde.datasets.recordings import Recording
from neurosde.evaluation.calibration import coverage
from neurosde.evaluation.recovery import recovery
from neurosde.models import InferenceConfig, infer

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--smoke", action="store_true", help="few networks and short recordings")
parser.add_argument("--out", type=Path, default=Path("figures/06_evaluate.png"))
options = parser.parse_args()
networks, lengths = (2, (50, 100)) if options.smoke else (10, (100, 300, 1000, 3000))

config = InferenceConfig(draws=200, predictive_draws=0)  # gain and noise are estimated from each recording
rows = []
for T in lengths:
    for seed in range(networks):
        W = sample_weight_matrix(20, 1.5, generator=seed, dtype=torch.float64)
        activity = generate_activity_trials(W, 1, T, 0.1, noise_std=0.3, generator=seed)
        result = infer(Recording(activity.numpy(), f"network {seed}", dt=0.1), config)
        error = recovery(result.posterior.mean.numpy(), W.numpy())["relative_error"]
        covered = coverage(result.draws.numpy(), W.numpy(), np.array([0.9]))[0]
        rows.append((T, error, result.posterior.contraction, covered))
    mean = np.mean([row for row in rows if row[0] == T], axis=0)
    print(f"T = {T:4d}: relative error {mean[1]:.3f}, contraction {mean[2]:.2f}, 90 % coverage {mean[3]:.3f}")

table = np.array(rows)
figure = Figure(figsize=(8, 3.2), layout="constrained")
titles = ("relative error", "contraction", "90 % coverage")
for axis, column, title in zip(figure.subplots(1, 3), (1, 2, 3), titles, strict=True):
    axis.plot(table[:, 0], table[:, column], "o", color="#808080", markersize=3)
    axis.plot(lengths, [table[table[:, 0] == T, column].mean() for T in lengths], "o-", color="#2166ac")
    axis.set(xscale="log", xlabel="times recorded", title=title)
axis.axhline(0.9, color="k", linewidth=0.8)
options.out.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(options.out, dpi=150)
print(f"figure: {options.out}")
