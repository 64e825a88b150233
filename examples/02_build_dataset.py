"""Build a labelled cube of networks obeying Dale's law, look at it with xarray, and feed it to torch.

    python examples/02_build_dataset.py

prints, among others,

    neurons per type: 40 excitatory, 10 inhibitory
    batches: [32, 32, 32, 4] networks, activity (32, 5, 100, 50)
    figure: figures/02_build_dataset.png
"""

import argparse
from pathlib import Path

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from neurosde import summary_stats
from neurosde.datasets import Dale, loader
from neurosde.datasets.build_dataset import DatasetConfig, build_dataset

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--smoke", action="store_true", help="a few small networks")
parser.add_argument("--out-dir", type=Path, default=Path("data/raw/dale"))
parser.add_argument("--out", type=Path, default=Path("figures/02_build_dataset.png"))
options = parser.parse_args()
size = {"num_networks": 6, "N": 10, "T": 30} if options.smoke else {"num_networks": 100, "N": 50, "T": 100}

path = build_dataset(
    DatasetConfig(out_dir=options.out_dir, num_trials=5, noise_std=0.2, ensemble=Dale(gain=0.8), **size)
)
with xr.open_dataset(path) as cube:
    print(cube)
    kinds = cube.cell_type.isel(network=0)
    print(f"neurons per type: {int((kinds > 0).sum())} excitatory, {int((kinds < 0).sum())} inhibitory")
    stats = summary_stats(cube.activity, dt=0.1).mean("trial")
    print(f"dimension of the activity: {float(stats.dimension.mean()):.1f} of {cube.sizes['neuron']}")

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    W = cube.weights.isel(network=0)
    limit = float(np.abs(W).quantile(0.99))
    image = left.imshow(W, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    left.set(title="weights of network 0", xlabel="presynaptic", ylabel="postsynaptic")
    figure.colorbar(image, ax=left)
    right.plot(cube.time, cube.activity.sel(network=0, trial=0)[:, ::5], linewidth=0.8)
    right.set(title="activity, one trial", xlabel="time (tau)", ylabel="x")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=150)

batches = list(loader(path, ("weights", "activity"), batch_size=32, shuffle=True))
shape = tuple(batches[0]["activity"].shape)
print(f"batches: {[len(batch['weights']) for batch in batches]} networks, activity {shape}")
print(f"figure: {options.out}")
