"""Julia: how one is found, how one is installed, and the process that runs the simulator's Julia core.

Julia is optional. `find_julia` looks in the environment variable NEUROSDE_JULIA, on PATH, and where
`neurosde install-julia` puts one; `neurosde doctor` says which is used and tests it. Nothing starts at import.
"""

from neurosde.julia.locate import (
    Julia,
    JuliaError,
    JuliaNotFoundError,
    UnusableJuliaError,
    find_julia,
    julia_available,
)

__all__ = [
    "Julia",
    "JuliaError",
    "JuliaNotFoundError",
    "UnusableJuliaError",
    "find_julia",
    "julia_available",
]
