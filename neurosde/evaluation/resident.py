"""How much memory this process takes at its peak, where the system tells."""

from __future__ import annotations

import ctypes
import gc
import math
import re
from pathlib import Path


def reset_peak() -> float:
    """Give back what was freed, let the peak of the resident set start anew, and return the set's bytes, or NaN."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError, TypeError):  # not Linux, or not glibc
        return math.nan
    return _resident("VmRSS")


def peak() -> float:
    """Return the bytes of the largest resident set since `reset_peak`; NaN where the system does not tell."""
    return _resident("VmHWM")


def _resident(which: str) -> float:
    try:
        found = re.search(which + r":\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return math.nan
    return 1024.0 * int(found[1]) if found else math.nan
