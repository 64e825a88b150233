"""The Julia worker and its memory under all that can happen to them: signals, crashes, forks, threads, limits."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from neurosde import simulate_rate_network
from neurosde.activation import get_activation
from neurosde.julia import JuliaNotFoundError, arena, choice, locate, worker
from neurosde.julia.arena import PAGE
from neurosde.julia.engine import JuliaEngine
from neurosde.julia.worker import OP_DESCRIBE, PACKAGE, JuliaWorkerError, Worker, get_worker
from neurosde.problem import Problem

pytestmark = [
    pytest.mark.usefixtures("julia"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc"),
]

STEPS = 20_000


def small(engine="julia", seed=0, K=3):
    generator = torch.Generator().manual_seed(seed)
    W, h0 = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((5, 5), (K, 5)))
    return simulate_rate_network(W, h0, 20, 0.1, 1.0, noise_std=0.1, engine=engine, generator=seed)


def works():
    torch.testing.assert_close(small(), small("torch"), rtol=1e-9, atol=1e-10)


def long(**options):
    """A simulation of about ten seconds."""
    W, h0 = torch.full((1200, 1200), 1e-4, dtype=torch.float64), torch.zeros(8, 1200, dtype=torch.float64)
    return simulate_rate_network(W, h0, STEPS // 4, 0.1, 1.0, noise_std=0.1, engine="julia", generator=0, **options)


def gone(pid, patience=5.0):
    """Whether a process ends, and is waited for, in time."""
    deadline = time.monotonic() + patience
    while Path(f"/proc/{pid}").exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@contextlib.contextmanager
def meanwhile(act, seconds=0.4):
    """Do something in another thread while this one computes; yields a list to which it adds when it did it."""
    when = []
    timer = threading.Timer(seconds, lambda: (when.append(time.monotonic()), act()))
    timer.start()
    try:
        yield when
    finally:
        timer.join()


@contextlib.contextmanager
def handler(number, action):
    previous = signal.signal(number, action)
    try:
        yield
    finally:
        signal.signal(number, previous)


@pytest.fixture
def nothing_lost():
    """Running and computing before; afterwards too, with no block of memory more in use."""
    works()
    gc.collect()
    before = get_worker().arena.live_bytes
    yield
    gc.collect()
    assert get_worker().arena.live_bytes == before
    works()


@pytest.fixture
def fresh(monkeypatch):
    """A worker of its own in place of this process's."""
    another = Worker()
    monkeypatch.setattr(worker, "_worker", another)
    yield another
    another.stop()


def run_script(text, folder, *arguments, **options):
    path = folder / "script.py"
    path.write_text(text)
    ran = subprocess.run([sys.executable, path, *arguments], capture_output=True, text=True, timeout=120, **options)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def script(path, *lines):
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return str(path)


# Signals and crashes


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_stops_a_simulation(nothing_lost):
    pid = get_worker().pid
    with handler(signal.SIGINT, signal.default_int_handler):  # a job in the background ignores it
        with meanwhile(interrupt) as when, pytest.raises(KeyboardInterrupt):
            long()
        assert time.monotonic() - when[0] < 1
        works()
        assert get_worker().pid == pid


def test_ctrl_c_stops_a_gradient(nothing_lost):
    N, T = 700, 300
    W = torch.full((N, N), 1e-4, dtype=torch.float64).requires_grad_()
    x = simulate_rate_network(W, torch.zeros(8, N, dtype=torch.float64), T, 0.1, 1.0, engine="julia")
    x[..., :1].sum().backward(retain_graph=True)
    pid, loss = get_worker().pid, x.sum()
    with handler(signal.SIGINT, signal.default_int_handler):
        with meanwhile(interrupt, 0.3) as when, pytest.raises(KeyboardInterrupt):
            for _ in range(100):
                loss.backward(retain_graph=True)
        assert time.monotonic() - when[0] < 1
    assert get_worker().pid == pid
    del x, loss


def test_an_exception_of_a_signal_handler_is_passed_on(nothing_lost):
    """Such as the TimeoutError, an OSError, of those who limit a computation's time by SIGALRM."""

    def give_up(*_):
        raise TimeoutError("enough")

    pid = get_worker().pid
    with handler(signal.SIGALRM, give_up):
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(TimeoutError, match="enough"):
            long()
    works()
    assert get_worker().pid == pid


def test_a_signal_whose_handler_returns_does_not_matter(nothing_lost):
    seen = []
    with handler(signal.SIGALRM, lambda *_: seen.append(1)):
        signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
        try:
            for _ in range(50):
                works()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    assert seen


def test_a_worker_that_does_not_stop_is_killed(nothing_lost, monkeypatch):
    monkeypatch.setattr(worker, "PATIENCE", 0.2)
    pid = get_worker().pid

    def freeze_and_interrupt():
        os.kill(pid, signal.SIGSTOP)
        interrupt()

    with handler(signal.SIGINT, signal.default_int_handler):
        with meanwhile(freeze_and_interrupt) as when, pytest.raises(KeyboardInterrupt):
            long()
        assert time.monotonic() - when[0] < 1.5
    assert gone(pid)
    assert not get_worker().running
    works()


def test_a_worker_killed_in_a_call_is_an_error_and_replaced(nothing_lost):
    pid = get_worker().pid
    with (
        meanwhile(lambda: os.kill(pid, signal.SIGKILL)),
        pytest.raises(JuliaWorkerError, match=r"killed by SIGKILL.*out of memory.*next call.*engine=\"torch\""),
    ):
        long()
    assert gone(pid)
    works()
    assert get_worker().pid != pid


@pytest.mark.parametrize("action", [signal.SIG_IGN, signal.SIG_DFL])  # of SIGPIPE, which many programs set
def test_a_worker_killed_while_idle_is_replaced(nothing_lost, action):
    pid = get_worker().pid
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.1)
    with handler(signal.SIGPIPE, action):
        works()
    assert get_worker().pid != pid
    assert gone(pid)


def test_what_fails_in_julia_fails_at_once_and_costs_no_worker(nothing_lost):
    one = get_worker()
    pid, began = one.pid, time.monotonic()
    for _ in range(20):
        with one.lock, pytest.raises(JuliaWorkerError, match="the Julia core failed: BoundsError"):
            one.request([1, 4, 99])  # there are not so many nonlinearities
    assert time.monotonic() - began < 5
    assert one.pid == pid


ENDS = """
import os, signal, sys, threading
import torch
from neurosde import simulate_rate_network
from neurosde.julia.worker import describe, get_worker

parent = os.getpid()
for how in ("exit", "exception", "_exit", "killed", "killed in a call"):
    if os.fork() == 0:
        break
else:
    for _ in range(5):
        os.wait()
    os._exit(0)
torch.set_num_threads(1)
describe()
pid = get_worker().pid
if how == "exception":
    sys.stderr = open(os.devnull, "w")
    os.write(1, f"{pid}\\n".encode())
    raise RuntimeError
if how == "killed in a call":
    W = torch.full((1200, 1200), 1e-4)
    simulate_rate_network(W, torch.zeros(1, 1200), 2, 0.1, 1.0, engine="julia")  # compiles
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
    os.write(1, f"{pid}\\n".encode())
    simulate_rate_network(W, torch.zeros(8, 1200), 30000, 0.1, 1.0, engine="julia")
os.write(1, f"{pid}\\n".encode())
if how == "_exit":
    os._exit(0)
if how == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_worker_ends_with_its_parent_however_that_ends(tmp_path):
    shared, own = Path("/dev/shm"), tmp_path / "temporary"
    own.mkdir()
    before = set(os.listdir(shared))
    pids = run_script(ENDS, tmp_path, env=os.environ | {"TMPDIR": str(own)}).split()
    assert len(set(pids)) == 5
    assert all(gone(pid, 3) for pid in pids)
    others = ("torch_", "sem.mp-")  # shared tensors and semaphores of other Python programs
    assert not [name for name in set(os.listdir(shared)) - before if not name.startswith(others)]
    assert not [name for name in os.listdir(own) if "neurosde" in name]


# Children


FORKS = """
import os, resource
import torch
from neurosde import simulate_rate_network
from neurosde.julia.worker import get_worker

W, h0 = torch.zeros(40, 40), torch.zeros(100, 40)

def path(value):
    return simulate_rate_network(W, h0 + value, 50, 0.1, 1.0, phi="linear", engine="julia")

def offset(x):
    return get_worker().arena.offset_of(x)

class Set(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        return path(float(i))

def load(context):
    loader = torch.utils.data.DataLoader(Set(), batch_size=2, num_workers=1, multiprocessing_context=context)
    for batch, x in enumerate(loader):
        for i in range(2):
            assert torch.equal(x[i, :, 0], h0 + (2 * batch + i)), (batch, i)

if __name__ == "__main__":
    kept, lost = path(1.0), path(2.0)
    place, pid, before = offset(lost), get_worker().pid, lost.clone()
    said, heard = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(heard[1])
        torch.set_num_threads(1)  # OpenMP's threads are not in a child
        ok = torch.equal(lost, before) and get_worker().pid is None
        kept.fill_(9.0)  # this process's own
        os.write(said[1], b"written")
        os.read(heard[0], 1)
        ok = ok and torch.equal(lost, before) and bool((kept == 9).all())
        os._exit(0 if ok else 1)
    os.read(said[0], 7)
    assert torch.equal(kept[:, 0], h0 + 1), "a child wrote to its parent's memory"
    del lost
    others = [path(3.0 + i) for i in range(5)]
    assert place not in map(offset, others), "memory that a child reads was used again"
    os.write(heard[1], b"x")
    assert os.waitpid(child, 0)[1] == 0, "the child's tensor changed"
    del others
    others = [path(3.0 + i) for i in range(5)]
    assert place in map(offset, others), "memory was not used again after the child had ended"
    del others
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
    for _ in range(120):
        if os.fork() == 0:
            os._exit(0)
        os.wait()
    path(1.0)
    assert len(os.listdir("/proc/self/fd")) < 20
    load("fork")
    load("spawn")
    assert torch.equal(kept[:, 0], h0 + 1)
    assert get_worker().pid == pid
"""


def test_forked_and_spawned_children(tmp_path):
    run_script(FORKS, tmp_path)


# Threads and memory


def test_calls_from_several_threads(nothing_lost):
    expected = [small("torch", seed, 200) for seed in range(4)]
    found: dict[int, list[torch.Tensor]] = {seed: [] for seed in range(4)}

    def run(seed):
        found[seed] += [small("julia", seed, 200) for _ in range(40)]

    threads = [threading.Thread(target=run, args=(seed,)) for seed in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, results in found.items():
        assert len(results) == 40
        for x in results:
            torch.testing.assert_close(x, expected[seed], rtol=1e-9, atol=1e-10)


def test_a_block_is_free_when_the_last_view_is_gone(nothing_lost):
    shared = get_worker().arena
    before = shared.live_bytes
    x = small(K=500)
    offset, expected = shared.offset_of(x), x.clone()
    assert offset is not None
    view, array = x[3, :, 2:], x[4].numpy()
    size = shared.live_bytes - before
    assert size == -(-x.numel() * 8 // PAGE) * PAGE
    del x
    other = small(seed=1, K=500)
    assert shared.offset_of(other) != offset
    assert torch.equal(view, expected[3, :, 2:]) and (array == expected[4].numpy()).all()
    del view
    assert shared.live_bytes == before + 2 * size
    del array, other
    assert shared.live_bytes == before
    again = small(K=500)
    assert shared.offset_of(again) == offset and torch.equal(again, expected)
    del again


def test_too_much_is_a_memory_error(nothing_lost):
    steps = arena.physical_memory() // 4
    with pytest.raises(MemoryError, match=r"needs [\d.]+ GB more of memory, and [\d.]+ GB are there; simulate fewer"):
        simulate_rate_network(torch.zeros(2, 2), torch.zeros(2), steps, 0.1, 1.0, engine="julia")


def test_more_than_is_available_is_a_memory_error(nothing_lost, monkeypatch):
    monkeypatch.setattr(arena, "available_memory", lambda: 10**8)
    W, h0 = torch.zeros(2, 2), torch.zeros(100, 2)
    with pytest.raises(MemoryError, match=r"and 0\.1 GB are there"):
        simulate_rate_network(W, h0, 2_000_000, 0.1, 1.0, engine="julia")


def test_without_memfd_and_with_little_address_space(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "memfd_create")
    monkeypatch.setattr(arena.tempfile, "tempdir", str(tmp_path))
    truncate = os.ftruncate

    def limited(descriptor, length):
        if length > 1 << 30:
            raise OSError("no room")
        truncate(descriptor, length)

    monkeypatch.setattr(os, "ftruncate", limited)
    another = Worker()
    try:
        assert 1 << 28 < another.arena.size <= 1 << 30
        assert another.request([OP_DESCRIBE])
        assert os.listdir(tmp_path) == []
    finally:
        another.stop()


def status(pid, field):
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0])


@pytest.mark.slow
def test_a_hundred_thousand_calls_leak_nothing(nothing_lost):
    problem = Problem(
        phi=get_activation("tanh"),
        steps=4,
        state=torch.zeros(1, 2, 3),
        weights=torch.zeros(1, 3, 3),
        decay=torch.full((1, 1, 1), 0.9),
        input=None,
        noise_std=torch.full((1, 1, 1), 0.1),
        increments=torch.zeros(4, 1, 2, 3),
    )
    engine = JuliaEngine()
    one = get_worker()
    assert one.pid is not None

    def measure():
        return [(len(os.listdir(f"/proc/{pid}/fd")), status(pid, "VmRSS")) for pid in (os.getpid(), one.pid)]

    found = []
    for _ in range(12):
        for _ in range(5000):  # two calls each
            x, _ = engine.forward(problem, activity=True, voltage=False)
            engine.vjp(problem, x, None, x, None, frozenset({"state", "weights"}))
        found.append([*measure(), one.arena.live_bytes])
    # Julia's heap grows for 40 000 calls, and then, as garbage is collected now and then, goes up and down by 15 MB:
    # what is least in between would grow with a leak.
    earlier, later = found[4:8], found[8:]
    for k in range(2):
        assert {each[k][0] for each in found[1:]} == {found[0][k][0]}  # open files
        assert min(each[k][1] for each in later) - min(each[k][1] for each in earlier) < 8_000  # kB, for 40 000 calls
    assert found[-1][2] == found[0][2]


# Julias that do not work


@pytest.fixture
def no_julia(monkeypatch, tmp_path, fresh):
    (tmp_path / "bin").mkdir()
    monkeypatch.delenv("NEUROSDE_JULIA", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    locate.forget()
    yield
    locate.forget()


def test_without_julia(no_julia, monkeypatch):
    with pytest.raises(JuliaNotFoundError, match="neurosde install-julia"):
        small()
    monkeypatch.setattr(choice, "_saved", 1e9)  # long due
    assert torch.equal(small("auto"), small("torch"))


VERSION = 'case "$*" in *--version*) echo julia version 1.9.2; exit 0;; esac'


@pytest.mark.parametrize(
    ("does", "match"),
    [
        (
            "echo first line; echo ERROR: the system image is broken >&2; exit 1",
            "exit status 1: ERROR: the system image",
        ),
        ("echo what do you want?", r"exit status 0: what do you want\?"),
        ("kill -SEGV $$", "killed by SIGSEGV"),
        ("exit 139", "killed by SIGSEGV"),
        ("exec 0<&- 1>&- 2>&-; exit 3", "exit status 3"),
    ],
)
def test_a_broken_julia_is_quoted_and_not_tried_for_ever(no_julia, fresh, tmp_path, monkeypatch, does, match):
    log = tmp_path / "log"
    monkeypatch.setenv("NEUROSDE_JULIA", script(tmp_path / "broken", VERSION, f"echo started >> {log}", does))
    monkeypatch.setenv("PATH", os.defpath)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(JuliaWorkerError, match=match):
        small()
    assert len(log.read_text().split()) == 2  # with the cache, and without
    assert not fresh.running and fresh.arena.live_bytes == 0
    monkeypatch.setattr(choice, "_saved", 1e9)  # long due
    with pytest.warns(UserWarning, match=f"goes on with torch, since Julia does not start: .*{match}"):
        assert torch.equal(small("auto"), small("torch"))
    assert torch.equal(small("auto"), small("torch"))  # without a word, and without another attempt
    assert len(log.read_text().split()) == 4


def test_a_julia_that_is_gone(no_julia, tmp_path, monkeypatch):
    there = script(tmp_path / "julia", VERSION)
    monkeypatch.setenv("NEUROSDE_JULIA", there)
    monkeypatch.setenv("PATH", os.defpath)
    locate.find_julia()
    os.unlink(there)
    with pytest.raises(JuliaWorkerError, match=f"{there} could not be started"):
        small()


def test_a_julia_that_hangs(no_julia, fresh, tmp_path, monkeypatch):
    pids = tmp_path / "pids"
    hanging = script(tmp_path / "julia", VERSION, f"echo $$ >> {pids}", f"sleep 60 & echo $! >> {pids}; wait")
    monkeypatch.setenv("NEUROSDE_JULIA", hanging)
    monkeypatch.setenv("PATH", os.defpath)
    monkeypatch.setattr(worker, "PATIENCE", 0.1)
    with (
        handler(signal.SIGINT, signal.default_int_handler),
        meanwhile(interrupt, 0.5) as when,
        pytest.raises(KeyboardInterrupt),
    ):
        small()
    assert time.monotonic() - when[0] < 1
    monkeypatch.setattr(worker, "START_LIMIT", 0.5)
    with pytest.raises(JuliaWorkerError, match=r"julia did not start to work in 0\.5 s"):
        small()
    processes = pids.read_text().split()
    assert len(processes) == 4  # a script and what it started, twice
    assert all(gone(pid, 2) for pid in processes)


def starts(another):
    text = another.request([OP_DESCRIBE]).decode()
    assert "version=" in text
    return text


def test_settings_of_other_julias_do_not_matter(fresh, monkeypatch):
    for name in ("PROJECT", "LOAD_PATH", "DEPOT_PATH", "NUM_THREADS", "CPU_THREADS", "BINDIR", "EXCLUSIVE", "DEBUG"):
        monkeypatch.setenv(f"JULIA_{name}", "nonsense")
    assert f"threads={torch.get_num_threads()}" in starts(fresh)


def test_nothing_needs_to_be_written(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = tmp_path / "neurosde" / "julia"
    assert worker._writable_cache() == cache
    (cache / "compiled").write_text("no folder")
    names = sorted(PACKAGE.rglob("*"))
    starts(fresh)
    assert sorted(PACKAGE.rglob("*")) == names
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "compiled"))
    assert worker._writable_cache() is None
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # no home
    monkeypatch.chdir(tmp_path)
    assert worker._writable_cache() is None
    assert not (tmp_path / "~").exists()
