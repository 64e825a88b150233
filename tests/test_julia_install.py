"""Finding and installing Julia, with small scripts in its place, and once for real."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest

from neurosde.cli import main
from neurosde.julia import JuliaNotFoundError, UnusableJuliaError, doctor, find_julia, install, julia_available, locate
from neurosde.julia.install import install_julia

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the stand-ins for Julia are shell scripts")


def script(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


def fake_julia(path: Path, version: str = "1.9.2") -> Path:
    return script(path, f"echo julia version {version}")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine without Julia: an empty folder as PATH, a home of its own."""
    path, home = tmp_path / "bin", tmp_path / "home"
    path.mkdir()
    home.mkdir()
    monkeypatch.setenv("PATH", str(path))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_DATA_HOME", str(home / "data"))
    monkeypatch.delenv("NEUROSDE_JULIA", raising=False)
    locate.forget()
    yield path
    locate.forget()


def private(version: str = "1.5.3", method: str = "debian") -> Path:
    """Put a stand-in where `neurosde install-julia` puts Julia; returns the prefix."""
    prefix = locate.default_prefix()
    fake_julia(prefix / ("usr/bin/julia" if method == "debian" else "bin/julia"), version)
    if method == "debian":
        for folder in ("usr/lib/some-linux-gnu/julia", "lib/some-linux-gnu"):
            (prefix / folder).mkdir(parents=True)
        (prefix / "usr/lib/some-linux-gnu/libjulia.so.1").touch()
    (prefix / locate.MARKER).write_text(json.dumps({"method": method}))
    return prefix


def test_order(machine, tmp_path, monkeypatch):
    prefix = private("1.5.3")
    assert find_julia().executable == prefix / "usr/bin/julia"
    assert find_julia().source == "neurosde install-julia"
    locate.forget()
    fake_julia(machine / "julia", "1.10.0-rc1")
    assert (find_julia().version, find_julia().source) == ((1, 10, 0), "PATH")
    chosen = fake_julia(tmp_path / "elsewhere/julia-1.7", "1.7.1")
    monkeypatch.setenv("NEUROSDE_JULIA", str(chosen))
    assert find_julia() == locate.Julia(chosen, (1, 7, 1), "NEUROSDE_JULIA")
    assert julia_available()


def test_none(machine):
    with pytest.raises(
        JuliaNotFoundError, match=r"no Julia was found; `neurosde install-julia` gets one, or set NEURO"
    ):
        find_julia()
    assert not julia_available()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["echo julia version 1.4.2"], r"is Julia 1\.4\.2, but neurosde needs 1\.5 or newer; "),
        (["echo segmentation fault >&2", "exit 139"], "does not run as a Julia: --version gave 'segmentation fault'; "),
        (["exit 3"], "does not run as a Julia: --version gave 'exit status 3'; "),
        (["printf 'ju\\377lia'"], "does not run as a Julia: --version gave 'ju�lia'; "),
        (["exec /bin/sleep 60"], r"does not run as a Julia: --version had not answered after 0\.2 s; "),
    ],
)
def test_unusable(machine, monkeypatch, lines, message):
    monkeypatch.setattr(locate, "TIMEOUT", 0.2)
    julia = script(machine / "julia", *lines)
    with pytest.raises(UnusableJuliaError, match=rf"julia \(PATH\) {message}`neurosde install-julia` gets one"):
        find_julia()
    assert not julia_available()
    monkeypatch.setenv("NEUROSDE_JULIA", str(julia))
    with pytest.raises(UnusableJuliaError, match=rf"julia \(NEUROSDE_JULIA\) {message}set NEUROSDE_JULIA to the exec"):
        find_julia()


def test_an_unusable_one_on_path_makes_way_for_the_private_one_but_a_chosen_one_does_not(machine, monkeypatch, capsys):
    fake_julia(machine / "julia", "1.0.5")
    prefix = private()
    assert find_julia().executable == prefix / "usr/bin/julia"
    monkeypatch.setenv("NEUROSDE_JULIA", "no-such-program")
    with pytest.raises(UnusableJuliaError, match="NEUROSDE_JULIA is 'no-such-program', which is no executable; set"):
        find_julia()
    assert main(["install-julia"]) == 2
    assert capsys.readouterr().err.startswith("error: NEUROSDE_JULIA is 'no-such-program', which is no executable")


def test_asks_each_julia_once(machine, tmp_path):
    calls = tmp_path / "calls"
    script(machine / "julia", f"echo call >> {calls}", "echo julia version 1.0.5")
    assert not any(julia_available() for _ in range(3))
    assert calls.read_text() == "call\n"
    time.sleep(0.01)
    script(machine / "julia", f"echo call >> {calls}", "echo julia version 1.10.5")  # upgraded meanwhile
    assert all(julia_available() for _ in range(3))
    assert calls.read_text() == "call\ncall\n"


def test_environment(machine, monkeypatch):
    monkeypatch.setenv("LD_LIBRARY_PATH", "/inherited")
    prefix = private()
    folders = [f"{prefix}/{name}" for name in ("usr/lib/some-linux-gnu", "usr/lib/some-linux-gnu/julia")]
    folders.append(f"{prefix}/lib/some-linux-gnu")
    wanted = os.environ | {"LD_LIBRARY_PATH": ":".join([*folders, "/inherited"])}
    assert find_julia().environment() == wanted
    monkeypatch.setenv("NEUROSDE_JULIA", str(prefix / "usr/bin/julia"))  # the same program, given by hand
    assert find_julia().environment() == wanted | {"NEUROSDE_JULIA": str(prefix / "usr/bin/julia")}
    assert os.environ["LD_LIBRARY_PATH"] == "/inherited"
    shutil.rmtree(prefix)
    locate.forget()
    private("1.11.0", method="juliapkg")
    monkeypatch.delenv("NEUROSDE_JULIA")
    assert find_julia().environment() == dict(os.environ)


def test_a_folder_without_marker_is_no_private_julia(machine):
    (private() / locate.MARKER).unlink()
    assert not julia_available()


@pytest.fixture
def juliapkg(monkeypatch, tmp_path):
    """A stand-in for the package juliapkg, which "downloads" Julia 1.11.5; returns a file with what it was asked."""
    folder, asked = tmp_path / "packages", tmp_path / "asked"
    (folder / "juliapkg").mkdir(parents=True)
    (folder / "juliapkg/__init__.py").touch()
    (folder / "juliapkg/compat.py").write_text(
        "class Compat:\n    parse = staticmethod(lambda text: 'compat ' + text)\n"
    )
    (folder / "juliapkg/find_julia.py").write_text(
        "import os, pathlib\n"
        "def find_julia(compat, prefix, install):\n"
        f"    pathlib.Path({str(asked)!r}).write_text(f'{{compat}} {{install}} {{os.environ[\"PATH\"]}}')\n"
        "    if os.environ.get('FAIL'): raise OSError('no route to host')\n"
        "    exe = pathlib.Path(prefix, 'bin', 'julia')\n"
        "    exe.parent.mkdir(parents=True)\n"
        "    exe.write_text('#!/bin/sh\\necho julia version 1.11.5\\n')\n"
        "    exe.chmod(0o755)\n"
    )
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return asked


def test_juliapkg(machine, juliapkg, capsys):
    fake_julia(machine / "julia", "1.0.5")
    assert main(["install-julia"]) == 0
    prefix = locate.default_prefix()
    assert capsys.readouterr() == (f"Julia 1.11.5 is installed: {prefix}/bin/julia (neurosde install-julia)\n", "")
    assert juliapkg.read_text() == "compat 1.5 True "  # the folder of the old julia is hidden from juliapkg
    assert find_julia() == locate.Julia(prefix / "bin/julia", (1, 11, 5), "neurosde install-julia")
    assert os.listdir(prefix.parent) == [prefix.name]
    juliapkg.unlink()
    assert main(["install-julia"]) == 0
    assert "is there already" in capsys.readouterr().out
    assert not juliapkg.exists()


def test_says_how_to_use_another_prefix(machine, juliapkg, capsys, tmp_path):
    assert main(["install-julia", "--prefix", str(tmp_path / "opt/julia")]) == 0
    assert f"neurosde uses it with NEUROSDE_JULIA={tmp_path}/opt/julia/bin/julia" in capsys.readouterr().out
    assert not julia_available()


def test_says_what_was_tried(machine, juliapkg, capsys, monkeypatch):
    monkeypatch.setenv("FAIL", "1")
    assert main(["install-julia"]) == 2
    assert capsys.readouterr().err == (
        "error: could not install Julia (juliapkg: OSError: no route to host; debian: there is no apt-get and no dpkg: "
        "this is neither Debian nor derived from it); install Julia 1.5 or newer by hand and set NEUROSDE_JULIA to its "
        "executable.\n"
    )
    assert os.listdir(locate.default_prefix().parent) == []


def test_quotes_apt(machine, monkeypatch, tmp_path):
    monkeypatch.setattr(install, "KEYRINGS", tmp_path)
    (tmp_path / "debian-archive-keyring.gpg").touch()
    script(machine / "dpkg")
    script(
        machine / "apt-get",
        'if [ "$1" = indextargets ]; then echo one: && echo one: && echo two:security && exit; fi',
        "echo 'E: The repository has no Release file.' >&2",
        "echo 'N: See the manual' >&2",
        "exit 100",
    )
    with pytest.raises(JuliaNotFoundError, match=r"\(debian: E: The repository has no Release file\.\); install Julia"):
        install_julia(method="debian")


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt, "broken", "empty"])
def test_failing_halfway_leaves_nothing(machine, monkeypatch, stop):
    def halfway(work, tree):
        if stop == "empty":
            tree.mkdir()
            return
        script(tree / "usr/bin/julia", "exit 127")
        if stop != "broken":
            raise stop

    monkeypatch.setattr(install, "_by_debian", halfway)
    with pytest.raises(stop if isinstance(stop, type) else JuliaNotFoundError):
        install_julia(method="debian")
    assert os.listdir(locate.default_prefix().parent) == []
    assert not julia_available()


def test_what_a_killed_installation_leaves_is_no_julia_and_is_removed_by_the_next(machine, monkeypatch):
    monkeypatch.setattr(install, "_by_debian", lambda work, tree: fake_julia(tree / "usr/bin/julia"))
    started = (
        "import os, signal; from neurosde.julia import install\n"
        "def way(work, tree):\n    tree.mkdir(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "install._by_debian = way; install.install_julia(method='debian')"
    )
    killed = subprocess.run([sys.executable, "-c", started], check=False)
    assert killed.returncode == -9
    parent = locate.default_prefix().parent
    (left,) = parent.iterdir()
    assert left.name.endswith(".part") and not julia_available()
    assert install_julia(method="debian").version == (1, 9, 2)
    assert os.listdir(parent) == ["julia"]


def test_two_at_once(machine, monkeypatch):
    calls = []

    def slow(work, tree):
        calls.append(work)
        time.sleep(0.1)
        fake_julia(tree / "usr/bin/julia")

    monkeypatch.setattr(install, "_by_debian", slow)
    found = []
    threads = [threading.Thread(target=lambda: found.append(install_julia(method="debian"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and len(set(found)) == 1 and len(calls) == 1


def test_replaces_its_own_only(machine, monkeypatch, tmp_path):
    monkeypatch.setattr(install, "_by_debian", lambda work, tree: fake_julia(tree / "usr/bin/julia", "1.5.3"))
    prefix = private("1.11.5", method="juliapkg")
    assert install_julia(method="debian").version == (1, 5, 3)  # another kind was asked for
    assert not (prefix / "bin").exists()
    script(prefix / "usr/bin/julia", "exit 1")  # broken meanwhile
    assert install_julia(method="debian").version == (1, 5, 3)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").touch()
    with pytest.raises(ValueError, match=r"thesis exists and holds something else; give --prefix a folder that is not"):
        install_julia(tmp_path / "thesis", "debian")
    with pytest.raises(ValueError, match="method must be one of"):
        install_julia(method="conda")
    with pytest.raises(
        OSError, match="could not write .*chapter.tex/julia: there is a file where its folder should be"
    ):
        install_julia(tmp_path / "thesis/chapter.tex/julia")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("apt-get") is None, reason="there is no apt-get on this machine")
def test_debian_for_real(tmp_path, monkeypatch):
    for name, value in {"HOME": "home", "XDG_DATA_HOME": "data", "TMPDIR": "tmp"}.items():
        (tmp_path / value).mkdir()
        monkeypatch.setenv(name, str(tmp_path / value))
    system = [Path("/var", name) for name in ("lib/apt/lists", "cache/apt", "cache/apt/archives", "lib/dpkg")]
    before = [folder.stat().st_mtime_ns for folder in system if folder.exists()]
    try:
        julia = install_julia(tmp_path / "opt/julia", "debian")
    except JuliaNotFoundError as error:
        if os.environ.get("NEUROSDE_REQUIRE_JULIA") == "1":
            raise
        pytest.skip(str(error))
    assert [folder.stat().st_mtime_ns for folder in system if folder.exists()] == before
    assert sorted(str(path.relative_to(tmp_path)) for path in [*tmp_path.iterdir(), *tmp_path.glob("*/*")]) == [
        "data", "home", "opt", "opt/julia", "tmp",
    ]  # fmt: skip
    program = "using LinearAlgebra; print(1 + 1, ' ', ones(2, 2) * ones(2, 2) == fill(2.0, 2, 2))"
    command = [julia.executable, "--startup-file=no", "-e", program]
    done = subprocess.run(command, env=julia.environment(), capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "2 true"


def test_doctor_without_julia(machine, capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "neurosde", "Python", "torch", "torchsde", "torchdiffeq", "xarray", "netCDF4", "CPU", "CUDA", "julia",
    ]  # fmt: skip
    assert lines[-1] == "julia: not found, torch is used; neurosde install-julia gets one"


def test_doctor_with_an_unusable_julia(machine, capsys):
    fake_julia(machine / "julia", "1.0.5")
    assert main(["doctor"]) == 1
    assert "is Julia 1.0.5, but neurosde needs 1.5 or newer" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("error", "status", "verdict"),
    [
        (1e-13, 0, "torch.float64 differs from torch by 1.0e-13 (at most 1e-12): good"),
        (1e-6, 1, "torch.float64 differs from torch by 1.0e-06 (at most 1e-12): BAD"),
        (float("nan"), 1, "torch.float64 differs from torch by nan (at most 1e-12): BAD"),
        (OSError("broken\npipe"), 1, "julia self-test: failed, OSError: broken pipe"),
    ],
)
def test_doctor_judges(machine, capsys, monkeypatch, error, status, verdict):
    def deviation(dtype):
        if isinstance(error, Exception):
            raise error
        return error

    worker = ModuleType("neurosde.julia.worker")
    worker.describe = lambda: {"version": "1.9.2", "threads": 2, "cpu": "native", "llvm": "14", "lanes_bits": 256}
    monkeypatch.setitem(sys.modules, "neurosde.julia.worker", worker)
    monkeypatch.setattr(doctor, "deviation", deviation)
    fake_julia(machine / "julia")
    assert main(["doctor"]) == status
    lines = capsys.readouterr().out.splitlines()
    assert f"julia: 1.9.2, {machine}/julia (from PATH)" in lines
    assert "julia worker: Julia 1.9.2, 2 threads, CPU target native, LLVM 14, vectors of 256 bits" in str(lines)
    assert lines[-1].endswith(verdict)


def test_doctor_with_julia(julia, capsys):
    assert main(["doctor"]) == 0, capsys.readouterr().out
    assert capsys.readouterr().out.count(": good\n") == 2
