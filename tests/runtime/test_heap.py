"""Freed memory stays with the process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from pipecompile.runtime.heap import keep_freed_memory

def faults():
    began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - began

faults()
before = faults()
kept = keep_freed_memory()
faults()
print(kept, before, faults())
"""


def run(**environment: str) -> tuple[str, int, int]:
    """Whether memory is kept, and the page faults of 20 tensors of 64 MiB before and after."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("MALLOC_") and name not in ("LD_PRELOAD", "GLIBC_TUNABLES")
    }
    done = subprocess.run([sys.executable, "-c", FAULTS], env=clean | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kept, before, after = done.stdout.split()
    return kept, int(before), int(after)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other mallocs are left as they are")
def test_a_tensor_meets_the_pages_of_the_last_one() -> None:
    kept, before, after = run()
    assert kept == "True"
    assert after < before / 20


def test_what_the_environment_sets_up_stays() -> None:
    assert run(MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"
