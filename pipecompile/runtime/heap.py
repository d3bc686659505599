"""Memory that a step frees stays with the process for the next one.

glibc gives freed memory back to the system: at once if it was asked for in one piece above a threshold (from 128 KiB to
32 MiB), and whenever much is free at the heap's end. A training step frees all that it took, so each would meet the same
pages as new ones, which the system has to find and to clear. Here they are kept, as CUDA's caching allocator keeps its
blocks. Source: mallopt(3).
"""

from __future__ import annotations

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT = (1 << 30, 32 << 20)
"""Bytes: larger pieces still go back at once, and so does what is free beyond them at the heap's end. Of the two, the
first that this glibc takes: older ones take no more than 32 MiB."""


def keep_freed_memory() -> bool:
    """Have malloc keep what is freed; False where it is another malloc, or the environment has set it up itself."""
    if platform.libc_ver()[0] != "glibc":
        return False
    given = [name for name, value in os.environ.items() if value]
    if any(name.startswith("MALLOC_") or name in ("LD_PRELOAD", "GLIBC_TUNABLES") for name in given):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return any(mallopt(M_MMAP_THRESHOLD, kept) and mallopt(M_TRIM_THRESHOLD, kept) for kept in KEPT)
