"""Which Julia is used: NEUROSDE_JULIA, else `julia` on PATH, else the one of `neurosde install-julia`.

The private installation is a folder of either shape, told apart from anything else by a marker file in it:

    PREFIX/bin/julia        an official release; it finds its libraries itself
    PREFIX/usr/bin/julia    Debian's packages unpacked; its libraries are found through LD_LIBRARY_PATH
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

VARIABLE = "NEUROSDE_JULIA"
MINIMUM = (1, 5)
MARKER = "neurosde-julia.json"  # lies in every prefix that `neurosde install-julia` made
PRIVATE = "neurosde install-julia"
TIMEOUT = 30.0  # seconds for `julia --version`, which takes 0.1 s from a cold disk


class JuliaError(RuntimeError):
    """Something is wrong with Julia; the message says what, and how to mend it."""


class JuliaNotFoundError(JuliaError):
    """There is no Julia that neurosde could use; the message says how to get one."""


class UnusableJuliaError(JuliaNotFoundError):
    """There is a Julia, but it is too old or does not run; the message says which and how to mend it."""


@dataclass(frozen=True)
class Julia:
    """A Julia that runs.

    Args:
        executable: the program.
        version: major, minor, patch.
        source: where it was found: "NEUROSDE_JULIA", "PATH" or "neurosde install-julia".
        library_path: folders of its shared libraries, where it does not find them itself.
    """

    executable: Path
    version: tuple[int, int, int]
    source: str
    library_path: tuple[Path, ...] = ()

    def environment(self) -> dict[str, str]:
        """Return this process's environment with what the executable needs; for its own process, never for others."""
        return _environment(self.library_path)


def dotted(version: Iterable[int]) -> str:
    """Return a version as it is written."""
    return ".".join(map(str, version))


def default_prefix() -> Path:
    """Return where `neurosde install-julia` puts Julia: $XDG_DATA_HOME/neurosde/julia, or under ~/.local/share."""
    data = os.environ.get("XDG_DATA_HOME", "")
    if not os.path.isabs(data):  # the XDG specification has relative ones ignored
        data = os.path.expanduser(os.path.join("~", ".local", "share"))
    return Path(data, "neurosde", "julia")


def find_julia() -> Julia:
    """Return the Julia to use; once found, it is remembered for as long as NEUROSDE_JULIA and PATH stay the same.

    Raises:
        UnusableJuliaError: NEUROSDE_JULIA is no Julia of at least 1.5, or the only ones found elsewhere are not.
        JuliaNotFoundError: there is none.
    """
    chosen, prefix = os.environ.get(VARIABLE, ""), default_prefix()
    key = (chosen, os.environ.get("PATH", ""), prefix)
    if key not in _found:
        _found[key] = _search(chosen, prefix)
    return _found[key]


def julia_available() -> bool:
    """Return whether there is a Julia to use; never raises, and starts no process that it started before."""
    try:
        find_julia()
    except (JuliaNotFoundError, OSError, ValueError):
        return False
    return True


def installed_julia(prefix: Path) -> Julia | None:
    """Return the Julia that `neurosde install-julia` put into `prefix`, or None.

    Raises:
        UnusableJuliaError: there is one, but it does not run.
    """
    if (prefix / MARKER).is_file():
        for name in ("usr/bin/julia", "bin/julia", "bin/julia.exe"):
            if (prefix / name).is_file():
                return _checked(prefix / name, PRIVATE)
    return None


def forget() -> None:
    """Forget what was found, because something was installed."""
    _found.clear()
    _version.cache_clear()


_found: dict[tuple[str, str, Path], Julia] = {}


def _search(chosen: str, prefix: Path) -> Julia:
    if chosen:
        executable = shutil.which(os.path.expanduser(chosen))
        if executable is None:
            raise UnusableJuliaError(f"{VARIABLE} is {chosen!r}, which is no executable; {_remedy(VARIABLE)}.")
        return _checked(Path(executable), VARIABLE)
    failure: JuliaNotFoundError = JuliaNotFoundError(f"no Julia was found; {_remedy('')}.")
    on_path = shutil.which("julia")
    if on_path is not None:
        try:
            return _checked(Path(on_path), "PATH")
        except UnusableJuliaError as error:
            failure = error
    private = installed_julia(prefix)
    if private is None:
        raise failure
    return private


def _checked(executable: Path, source: str) -> Julia:
    executable = executable.absolute()
    libraries = _private_libraries(executable)
    stamp = executable.stat()
    version = _version(executable, libraries, stamp.st_mtime_ns, stamp.st_size)
    if isinstance(version, str):
        raise UnusableJuliaError(f"{executable} ({source}) does not run as a Julia: {version}; {_remedy(source)}.")
    if version < MINIMUM:
        raise UnusableJuliaError(
            f"{executable} ({source}) is Julia {dotted(version)}, but neurosde needs {dotted(MINIMUM)} or newer; "
            f"{_remedy(source)}."
        )
    return Julia(executable, version, source, libraries)


@cache
def _version(executable: Path, libraries: tuple[Path, ...], changed: int, size: int) -> tuple[int, int, int] | str:
    """Ask the executable, as it is since `changed`, for its version; returns what went wrong if it has none."""
    try:
        answer = subprocess.run(
            [executable, "--startup-file=no", "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT,
            env=_environment(libraries),
        )
    except subprocess.TimeoutExpired:
        return f"--version had not answered after {TIMEOUT:g} s"
    except OSError as error:
        return error.strerror or str(error)
    found = re.match(r"julia version (\d+)\.(\d+)\.(\d+)", answer.stdout)
    if answer.returncode or found is None:
        said = (answer.stderr.strip() or answer.stdout.strip() or f"exit status {answer.returncode}").splitlines()[-1]
        return f"--version gave {said[:200]!r}"
    major, minor, patch = map(int, found.groups())
    return major, minor, patch


def _private_libraries(executable: Path) -> tuple[Path, ...]:
    """Return the library folders of unpacked Debian packages, if the executable is PREFIX/usr/bin/julia of such."""
    parents = executable.resolve().parents
    if len(parents) < 3 or not (parents[2] / MARKER).is_file():
        return ()
    prefix = parents[2]
    triplets = sorted({library.parent for library in (prefix / "usr" / "lib").glob("*/libjulia.so*")})
    return tuple(
        folder for main in triplets for folder in (main, main / "julia", prefix / "lib" / main.name) if folder.is_dir()
    )


def _environment(libraries: tuple[Path, ...]) -> dict[str, str]:
    environment = dict(os.environ)
    if libraries:
        inherited = environment.get("LD_LIBRARY_PATH")
        environment["LD_LIBRARY_PATH"] = os.pathsep.join([*map(str, libraries), *([inherited] if inherited else [])])
    return environment


def _remedy(source: str) -> str:
    if source == VARIABLE:
        return f"set {VARIABLE} to the executable of a Julia, or unset it"
    return f"`neurosde install-julia` gets one, or set {VARIABLE} to the executable of a Julia that you have"
