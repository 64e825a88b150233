"""Check that a wheel and a source distribution hold what the checkout holds, and nothing under other names.

python .ci/check_wheel.py WHEEL SDIST
"""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

wheel, sdist = sys.argv[1:]
tracked = set(subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.split())
suffixes = (".py", ".html", ".typed", ".jl", ".toml")
expected = {f for f in tracked if f.startswith("neurosde/") and f.endswith(suffixes)}
expected |= {
    f"neurosde/{f}" for f in tracked if f.startswith(("datasets/", "models/")) and f.endswith((".py", ".toml"))
}
expected |= {f"neurosde/{f}" for f in tracked if f.startswith("models/pretrained/")}
found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
if found != expected:
    sys.exit(f"wheel: missing {sorted(expected - found)}, unexpected {sorted(found - expected)}")
licensed = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("LICENSE")]
if not licensed:
    sys.exit("wheel: no LICENSE")

with tarfile.open(sdist) as archive:
    packed = {name.partition("/")[2] for name in archive.getnames()}
needed = {f for f in tracked if not f.startswith(".") and not Path(f).is_symlink()}
if needed - packed:
    sys.exit(f"sdist: missing {sorted(needed - packed)}")
print(f"{Path(wheel).name}: {len(found)} files; {Path(sdist).name}: {len(packed)} entries")
