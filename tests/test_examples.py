"""Every example runs, says where its figure is, and the README's quick start does what it says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from neurosde.cli import main

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", str(example), "--smoke"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    kind, path = done.stdout.strip().splitlines()[-1].split(": ")
    assert kind in ("figure", "report") and (tmp_path / path).stat().st_size > 5000
    assert len(example.read_text().splitlines()) <= 120


def test_quick_start_of_the_readme(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks[0].strip().splitlines()) <= 15
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(blocks[0], "README.md", "exec"), names)
    assert names["activity"].shape == (100, 50) and names["W"].grad.shape == (50, 50)
    truth = names["W"].detach()
    posterior = names["result"].posterior
    error = float((posterior.mean - truth).norm())
    variances = posterior.direction_sd.double() ** 2
    freedom = 50 * float(variances.sum() ** 2 / (variances**2).sum())  # Welch–Satterthwaite, 50 independent rows
    assert abs(error / float(posterior.sd.norm()) - 1) < 4 * (0.5 / freedom) ** 0.5
    assert (tmp_path / "posterior.nc").exists()


def test_other_code_of_the_readme(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 7
    monkeypatch.chdir(tmp_path)
    command = ["build-dataset", "--out-dir", "data/raw/my_dataset", "--num-networks", "5", "--N", "6", "--T", "20"]
    assert main(command) == 0
    for block in blocks[1:]:
        exec(compile(block, "README.md", "exec"), {})
