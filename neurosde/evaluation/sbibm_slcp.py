"""Exact draws of the posterior of SLCP, one of sbibm's tasks (`neurosde.evaluation.sbibm_tasks`).

With the mean x̄ and the scatter A of four points N(m, S), the posterior of S for a flat m on the whole plane is
proportional to |S|^(−3/2) exp(−½ tr(S⁻¹A)) on the prior's cube of (θ₃, θ₄, θ₅), and m given S is N(x̄, S/4). The first
is even in θ₃ and in θ₄. So (|θ₃|, |θ₄|, θ₅) is drawn from the cells of a grid, uniformly within one, then m, and random
signs. Of these proposals, of known density, as many are rejected as makes up for the grid's error and for the bounds on
m; what is left are independent draws. The largest importance is that seen among all proposals; the cells bound it.

References:
    Benchmarking simulation-based inference (Lueckmann, Boelts, Greenberg, Gonçalves, Macke, 2021), appendix T,
    https://arxiv.org/abs/2101.04653
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import max_pool3d

POINTS = 4
JITTER = 1e-6  # that sbibm's simulator adds to the variances
GRID = 96  # cells along each of the three parameters
PROPOSED = 16  # proposals for each draw, at first
ROUNDS = 32  # of as many proposals each


def slcp_posterior(
    x: Tensor, allowed: Callable[[Tensor], Tensor], draws: int, source: torch.Generator | None
) -> Tensor:
    """Draw from SLCP's posterior.

    Args:
        x: four points, one after the other, shape (8,).
        allowed: which θ, shape (draw, 5), the prior allows, shape (draw,).
        draws: how many.
        source: generator.

    Returns:
        Draws, shape (draws, 5).

    Raises:
        FloatingPointError: hardly a proposal is accepted.
    """
    points = x.view(POINTS, 2)
    mean = points.mean(0)
    scatter = (points - mean).mT @ (points - mean)
    grid = _grid(scatter)
    proposed, weights, coins = [], [], []
    for _ in range(ROUNDS):
        theta, log_weight = _propose(grid, mean, scatter, PROPOSED * draws, source)
        possible = allowed(theta)
        proposed.append(theta[possible])
        weights.append(log_weight[possible])
        coins.append(_uniform((len(weights[-1]),), source).log())
        pooled = torch.cat(weights)
        if not len(pooled):
            continue
        accepted = torch.cat(coins) < pooled - pooled.max()
        if int(accepted.sum()) >= draws:
            return torch.cat(proposed)[accepted][:draws]
    raise FloatingPointError(
        f"of {ROUNDS * PROPOSED * draws} proposals for slcp's posterior fewer than {draws} are accepted; take an "
        "observation whose posterior is wider."
    )


def point_covariance(theta: Tensor) -> Tensor:
    """S of a point, shape (..., 2, 2), for θ of shape (..., 5)."""
    first, second = theta[..., 2].square(), theta[..., 3].square()
    cross = theta[..., 4].tanh() * first * second
    rows = [first.square() + JITTER, cross, cross, second.square() + JITTER]
    return torch.stack(rows, -1).unflatten(-1, (2, 2))


def log_determinant(covariance: Tensor) -> Tensor:
    """log|S|, shape (...), of S of shape (..., 2, 2)."""
    return (covariance[..., 0, 0] * covariance[..., 1, 1] - covariance[..., 0, 1].square()).log()


def _log_shape(covariance: Tensor, scatter: Tensor) -> Tensor:
    """Log density, but for a constant, of S with m integrated over the plane: −3/2 log|S| − ½ tr(S⁻¹A)."""
    log = log_determinant(covariance)
    swapped = covariance.flip(-1, -2)  # its diagonal, swapped, is that of S⁻¹ |S|
    trace = swapped[..., 0, 0] * scatter[0, 0] + swapped[..., 1, 1] * scatter[1, 1]
    trace = (trace - 2 * covariance[..., 0, 1] * scatter[0, 1]) / log.exp()
    return -0.5 * (POINTS - 1) * log - 0.5 * trace


Grid = tuple[list[Tensor], Tensor]


def _grid(scatter: Tensor) -> Grid:
    """Edges of cells of (|θ₃|, |θ₄|, θ₅), and their log masses, but for a constant, shape (GRID, GRID, GRID).

    Of a grid over the whole of the prior's support a finer one is made where the posterior is, and of that another.
    """
    whole = torch.tensor([[0.0, 0.0, -3.0], [3.0, 3.0, 3.0]], dtype=torch.float64)
    edges = [torch.linspace(float(a), float(b), GRID + 1, dtype=torch.float64) for a, b in whole.mT]
    for _ in range(2):
        mass = _masses(edges, scatter).flatten().softmax(0).view(GRID, GRID, GRID)
        edges = [_finer(edge, mass.sum([k for k in range(3) if k != axis])) for axis, edge in enumerate(edges)]
    return edges, _masses(edges, scatter)


def _propose(
    grid: Grid, mean: Tensor, scatter: Tensor, draws: int, source: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Draw from the grid: θ, shape (draws, 5), and the logarithm of its importance but for a constant, (draws,)."""
    edges, log_mass = grid
    cell = torch.multinomial(log_mass.flatten().softmax(0), draws, replacement=True, generator=source)
    index = torch.stack(torch.unravel_index(cell, log_mass.shape), -1)
    low = torch.stack([edge[index[:, k]] for k, edge in enumerate(edges)], -1)
    high = torch.stack([edge[index[:, k] + 1] for k, edge in enumerate(edges)], -1)
    shape = low + (high - low) * _uniform((draws, 3), source)  # |θ₃|, |θ₄|, θ₅
    signs = torch.where(_uniform((draws, 2), source) < 0.5, -1.0, 1.0)
    theta = torch.cat([torch.zeros(draws, 2, dtype=torch.float64), signs * shape[:, :2], shape[:, 2:]], -1)
    covariance = point_covariance(theta)
    factor = torch.linalg.cholesky(covariance / POINTS)
    theta[:, :2] = mean + (factor @ _normal((draws, 2, 1), source)).squeeze(-1)
    # The law of m given S is exact, which leaves that of S over that of the cells.
    return theta, _log_shape(covariance, scatter) - log_mass.flatten()[cell] + (high - low).log().sum(-1)


def _finer(edges: Tensor, mass: Tensor) -> Tensor:
    """Edges of as many cells, half of them of one length and half of one mass."""
    uniform = (edges[1:] - edges[:-1]) / (edges[-1] - edges[0])
    below = torch.cat([edges.new_zeros(1), (0.5 * uniform + 0.5 * mass).cumsum(0)])
    wanted = torch.linspace(0, float(below[-1]), GRID + 1, dtype=torch.float64)
    cell = (torch.searchsorted(below, wanted, right=True) - 1).clamp(0, GRID - 1)
    found = edges[cell] + (wanted - below[cell]) / (below[cell + 1] - below[cell]) * (edges[cell + 1] - edges[cell])
    found[0], found[-1] = edges[0], edges[-1]
    return found


def _masses(edges: list[Tensor], scatter: Tensor) -> Tensor:
    """Bounds of the cells' log masses where the density is monotone within a cell: its largest value at a corner.

    With these the importance of proposals is bounded, too: that of a cell's middle is not where a density is steep.
    """
    corners = torch.meshgrid(*edges, indexing="ij")
    theta = torch.stack([torch.zeros_like(corners[0]), torch.zeros_like(corners[0]), *corners], -1)
    largest = max_pool3d(_log_shape(point_covariance(theta), scatter)[None, None], 2, stride=1)[0, 0]
    widths = torch.meshgrid(*[edge[1:] - edge[:-1] for edge in edges], indexing="ij")
    return largest + torch.stack(widths).log().sum(0)


def _uniform(shape: tuple[int, ...], source: torch.Generator | None) -> Tensor:
    return torch.rand(shape, generator=source, dtype=torch.float64)


def _normal(shape: tuple[int, ...], source: torch.Generator | None) -> Tensor:
    return torch.randn(shape, generator=source, dtype=torch.float64)
