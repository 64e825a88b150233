"""`neurosde demo`: the whole road once, from drawing networks to a report on the posterior of one."""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path

from neurosde.cli import main
from neurosde.options import OptionParser


def add_arguments(parser: OptionParser) -> None:
    """Add the options of `neurosde demo`."""
    parser.add_argument("--out-dir", type=Path, default=Path("results/demo"), help="(default results/demo)")
    parser.add_argument("--seed", type=int, default=0, help="root seed (default 0)")


def run(options: Namespace) -> int:
    """Run the commands that a user would, one after the other, and show them."""
    started = time.perf_counter()
    folder = options.out_dir
    dataset, posterior = folder / f"dataset-seed{options.seed}", folder / "posterior.nc"
    cube = dataset / "cube.nc"
    commands = [
        ["build-dataset", "--out-dir", dataset, "--num-networks", 20, "--N", 30, "--num-trials", 8, "--T", 200,
         "--ensemble", "dale", "--g", 1.5, "--noise-std", 0.3, "--seed", options.seed],
        ["infer", cube, "--network", 0, "--method", "cfg", "--seed", options.seed, "--out", posterior],
        ["evaluate", posterior, "--truth", cube, "--out-dir", folder / "report"],
    ]  # fmt: skip
    for command in commands:
        words = [str(word) for word in command]
        print(f"\n$ neurosde {' '.join(words)}", flush=True)
        status = main(words)
        if status:
            return status
    print(f"\nDone in {time.perf_counter() - started:.0f} s.")
    print(f"Dataset:   {cube}\nPosterior: {posterior}\nReport:    {folder / 'report' / 'report.html'}")
    return 0
