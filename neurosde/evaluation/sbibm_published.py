"""Published C2ST of other methods on sbibm's tasks, beside which `neurosde benchmark sbibm` puts its own.

The runs are those of the authors of sbibm, with sbi 0.23, which repeat the neural methods of their paper: NPE is NPE-C
with a spline flow, S- are the sequential versions, which train for one observation. The paper's own table was not to be
had as numbers. Each figure is a mean over sbibm's ten stored observations (of the sequential NLE and NRE, numbers 1 to
9 are there), of the accuracy of a classifier between 10 000 draws and 10 000 of the reference posterior.

References:
    Results of sbibm, benchmarking_sbi_023/results/re-sbibm_sbi_023.csv, columns C2ST and C2ST_Z, commit 8693d6d,
    https://github.com/sbi-benchmark/results
    Benchmarking simulation-based inference (Lueckmann, Boelts, Greenberg, Gonçalves, Macke, 2021),
    https://arxiv.org/abs/2101.04653
"""

from __future__ import annotations

METHODS = ("NPE", "SNPE", "NLE", "SNLE", "NRE", "SNRE")
# For a task and a number of simulations, of each method: C2ST, and that of standardised draws.
PUBLISHED = {
    ("two_moons", 1000): (
        (0.667, 0.724), (0.617, 0.655), (0.629, 0.670), (0.623, 0.662), (0.800, 0.865), (0.614, 0.649),
    ),
    ("two_moons", 10_000): (
        (0.578, 0.611), (0.546, 0.562), (0.660, 0.697), (0.562, 0.591), (0.749, 0.826), (0.563, 0.579),
    ),
    ("gaussian_linear", 1000): (
        (0.753, 0.723), (0.682, 0.654), (0.589, 0.575), (0.592, 0.577), (0.701, 0.671), (0.677, 0.646),
    ),
    ("gaussian_linear", 10_000): (
        (0.563, 0.550), (0.547, 0.537), (0.533, 0.527), (0.532, 0.526), (0.595, 0.577), (0.543, 0.537),
    ),
    ("slcp", 1000): (
        (0.976, 0.976), (0.964, 0.965), (0.941, 0.941), (0.913, 0.912), (0.974, 0.975), (0.970, 0.971),
    ),
    ("slcp", 10_000): (
        (0.897, 0.899), (0.832, 0.834), (0.842, 0.842), (0.730, 0.733), (0.954, 0.956), (0.922, 0.921),
    ),
}  # fmt: skip


def published(task: str, simulations: int) -> dict[str, tuple[float, float]]:
    """Return the C2ST of each method, of plain and of standardised draws; empty where none was published."""
    return dict(zip(METHODS, PUBLISHED.get((task, simulations), ()), strict=False))
