"""Simulate rate networks below and above the onset of chaos, and differentiate through one.

    python examples/01_simulate.py

prints, up to the last digit,

    gain 0.7: activity (2000, 200), standard deviation at the end 0.000
    gain 1.0: activity (2000, 200), standard deviation at the end 0.000
    gain 1.8: activity (2000, 200), standard deviation at the end 0.677
    gradient of the final activity with respect to W: (200, 200), norm 47.75
    figure: figures/01_simulate.png
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

from neurosde import simulate_rate_network
from neurosde.datasets import sample_weight_matrix

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--smoke", action="store_true", help="a few steps of a small network")
parser.add_argument("--out", type=Path, default=Path("figures/01_simulate.png"))
options = parser.parse_args()
N, T = (20, 50) if options.smoke else (200, 2000)

gains = (0.7, 1.0, 1.8)
figure = Figure(figsize=(8, 5), layout="constrained")
for axis, gain in zip(figure.subplots(len(gains), 1, sharex=True), gains, strict=True):
    W = sample_weight_matrix(N, gain, generator=1)
    h0 = torch.randn(N, generator=torch.Generator().manual_seed(0))
    activity = simulate_rate_network(W, h0, T, dt=0.1, tau=1.0)
    spread = float(activity[-1].std())
    print(f"gain {gain}: activity {tuple(activity.shape)}, standard deviation at the end {spread:.3f}")
    axis.plot(torch.arange(T) * 0.1, activity[:, :8], linewidth=0.8)
    axis.set(ylabel=f"x, g = {gain}", ylim=(-1.05, 1.05))
axis.set_xlabel("time (tau)")

# The default gradient is the exact adjoint of the scheme; the returned activity is its whole tape.
W = sample_weight_matrix(N, 0.9, generator=1).requires_grad_()
simulate_rate_network(W, h0, 30, dt=0.1, tau=1.0)[-1].square().sum().backward()
print(f"gradient of the final activity with respect to W: {tuple(W.grad.shape)}, norm {float(W.grad.norm()):.2f}")

options.out.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(options.out, dpi=150)
print(f"figure: {options.out}")
