"""The process that runs the Julia core, and how it is talked to.

Requests and replies go over a socket pair, numbers through the arena's shared memory. The worker is started by the
first call that needs it and ends when this process does, however that ends: it then finds its socket closed. Ctrl-C
sets the stop flag in shared memory, which the kernels look at between steps. A worker that dies makes its call raise
`JuliaWorkerError`, and the next call starts another one; one that is found dead before it has read the request is
replaced without further ado. A forked child starts a worker of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import select
import signal
import socket
import struct
import subprocess
import threading
import time
from pathlib import Path
from typing import IO

import torch

from neurosde.julia.arena import Arena, anonymous_file
from neurosde.julia.locate import Julia, JuliaError, find_julia

REQUEST_WORDS = 96  # as in server.jl
REPLY = struct.Struct("<2q")
MESSAGE_OFFSET = 64
OP_DESCRIBE, OP_FORWARD, OP_ADJOINT, OP_PEAK = range(4)
DONE, FAILED, INTERRUPTED = range(3)
PACKAGE = Path(__file__).resolve().parent / "NeuroSDE.jl"
PATIENCE = 2.0  # seconds that an interrupted worker has to answer before it is killed
START_LIMIT = 120.0  # seconds for a worker to load
WINK = 200  # milliseconds after which a signal is seen that came just before the call that waits
NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)  # a dead worker is an error, even where SIGPIPE ends the program


class JuliaWorkerError(JuliaError):
    """The Julia worker failed or died; the message says how. The next call starts a new one."""


class _NoReplyError(Exception):
    """The worker has not answered for too long."""


class Worker:
    """A Julia process; `request` is safe from several threads, which take turns."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.arena = Arena()
        self.threads = 0
        self.start_seconds = 0.0
        self._process: subprocess.Popen | None = None
        self._socket: socket.socket | None = None
        self._ready = select.poll()  # tells when there is something to receive
        self._errors: IO[bytes] | None = None
        self._owed = 0  # bytes of a reply that are still to come

    @property
    def running(self) -> bool:
        """Whether the process has been started and has not been found dead."""
        return self._process is not None

    @property
    def pid(self) -> int | None:
        """Process id of the worker, None while there is none."""
        return None if self._process is None else self._process.pid

    def request(self, words: list[int]) -> bytes:
        """Send a request and wait for its reply; the caller holds `lock`.

        Args:
            words: the request, at most 96 integers.

        Returns:
            The worker's message, empty for computations.

        Raises:
            JuliaNotFoundError: there is no Julia.
            JuliaWorkerError: the worker failed or died.
            KeyboardInterrupt: Ctrl-C; the worker has stopped computing.
        """
        message = struct.pack(f"<{REQUEST_WORDS}q", *words, *[0] * (REQUEST_WORDS - len(words)))
        if self._process is not None:
            try:
                return self._exchange(message)
            except ConnectionError:  # it had died before it read the message
                self.stop()
        self._start()
        try:
            return self._exchange(message)
        except ConnectionError as error:
            raise self._death() from error

    def stop(self) -> None:
        """End the process, if there is one; it is started again when it is needed."""
        process, self._process = self._process, None
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if process is not None:
            try:
                process.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                _kill(process)
        if self._errors is not None:
            self._errors.close()
            self._errors = None

    def abandon(self) -> None:
        """Let go of a parent's worker, in a forked child: close what was inherited, disturb nothing."""
        if self._socket is not None:
            self._socket.close()
        if self._errors is not None:
            self._errors.close()
        if self._process is not None:
            self._process.returncode = 0  # it is not this process's to wait for
        self._socket = self._process = self._errors = None
        self.arena.after_fork_in_child()

    def _start(self) -> None:
        julia = find_julia()
        began = time.perf_counter()
        depot = _writable_cache()
        try:
            self._launch(julia, depot)
        except JuliaWorkerError:
            if depot is None or time.perf_counter() - began > START_LIMIT:
                raise
            self._launch(julia, None)  # what is in the cache, or a full disk, may be the reason
        self.start_seconds = time.perf_counter() - began

    def _launch(self, julia: Julia, depot: Path | None) -> None:
        self.threads = torch.get_num_threads()
        # The user's settings are for other uses of Julia: a project, say, or the number of threads.
        inherited = {name: value for name, value in julia.environment().items() if not name.startswith("JULIA_")}
        environment = inherited | {
            "JULIA_NUM_THREADS": str(self.threads),
            "JULIA_THREAD_SLEEP_THRESHOLD": "100000",  # ns: idle threads do not keep a core busy
            "OPENBLAS_NUM_THREADS": "1",  # Julia's own, which is not used
            "JULIA_LOAD_PATH": str(PACKAGE),
        }
        command = [str(julia.executable), "--startup-file=no", "--history-file=no", "-O3", "-C", "native"]
        if depot is None:
            command.append("--compiled-modules=no")
        else:
            environment["JULIA_DEPOT_PATH"] = str(depot)
        try:
            try:
                self._errors = os.fdopen(anonymous_file(), "w+b")
                self._socket, theirs = socket.socketpair()
                self._ready = select.poll()
                self._ready.register(self._socket, select.POLLIN)
                serve = f"using NeuroSDE; NeuroSDE.serve({theirs.fileno()}, {self.arena.fd}, {self.arena.size})"
                with _forking, theirs:  # a child forked now would keep the worker's end open: its death is not seen
                    self._process = subprocess.Popen(
                        [*command, "-e", serve],
                        stdin=subprocess.DEVNULL,
                        stdout=self._errors,
                        stderr=self._errors,
                        env=environment,
                        pass_fds=(theirs.fileno(), self.arena.fd),
                        start_new_session=True,  # Ctrl-C is for this process; the worker hears of it from here
                        cwd="/",
                    )
            except OSError as error:
                raise JuliaWorkerError(f"{julia.executable} could not be started: {error}.") from error
            self._exchange(struct.pack(f"<{REQUEST_WORDS}q", OP_DESCRIBE, *[0] * (REQUEST_WORDS - 1)), START_LIMIT)
        except ConnectionError as error:
            raise self._death() from error
        except BaseException as error:
            self.stop()
            if isinstance(error, _NoReplyError):
                raise JuliaWorkerError(f"{julia.executable} did not start to work in {START_LIMIT:g} s.") from error
            raise

    def _exchange(self, message: bytes, limit: float = math.inf) -> bytes:
        """Send a request and return the reply's message; ConnectionError if the worker has not read the request."""
        assert self._socket is not None
        self._owed = REPLY.size
        try:
            self._socket.sendall(message, NO_SIGNAL)
            reply = self._receive(limit)
        except EOFError as error:
            raise self._death() from error
        except ConnectionError:
            raise
        except BaseException:
            self._interrupt()
            raise
        status, length = REPLY.unpack(reply)
        text = bytes(self.arena.bytes[MESSAGE_OFFSET : MESSAGE_OFFSET + length].numpy()) if length else b""
        if status != DONE:
            what = f"failed: {text.decode(errors='replace')}" if status == FAILED else "was interrupted."
            raise JuliaWorkerError(f"the Julia core {what}")
        return text

    def _receive(self, limit: float) -> bytes:
        """Receive what is owed; _NoReplyError after `limit` seconds, to within WINK."""
        assert self._socket is not None
        reply, began = b"", time.monotonic()
        while self._owed:
            if not self._ready.poll(WINK):
                if time.monotonic() - began > limit:
                    raise _NoReplyError
                continue
            got = self._socket.recv(self._owed)
            if not got:
                raise EOFError
            reply += got
            self._owed -= len(got)
        return reply

    def _interrupt(self) -> None:
        """Stop a computation whose reply nobody waits for; kill a worker that does not answer."""
        if self._socket is None or not self._owed:
            return
        try:
            self.arena.stop.value = 1
            self._receive(PATIENCE)
        except (_NoReplyError, OSError, EOFError, KeyboardInterrupt):
            if self._process is not None:
                _kill(self._process)
            self.stop()
        finally:
            self.arena.stop.value = 0

    def _death(self) -> JuliaWorkerError:
        """Clear up after a worker that hung up, and say how it ended."""
        process, errors = self._process, self._errors
        code = None
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(timeout=PATIENCE)
        said = ""
        if errors is not None:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
            said = next((line for line in lines if "rror" in line), lines[-1] if lines else "")[:300]
        self.stop()
        if code is not None and code - 128 in set(signal.Signals):
            code = 128 - code  # a shell in between says it so
        how = "did not answer" if code is None else f"exit status {code}"
        if code is not None and code < 0:
            how = f"killed by {signal.Signals(-code).name if -code in set(signal.Signals) else f'signal {-code}'}"
        memory = " It may have run out of memory." if code == -signal.SIGKILL else ""
        return JuliaWorkerError(
            f"the Julia worker ended ({how}{': ' + said if said else ''}).{memory} The next call starts a new one; "
            'engine="torch" does without it, and `neurosde doctor` tests it.'
        )


def get_worker() -> Worker:
    """Return this process's worker, which starts with its first request."""
    global _worker
    if _worker is None:
        with _creating:
            if _worker is None:
                _worker = Worker()
    return _worker


def worker_running() -> bool:
    """Whether this process has a worker that has started."""
    return _worker is not None and _worker.running


def describe() -> dict[str, str]:
    """Start the worker if need be and return what it says of itself: version, threads, cpu, llvm, lanes_bits.

    Raises:
        JuliaNotFoundError: there is no Julia.
        JuliaWorkerError: it does not run.
    """
    worker = get_worker()
    with worker.lock:
        text = worker.request([OP_DESCRIBE]).decode()
    return dict(line.split("=", 1) for line in text.splitlines())


def peak_flops() -> float:
    """Single-precision operations a second of torch's number of threads, multiply–adds in registers, measured now.

    Raises:
        JuliaNotFoundError: there is no Julia.
        JuliaWorkerError: it does not run.
    """
    worker = get_worker()
    with worker.lock:
        return float(worker.request([OP_PEAK, torch.get_num_threads()]))


_worker: Worker | None = None
_creating = threading.Lock()
_forking = threading.RLock()  # held where a process is being made
_inherited: list[Worker] = []  # keeps a parent's memory mapped in its children
_pipe: tuple[int, int] | None = None


@atexit.register
def _stop_at_exit() -> None:
    if _worker is not None:
        _worker.stop()


def _before_fork() -> None:
    global _pipe
    _forking.acquire()
    _pipe = None
    if _worker is not None:
        _pipe = _worker.arena.before_fork()


def _after_fork_in_parent() -> None:
    if _worker is not None:
        _worker.arena.after_fork_in_parent(_pipe)
    _forking.release()


def _after_fork_in_child() -> None:
    global _worker, _creating, _forking
    _creating, _forking = threading.Lock(), threading.RLock()
    if _worker is not None:
        if _pipe is not None:
            os.close(_pipe[0])  # the other end stays open as long as this process lives
        _worker.abandon()
        _inherited.append(_worker)
        _worker = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)


def _kill(process: subprocess.Popen) -> None:
    """End a process and those that it has started: `julia` may be a script that starts another one."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _writable_cache() -> Path | None:
    """Folder where Julia keeps the parsed package, which saves seconds at the next start; None if there is none.

    Outside the package, which may be installed read-only.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache")) / "neurosde" / "julia"
    if not folder.is_absolute():  # there is no home
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None
