"""Where a file came from, and how it is put in its place only when it is whole."""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from neurosde._version import __version__


@cache
def git_commit() -> str:
    """Commit of the checkout that this package runs from, or "unknown" for an installed one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return "unknown"
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip()


def config_json(config: object) -> str:
    """Return a configuration dataclass or mapping as canonical JSON."""
    plain = asdict(config) if is_dataclass(config) and not isinstance(config, type) else config
    return json.dumps(plain, sort_keys=True, default=str)


def config_changes(there: str, wanted: str) -> str:
    """Say in what two configurations, as JSON, differ: name = value there, value now, …; empty if they are one."""
    if there == wanted:
        return ""
    old, new = json.loads(there), json.loads(wanted)
    differing = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return ", ".join(f"{key} = {old.get(key)} there, {new.get(key)} now" for key in differing)


def global_attributes(title: str, summary: str, config: object, seed: int | None = None) -> dict[str, Any]:
    """Global attributes of a netCDF file: CF and ACDD ones, and what it takes to make it again."""
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0).isoformat()
    attributes: dict[str, Any] = {
        "Conventions": "CF-1.11, ACDD-1.3",
        "title": title,
        "summary": summary,
        "creator_name": "neurosde",
        "creator_type": "institution",
        "date_created": now,
        "license": "CC0-1.0",
        "history": f"{now} {Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}".strip(),
        "source": f"neurosde {__version__}",
        "neurosde_version": __version__,
        "git_commit": git_commit(),
        "config": config_json(config),
    }
    if seed is not None:
        attributes["seed"] = seed
    return attributes


def explained(error: OSError, path: Path) -> OSError:
    """Return an error that says what of writing `path` failed and what to do."""
    reasons = {
        errno.ENOSPC: "no space is left on the disk; free some and run again",
        errno.EEXIST: "there is a file where its folder should be; choose another place",
        errno.ENOTDIR: "there is a file where its folder should be; choose another place",
        errno.EACCES: "permission is denied; choose a place that you may write to",
        errno.EROFS: "the file system is read-only; choose another place",
    }
    reason = reasons.get(error.errno or 0, f"{error.strerror or error}; choose another place")
    return OSError(f"could not write {path}: {reason}")


def make_folder(path: Path) -> None:
    """Make the folder that `path` is to be written into.

    Raises:
        OSError: it cannot be made; the message says why and what to do.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise explained(error, path) from error


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; when the block succeeds it is synced and renamed to `path`.

    Nothing appears under the final name before it is complete, and nothing is left behind if it never is.

    Raises:
        OSError: the folder cannot be written, or the disk is full; the message names the file.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise explained(error, path) from error
    finally:
        with contextlib.suppress(OSError):  # no such folder, which the error above explains
            temporary.unlink(missing_ok=True)
