"""`neurosde plot`: one network of a cube as a picture: its weights, their eigenvalues, its activity."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from neurosde.datasets.files import spacing
from neurosde.datasets.shards import open_cube
from neurosde.options import OptionParser
from neurosde.provenance import whole_file

BLUE, RED, GREY = "#2166ac", "#b2182b", "#808080"
FORMATS = (".png", ".pdf", ".svg")


def network_figure(cube: xr.Dataset, k: int = 0) -> Figure:
    """Draw a network: heat map of W, eigenvalues over the circle of radius g, first trial as heat map and traces.

    Args:
        cube: a cube; only this network's data are read.
        k: position of the network.

    Raises:
        ValueError: no such network, or the dataset is not a cube.
    """
    missing = [name for name in ("weights", "activity") if name not in cube or "network" not in cube[name].dims]
    if missing:
        raise ValueError(f"a cube must hold {', '.join(missing)}(network, …); this is another kind of file.")
    count = cube.sizes["network"]
    if not 0 <= k < count:
        raise ValueError(f"network must lie between 0 and {count - 1}; got {k}.")
    network = cube.isel(network=k)
    W = network["weights"].to_numpy().astype(np.float64)
    gain = float(network["gain"]) if "gain" in network else None
    figure = Figure(figsize=(10.5, 7.2), layout="constrained")
    rows: Any = figure.subfigures(2, 1, height_ratios=(1.12, 1))
    top, bottom = rows
    left, right = top.subplots(1, 2, width_ratios=(1.15, 1))
    _draw_weights(left, W)
    _draw_eigenvalues(right, W, gain)
    heat, traces = bottom.subplots(1, 2, sharex=True)
    _draw_activity(heat, traces, network["activity"].isel(trial=0))
    index = int(network["network"]) if "network" in network.coords else k
    title = f"network {index} of {count}: {len(W)} neurons"
    if gain is not None:
        title += f", gain {gain:.3g}"
    if "noise_std" in network:
        title += f", noise {float(network['noise_std']):.3g}"
    figure.suptitle(title, fontsize=12)
    return figure


def _draw_weights(axis: Axes, W: np.ndarray) -> None:
    limit = float(np.quantile(np.abs(W), 0.995)) or float(np.abs(W).max()) or 1.0
    image = axis.imshow(W, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    axis.set(title="weights W", xlabel="presynaptic neuron", ylabel="postsynaptic neuron")
    axis.locator_params(integer=True)
    axis.figure.colorbar(image, ax=axis, label="weight", shrink=0.9, extend=_extend(W, limit))


def _extend(W: np.ndarray, limit: float) -> str:
    low, high = W.min() < -limit, W.max() > limit
    return "both" if low and high else "min" if low else "max" if high else "neither"


def _draw_eigenvalues(axis: Axes, W: np.ndarray, gain: float | None) -> None:
    values = np.linalg.eigvals(W)
    if gain is not None:
        axis.add_patch(Circle((0, 0), gain, facecolor=GREY, alpha=0.15, linewidth=0))
        axis.add_patch(Circle((0, 0), gain, fill=False, edgecolor=GREY, linewidth=1, label=f"|λ| = g = {gain:.3g}"))
    axis.axvline(1, color="k", linewidth=0.8, linestyle=":", label="Re λ = 1, the edge of stability")
    axis.plot(values.real, values.imag, "o", color=BLUE, markersize=4, label="eigenvalues")
    reach = 1.1 * max(float(np.abs(values).max()), gain or 0.0, 1.0)
    axis.set(title="eigenvalues of W", xlabel="Re λ", ylabel="Im λ", xlim=(-reach, reach), ylim=(-reach, reach))
    axis.set_aspect("equal")
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)


def _draw_activity(heat: Axes, traces: Axes, activity: xr.DataArray) -> None:
    x = activity.transpose("time", "neuron").to_numpy()
    if "time" in activity.coords:
        time, units = activity["time"].to_numpy(), str(activity["time"].attrs.get("units", "1"))
        dt = spacing(time, "the cube") or 1.0
    else:
        time, units, dt = np.arange(len(x)), "samples", 1.0
    label = "time" if units == "1" else f"time [{'τ' if units == 'tau' else units}]"
    limit = max(1.0, float(np.abs(x).max()))
    edges = (time[0] - dt / 2, time[-1] + dt / 2, x.shape[1] - 0.5, -0.5)
    image = heat.imshow(
        x.T, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit, extent=edges, interpolation="nearest"
    )
    heat.set(title="activity of the first trial", xlabel=label, ylabel="neuron")
    heat.locator_params(axis="y", integer=True)
    heat.figure.colorbar(image, ax=heat, label="firing rate")
    busiest = np.argsort(-x.std(0), kind="stable")[:6]
    for row, neuron in enumerate(busiest):
        offset = 2.2 * limit * (len(busiest) - 1 - row)
        traces.axhline(offset, color=GREY, linewidth=0.5)
        traces.plot(time, x[:, neuron] + offset, color=BLUE, linewidth=1)
    ticks = [2.2 * limit * (len(busiest) - 1 - row) for row in range(len(busiest))]
    traces.set_yticks(ticks, [str(neuron) for neuron in busiest])
    traces.set(title="the most variable neurons", xlabel=label, ylabel="neuron", xlim=edges[:2])
    beyond = edges[1] + 0.02 * (edges[1] - edges[0])  # a scale bar to the right of the lowest trace
    traces.plot([beyond, beyond], [0, 1], color="k", linewidth=2, clip_on=False)
    traces.text(beyond, 0.5, "  rate 1", va="center", fontsize=8)
    traces.spines[["top", "right"]].set_visible(False)


def add_arguments(parser: OptionParser) -> None:
    """Add the options of `neurosde plot`."""
    parser.add_argument("cube", type=Path, metavar="CUBE", help="a cube, or a folder of shards")
    parser.add_argument("--network", type=int, default=0, help="which network (default 0)")
    parser.add_argument("--out", type=Path, metavar="PATH", help="png, pdf or svg (default network-K.png)")


def run(options: Namespace) -> int:
    """Draw the network and say where the picture is."""
    out = options.out or Path(f"network-{options.network}.png")
    if out.suffix.lower() not in FORMATS:
        raise ValueError(f"a picture is written as {', '.join(FORMATS)}; got {out}.")
    with open_cube(options.cube) as cube:
        figure = network_figure(cube, options.network)
    with whole_file(out) as temporary:
        figure.savefig(temporary, format=out.suffix.lower()[1:], dpi=150)
    print(f"figure: {out}")
    return 0
