"""Figures of a comparison of sampled weights with their ensemble."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from neurosde.evaluation.figures import BLUE, GREY

if TYPE_CHECKING:
    from neurosde.evaluation.prior_comparison import PriorEvaluation

WORST = 6
COLUMNS = 3
MAX_BINS = 40
MAX_EIGENVALUES = 4000  # more would only hide each other


def figures(result: PriorEvaluation, gains: Sequence[float] = ()) -> dict[str, Figure]:
    """Draw all figures: name → figure.

    Args:
        result: what to draw.
        gains: radii of the discs that the bulks fill, for spectra; by default the root mean square of J.
    """
    return {"spectra": spectra(result, gains), "matrices": matrices(result), "statistics": worst_statistics(result)}


def spectra(result: PriorEvaluation, gains: Sequence[float] = ()) -> Figure:
    """Eigenvalues of samples and of fresh draws in the complex plane, over the disc of the circular law."""
    radii = tuple(gains) or (float(result.table["fresh"]["gain"]),)
    name = "g" if gains else "rms of J"
    figure = Figure(figsize=(9.6, 5.6), layout="constrained")
    axes = figure.subplots(1, 2)
    count = max(1, MAX_EIGENVALUES // result.sampled_weights.shape[1])
    reach = max(1.0, *radii)
    for axis, (title, colour, weights) in zip(axes, _both(result), strict=True):
        values = np.linalg.eigvals(weights[:count]).ravel()
        reach = max(reach, float(np.abs(values).max()))
        label = f"circular law, |λ| ≤ {name} = " + " … ".join(f"{one:.3g}" for one in radii)
        for radius in radii:
            axis.add_patch(Circle((0, 0), radius, facecolor=GREY, alpha=0.15, linewidth=0))
            axis.add_patch(Circle((0, 0), radius, fill=False, edgecolor="k", linewidth=0.8, label=label, zorder=3))
        axis.axvline(1, color="k", linewidth=0.6, linestyle=":", label="Re λ = 1, the edge of stability")
        axis.plot(values.real, values.imag, ".", color=colour, markersize=2, alpha=0.6)
        axis.set(title=f"eigenvalues of {min(count, len(weights))} {title}s", xlabel="Re λ")
    for axis in axes:
        axis.set(xlim=(-1.08 * reach, 1.08 * reach), ylim=(-1.08 * reach, 1.08 * reach), aspect="equal")
    axes[0].set_ylabel("Im λ")
    handles, labels = axes[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def matrices(result: PriorEvaluation) -> Figure:
    """Three samples over three fresh draws on one colour scale, neurons sorted by their mean outgoing weight."""
    shown = [(title, weights[:COLUMNS]) for title, _, weights in _both(result)]
    columns = len(shown[0][1])
    limit = float(np.quantile(np.abs(np.concatenate([weights for _, weights in shown])), 0.995)) or 1.0
    figure = Figure(figsize=(2.75 * columns + 1.2, 6.0), layout="constrained")
    axes = np.atleast_2d(figure.subplots(2, columns))
    for row, (title, weights) in zip(axes, shown, strict=True):
        for k, (axis, W) in enumerate(zip(row, weights, strict=True)):
            order = np.argsort(-W.mean(0), kind="stable")
            axis.imshow(W[np.ix_(order, order)], cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
            axis.set(xticks=[], yticks=[], title=f"{title} {k + 1}")
    for axis in axes[-1]:
        axis.set_xlabel("presynaptic, sorted")
    for axis in axes[:, 0]:
        axis.set_ylabel("postsynaptic, sorted")
    figure.colorbar(axes[0, 0].images[0], ax=axes, shrink=0.7, label="weight", extend="both")
    return figure


def worst_statistics(result: PriorEvaluation) -> Figure:
    """Histograms of the statistics of the largest ratios: samples, and the range and mean of the fresh sets.

    Statistics that are the same in all sets, such as a density of 1, would only show an empty panel.
    """
    differing = result.table[result.table[["distance", "floor"]].any(axis=1)]
    worst = differing.sort_values("ratio", ascending=False, kind="stable")[:WORST]
    figure = Figure(figsize=(9.6, 5.4), layout="constrained")
    axes = figure.subplots(2, 3).ravel()
    for axis in axes[len(worst) :]:
        axis.remove()
    for axis, (name, row) in zip(axes[: len(worst)], worst.iterrows(), strict=True):
        kind = "per_matrix" if row["kind"] == "per matrix" else "pooled"
        ours = getattr(result.samples, kind)[name]
        theirs = [getattr(one, kind)[name] for one in result.fresh]
        edges = _edges(ours, np.concatenate(theirs))
        shares = np.array([_share(one, edges) for one in theirs])
        band = {"baseline": shares.min(0), "color": GREY, "fill": True, "alpha": 0.35, "linewidth": 0}
        axis.stairs(shares.max(0), edges, **band, label="fresh sets, least to most")
        axis.stairs(shares.mean(0), edges, color="#4d4d4d", baseline=None, linewidth=0.9, label="fresh sets, mean")
        axis.stairs(_share(ours, edges), edges, color=BLUE, baseline=None, linewidth=1.5, label="samples")
        axis.set_ylim(bottom=0)
        axis.set_title(f"{name}\nratio {row['ratio']:.3g}, 95 % of fresh sets below {row['null_95']:.3g}", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.locator_params(axis="x", nbins=5)
        axis.set_yticks([])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _both(result: PriorEvaluation) -> list[tuple[str, str, np.ndarray]]:
    return [("sample", BLUE, result.sampled_weights), ("fresh draw", "#4d4d4d", result.fresh_weights)]


def _edges(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Bins over the central 99.8 % of either; what is beyond goes into the outermost."""
    ends = np.quantile(ours, (0.001, 0.999)), np.quantile(theirs, (0.001, 0.999))
    low, high = min(ends[0][0], ends[1][0]), max(ends[0][1], ends[1][1])
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, min(MAX_BINS, max(8, round(len(ours) ** 0.5))) + 1)


def _share(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] / len(values)
