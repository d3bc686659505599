"""Compiling models of many layers: seconds from command to written plan, and the command's peak memory.

    python benchmarks/huge.py

Llama 3.1 405B (126 layers, on the meta device) with 16 stages, interleaved on 8 ranks, estimated for H100; and a tiny Llama
of 96 layers with 4 stages, once with estimated costs, once as by default (measured, checked against the unsplit model).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = """
import torch
from benchmarks.capture import model_of

def model(): return model_of(96)
def batch():
    tokens = torch.arange(256).reshape(8, 32)
    return {"input_ids": tokens, "labels": tokens}
"""


@dataclass(frozen=True, slots=True)
class Case:
    """A command, and the most seconds and bytes that it may take (None: no bar)."""

    name: str
    options: tuple[str, ...]
    seconds: float | None
    bytes: int | None = None


HUGE = ("--stages", "16", "--ranks", "8", "--schedule", "interleaved-1f1b", "--costs", "estimate", "--machine", "h100")
CASES = (
    Case("405B", HUGE, 20, 1_500_000_000),
    Case("96 layers, estimated", ("--stages", "4", "--microbatches", "4", "--costs", "estimate"), 8),
    Case("96 layers, measured and checked", ("--stages", "4", "--microbatches", "4"), None),
)


def command(case: Case, file: Path, out: Path) -> tuple[float, int]:
    """Seconds and peak bytes of one command."""
    words = [sys.executable, "-m", "pipecompile", str(file), *case.options, "--out", str(out)]
    path = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    begin = time.perf_counter()
    started = subprocess.Popen(words, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(started.pid, 0)
    seconds = time.perf_counter() - begin
    assert status == 0, f"{' '.join(words)} failed"
    assert (out / "plan.json").exists()
    return seconds, used.ru_maxrss * 1024


def main() -> None:
    met = True
    with tempfile.TemporaryDirectory() as place:
        tiny = Path(place) / "tiny.py"
        tiny.write_text(TINY)
        for number, case in enumerate(CASES):
            file = EXAMPLES / "llama_405b.py" if case.name == "405B" else tiny
            seconds, peak = command(case, file, Path(place) / str(number))
            bars = [f"{case.seconds} s"] if case.seconds else []
            bars += [f"{case.bytes / 1e9} GB"] if case.bytes else []
            print(f"{case.name:32} {seconds:6.1f} s  {peak / 1e6:6.0f} MB  bar {', '.join(bars) or '-'}", flush=True)
            met &= seconds <= (case.seconds or seconds) and peak <= (case.bytes or peak)
    sys.exit(not met)


if __name__ == "__main__":
    main()
