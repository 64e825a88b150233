"""`neurosde install-julia`: a Julia in a private folder, without root and without changing the system.

Two ways, tried in this order:

    juliapkg   the official release for this machine, by the PyPI package of that name (`pip install 'neurosde[julia]'`)
    debian     the packages of Debian 11, the last release with a Julia, from this machine's own mirror: fetched with an
               apt state of their own, so that the system's is neither read nor written, and unpacked with `dpkg -x`

Julia is unpacked beside its place, asked for its version there, and only then renamed into its place. A lock on the
parent folder lets installations wait for each other, and lets the next one remove what a killed one left.

References:
    JuliaPkg, https://github.com/JuliaPy/pyjuliapkg
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from neurosde._version import __version__
from neurosde.julia.locate import (
    MARKER,
    MINIMUM,
    VARIABLE,
    Julia,
    JuliaNotFoundError,
    UnusableJuliaError,
    default_prefix,
    dotted,
    find_julia,
    forget,
    installed_julia,
    julia_available,
)
from neurosde.options import OptionParser, add_options, from_options
from neurosde.provenance import explained, make_folder

Method = Literal["auto", "juliapkg", "debian"]

PATIENCE = 1800.0  # seconds for any one step; the longest is a download of 200 MB

# Julia 1.5.3 and those of its dependencies whose library versions newer Debian releases do not have.
DEBIAN_RELEASE = "bullseye"
DEBIAN_PACKAGES = (
    "julia", "julia-common", "libjulia1", "libllvm9", "libdsfmt-19937-1", "libgfortran5", "libmbedcrypto3",
    "libmbedx509-0", "libmbedtls12", "libpcre2-8-0", "libpcre3", "libgit2-1.1", "libffi7", "libopenlibm3",
    "libutf8proc2", "libunwind8", "libhttp-parser2.9", "libz3-4", "libgmp10", "libmpfr6", "libquadmath0", "libssh2-1",
    "libedit2", "libbsd0", "libmd0",
)  # fmt: skip
KEYRINGS = Path("/usr/share/keyrings")

# In a process of its own: it may print, hang or import what it likes. `find_julia` rather than the package's front
# door, which would also set up a Julia project for every installed Python package that asks for one.
JULIAPKG = """
import socket, sys
socket.setdefaulttimeout(30)
from juliapkg.compat import Compat
from juliapkg.find_julia import find_julia
find_julia(compat=Compat.parse(sys.argv[2]), prefix=sys.argv[1], install=True)
"""


@dataclass(frozen=True)
class InstallOptions:
    """Where Julia goes, and how it is got."""

    prefix: Path | None = field(
        default=None,
        metadata={"help": "folder to make (default $XDG_DATA_HOME/neurosde/julia or ~/.local/share/neurosde/julia)"},
    )
    method: Method = field(
        default="auto",
        metadata={"help": "juliapkg: the official release; debian: Debian's packages, unpacked; auto: what works"},
    )


class _MethodFailed(Exception):
    """One way of getting Julia did not work; the message says why."""


def install_julia(prefix: Path | None = None, method: Method = "auto") -> Julia:
    """Install Julia into a private folder, unless there is one: with neither argument, anywhere; else in that folder.

    Args:
        prefix: the folder to make, by default `default_prefix()`, which `find_julia` looks into by itself; for another
            one set NEUROSDE_JULIA to the executable in it.
        method: "juliapkg", "debian", or "auto", which tries one after the other.

    Returns:
        The Julia that was installed or found.

    Raises:
        JuliaNotFoundError: no way worked, or NEUROSDE_JULIA is set to something unusable.
        ValueError: unknown method, or the folder holds something else.
        OSError: the folder cannot be written.
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {get_args(Method)}; got {method!r}.")
    if prefix is None and method == "auto":
        try:
            return find_julia()
        except JuliaNotFoundError:
            if os.environ.get(VARIABLE):  # what would be installed now would not be found
                raise
    prefix = Path(os.path.abspath(default_prefix() if prefix is None else Path(prefix).expanduser()))
    make_folder(prefix)
    with _lock(prefix.parent) as alone:
        if alone:
            _remove_leftovers(prefix)
        julia = _present(prefix, method)
        if julia is None:
            try:
                julia = _install(prefix, method)
            except OSError as error:
                raise explained(error, prefix) from error
            finally:
                forget()
    return julia


def add_arguments(parser: OptionParser) -> None:
    """Add the options of `neurosde install-julia`."""
    add_options(parser, InstallOptions)


def run(options: Namespace) -> int:
    """Install Julia and say where it is."""
    config = from_options(InstallOptions, options)
    there = config == InstallOptions() and julia_available()
    try:
        julia = install_julia(config.prefix, config.method)
    except JuliaNotFoundError as error:
        raise OSError(str(error)) from error
    state = "there already" if there else "installed"
    print(f"Julia {dotted(julia.version)} is {state}: {julia.executable} ({julia.source})")
    if not there and _used() != julia:
        print(f"neurosde uses it with {VARIABLE}={julia.executable}")
    return 0


def _used() -> Julia | None:
    """Return the Julia that is used, or None."""
    return find_julia() if julia_available() else None


def _present(prefix: Path, method: Method) -> Julia | None:
    """Return the Julia of a prefix if it is what was asked for; raise if the folder is somebody else's."""
    if not prefix.exists():
        return None
    if not (prefix / MARKER).is_file():
        if prefix.is_dir() and not any(prefix.iterdir()):
            return None
        raise ValueError(f"{prefix} exists and holds something else; give --prefix a folder that is not there yet.")
    if method not in ("auto", json.loads((prefix / MARKER).read_text()).get("method")):
        return None
    try:
        return installed_julia(prefix)
    except UnusableJuliaError:
        return None


def _install(prefix: Path, method: Method) -> Julia:
    """Try the methods in turn; the first that gives a Julia that runs is put in its place."""
    ways: dict[str, Callable[[Path, Path], None]] = {"juliapkg": _by_juliapkg, "debian": _by_debian}
    failures = []
    for name, way in ways.items():
        if method not in ("auto", name):
            continue
        work = Path(tempfile.mkdtemp(prefix=f".{prefix.name}.", suffix=".part", dir=prefix.parent))
        try:
            tree = work / "tree"
            way(work, tree)
            (tree / MARKER).write_text(json.dumps({"method": name, "neurosde_version": __version__}) + "\n")
            forget()
            if installed_julia(tree) is None:
                raise _MethodFailed("no julia came of it")
            if prefix.exists():
                os.rename(prefix, work / "old")
            os.rename(tree, prefix)
        except (_MethodFailed, UnusableJuliaError) as error:
            failures.append(f"{name}: {error}")
            continue
        finally:
            shutil.rmtree(work, ignore_errors=True)
        forget()
        julia = installed_julia(prefix)
        assert julia is not None
        return julia
    raise JuliaNotFoundError(
        f"could not install Julia ({'; '.join(failures)}); install Julia {dotted(MINIMUM)} or newer by hand and set "
        f"{VARIABLE} to its executable."
    )


def _by_juliapkg(work: Path, tree: Path) -> None:
    if importlib.util.find_spec("juliapkg") is None:
        raise _MethodFailed("not installed (pip install juliapkg)")
    _say("fetching the official release of Julia with juliapkg")
    # What juliapkg would find instead of fetching is hidden from it, and if killed it leaves things in `work` only.
    path = [
        folder
        for folder in os.environ.get("PATH", "").split(os.pathsep)
        if not any(shutil.which(name, path=folder) for name in ("julia", "juliaup"))
    ]
    environment = os.environ | {
        "PATH": os.pathsep.join(path),
        "TMPDIR": str(work),
        "JULIA_DEPOT_PATH": str(work / "depot"),
        "PYTHON_JULIAPKG_PROJECT": str(work / "project"),
    }
    environment.pop("PYTHON_JULIAPKG_EXE", None)
    _call([sys.executable, "-c", JULIAPKG, str(tree), dotted(MINIMUM)], env=environment)


def _by_debian(work: Path, tree: Path) -> None:
    missing = [tool for tool in ("apt-get", "dpkg") if shutil.which(tool) is None]
    if missing:
        raise _MethodFailed(f"there is no {' and no '.join(missing)}: this is neither Debian nor derived from it")
    keyring = next(iter(sorted(KEYRINGS.glob("debian-archive-keyring.[gp]*"))), None)
    if keyring is None:
        raise _MethodFailed("Debian's keys are not here (apt-get install debian-archive-keyring)")
    targets = _call(["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]).split()
    mirrors = [uri for uri in dict.fromkeys(targets) if "security" not in uri]
    if not mirrors:
        raise _MethodFailed("apt has no mirror")
    apt = _apt_state(work / "apt")
    packages = work / "packages"
    packages.mkdir()
    _say(f"asking the mirrors of this machine's apt for Debian {DEBIAN_RELEASE}")
    for mirror in mirrors:
        source = f"deb [signed-by={keyring} target=Packages lang=none] {mirror} {DEBIAN_RELEASE} main\n"
        (work / "apt" / "sources.list").write_text(source)
        try:
            _call([*apt, "update"])
            _say(f"fetching {len(DEBIAN_PACKAGES)} packages, 60 MB")
            _call([*apt, "download", *DEBIAN_PACKAGES], cwd=packages)
            break
        except _MethodFailed:
            if mirror == mirrors[-1]:
                raise
    _say("unpacking them, 335 MB")
    tree.mkdir()
    for package in sorted(packages.glob("*.deb")):
        _call(["dpkg", "-x", str(package), str(tree)])


def _apt_state(folder: Path) -> list[str]:
    """Make an apt state of its own in `folder`; returns the command that uses it."""
    for name in ("lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True)
    (folder / "status").touch()
    settings = {
        "Dir::State::Lists": folder / "lists",
        "Dir::State::status": folder / "status",
        "Dir::Cache": folder / "cache",
        "Dir::Etc::sourcelist": folder / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::preferences": "/dev/null",
        "Dir::Etc::preferencesparts": "/dev/null",
        "APT::Update::Error-Mode": "any",
        "Acquire::Retries": 2,
        "Acquire::http::Timeout": 30,
        "Acquire::https::Timeout": 30,
    }
    if hasattr(os, "geteuid") and os.geteuid() == 0:  # the user that root's downloads run as cannot write here
        settings["APT::Sandbox::User"] = "root"
    # The system's hooks would act on the system's own state, and can be cleared in a file only.
    hooks = ("Pre-Invoke", "Post-Invoke", "Post-Invoke-Success")
    lines = [*(f"#clear APT::Update::{hook};" for hook in hooks), *(f'{k} "{v}";' for k, v in settings.items())]
    (folder / "apt.conf").write_text("\n".join(lines) + "\n")
    return ["apt-get", "--quiet", "--config-file", str(folder / "apt.conf")]


def _call(command: list[str], *, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """Run a command and return its standard output; what it said last is the reason if it fails."""
    name = Path(command[0]).name
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PATIENCE,
            cwd=cwd,
            env=env,
        )
    except subprocess.TimeoutExpired as error:
        raise _MethodFailed(f"{name} had not ended after {PATIENCE:g} s") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"{name} ended with status {done.returncode}"]
        raise _MethodFailed(next((line for line in reversed(lines) if line.startswith("E:")), lines[-1]))
    return done.stdout


def _remove_leftovers(prefix: Path) -> None:
    """Remove what killed installations left; only for who holds the lock, since a living one's looks the same."""
    for path in prefix.parent.iterdir():
        if path.name.startswith(f".{prefix.name}.") and path.name.endswith(".part"):
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Hold the lock of a folder, waiting for it; yields False where folders cannot be locked (Windows, some NFS)."""
    if sys.platform == "win32":
        yield False
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        locked = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("another installation is running; waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            locked = False
        yield locked
    finally:
        os.close(descriptor)


def _say(progress: str) -> None:
    if sys.stderr.isatty():
        print(progress, file=sys.stderr, flush=True)
