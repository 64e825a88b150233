"""A recording made elsewhere, here with numpy alone: infer its weights and write a report.

    python examples/07_your_own_recording.py

ends with

    exact posterior: relative error 0.294, correlation 0.956
    report: figures/07_report/report.html
"""

import argparse
from pathlib import Path

import numpy as np

from neurosde.cli import main
from neurosde.evaluation.recovery import recovery
from neurosde.models import open_posterior

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--smoke", action="store_true", help="a small network")
parser.add_argument("--out-dir", type=Path, default=Path("figures/07_report"))
options = parser.parse_args()
N, trials, T, dt = (6, 2, 60, 0.1) if options.smoke else (25, 10, 300, 0.1)

# Any program may have made this: activity in (-1, 1), as (trial, time, neuron), sampled every dt.
rng = np.random.default_rng(0)
W = 1.4 / np.sqrt(N) * rng.normal(size=(N, N))
h = rng.normal(size=(trials, N))
activity = np.empty((trials, T, N), dtype=np.float32)
for t in range(T):
    activity[:, t] = np.tanh(h)
    h = h + dt * (-h + np.tanh(h) @ W.T) + 0.25 * np.sqrt(dt) * rng.normal(size=h.shape)
options.out_dir.mkdir(parents=True, exist_ok=True)
np.save(options.out_dir / "recording.npy", activity)
np.save(options.out_dir / "truth.npy", W)

# The same as the commands: neurosde infer recording.npy --dt 0.1 --out posterior.nc
#                           neurosde evaluate posterior.nc --truth truth.npy
posterior = options.out_dir / "posterior.nc"
if status := main(["infer", str(options.out_dir / "recording.npy"), "--dt", str(dt), "--out", str(posterior)]):
    raise SystemExit(status)
truth = ["--truth", str(options.out_dir / "truth.npy"), "--out-dir", str(options.out_dir)]
if status := main(["evaluate", str(posterior), *truth]):
    raise SystemExit(status)

found = recovery(open_posterior(posterior)["closed_form/mean"].to_numpy(), W)
print(f"exact posterior: relative error {found['relative_error']:.3f}, correlation {found['correlation']:.3f}")
print(f"report: {options.out_dir / 'report.html'}")
