"""Kills ranks of a training job at random moments, and compares what torchrun makes of it with the run that nobody killed.

``python -m tests.runtime.restarts [KILLS] [SEED]`` starts as many jobs, in each of which one or two attempts are killed:
``pipecompile run`` and a loop of one's own, 4 ranks and 2 ranks in 2 replicas; within steps, within saves, before a file of
a checkpoint is flushed or renamed. Losses and the last checkpoint's files are to be equal to the last bit.
"""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import pipecompile
from pipecompile.cli import main as command
from tests.runtime import restarting
from tests.runtime.restarting import EVERY, STEPS

ROOT = Path(__file__).parents[2]
JOBS = 12
Kill = tuple[int, int, str, int, float]


@dataclass(frozen=True, slots=True)
class Setting:
    """A job: ``pipecompile run`` or a loop of its own, of a build of so many ranks, in replicas."""

    own: bool
    schedule: str
    stages: int
    ranks: int
    replicas: int = 1

    def __str__(self) -> str:
        how = "own loop" if self.own else "pipecompile run"
        return f"{how}, {self.schedule}, {self.replicas} x {self.ranks}"


SETTINGS = (
    Setting(False, "1f1b", 4, 4),
    Setting(True, "zb-h1", 4, 4),
    Setting(False, "interleaved-1f1b", 4, 2, 2),
    Setting(True, "1f1b", 2, 2, 2),
    Setting(False, "pipedream", 2, 2),
)


def build_of(setting: Setting, place: Path) -> Path:
    target = place / "build"
    if setting.own:
        pipe = pipecompile.compile(
            restarting.narrow(),
            restarting.batch_of(0, 0),
            stages=setting.stages,
            ranks=setting.ranks,
            microbatches=4,
            schedule=setting.schedule,
            costs="estimate",
            gradient_dtype=torch.float32,
            check=False,
        )
        pipe.save(target)
        return target
    words = [restarting.__file__, "--stages", setting.stages, "--ranks", setting.ranks, "--microbatches", 4]
    words += ["--schedule", setting.schedule, "--costs", "estimate", "--no-check", "--json", "--out", target]
    with redirect_stdout(io.StringIO()):
        assert command([str(word) for word in words]) == 0
    return target


def run(setting: Setting, build: Path, place: Path, kills: list[Kill]) -> list[Any]:
    """What the processes saw in each step; RuntimeError unless the job came to its end."""
    agent = ["torch.distributed.run", "--standalone", "--max-restarts", str(len(kills)), "--nproc-per-node"]
    job = ["tests.runtime.restarting", build, place]
    if not setting.own:
        job = ["pipecompile", "run", build, "--json", "--steps", STEPS, "--save", place, "--save-every", EVERY]
        job += ["--timeout", 60]
    words = [sys.executable, "-m", *agent, str(setting.ranks * setting.replicas), "-m", *map(str, job)]
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "KILLS": json.dumps(kills)}
    done = subprocess.run(
        words, env=os.environ | variables, capture_output=True, text=True, timeout=300, cwd=ROOT, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-6000:])
    if not setting.own:
        losses: list[float] = json.loads(done.stdout)["losses"]
        return losses
    return [seen(path) for path in sorted(place.glob("seen-*.txt"))]


def seen(path: Path) -> dict[int, Any]:
    """What a process saw in each step; RuntimeError if it was not the same each time that it took one."""
    found: dict[int, Any] = {}
    for line in path.read_text().splitlines():
        step, *rest = json.loads(line)
        if found.setdefault(step, rest) != rest:
            raise RuntimeError(f"step {step} gave {found[step]} before and {rest} after a restart")
    return found


def contents(place: Path) -> dict[str, bytes]:
    """The files of the last checkpoint."""
    (last,) = place.glob(f"step-{STEPS:08}")
    return {path.name: path.read_bytes() for path in sorted(last.iterdir())}


def kills(draw: random.Random, processes: int) -> list[Kill]:
    """One or two kills, each in an attempt of its own."""
    found = []
    for attempt in range(draw.choice((1, 1, 2))):
        what = draw.choice(("step", "save", "file"))
        count = {"step": draw.randint(1, STEPS - 4), "save": draw.randint(1, 2), "file": draw.randint(1, 12)}[what]
        delay = {"step": draw.uniform(0.0, 0.01), "save": draw.uniform(0.0, 0.03), "file": 0.0}[what]
        process = 0 if what == "file" and draw.random() < 0.7 else draw.randrange(processes)  # rank 0 names the folders
        found.append((attempt, process, what, count, delay))
    return found


def jobs(count: int, seed: int) -> Iterator[tuple[Setting, list[Kill]]]:
    draw = random.Random(seed)
    for index in range(count):
        setting = SETTINGS[index % len(SETTINGS)]
        yield setting, kills(draw, setting.ranks * setting.replicas)


def wrong(setting: Setting, build: Path, place: Path, some: list[Kill], whole: tuple[list[Any], Path]) -> str:
    """How a job that was killed differs from the ``whole`` one; empty if it does not."""
    place.mkdir()
    try:
        found = run(setting, build, place, some)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        return f"it did not come to its end: {error}"
    expected, untouched = whole
    if found != expected:
        return f"it saw {found}, expected {expected}"[:2000]
    mine, theirs = contents(place), contents(untouched)
    differ = [name for name in theirs if mine.get(name) != theirs[name]]
    return f"other files in its last checkpoint: {differ}" if differ or mine.keys() != theirs.keys() else ""


def main(words: list[str]) -> int:
    count, seed = (int(words[index]) if len(words) > index else default for index, default in ((0, JOBS), (1, 0)))
    right = 0
    with tempfile.TemporaryDirectory() as name:
        known: dict[Setting, tuple[Path, list[Any], Path]] = {}
        for index, (setting, some) in enumerate(jobs(count, seed)):
            if setting not in known:
                here = Path(name, f"whole {len(known)}")
                (here / "saved").mkdir(parents=True)
                build = build_of(setting, here)
                losses = run(setting, build, here / "saved", [])
                known[setting] = build, losses, here / "saved"
            build, losses, untouched = known[setting]
            began = time.monotonic()
            problem = wrong(setting, build, Path(name, f"job {index}"), some, (losses, untouched))
            right += not problem
            print(f"{setting!s:45} {some}  {time.monotonic() - began:.0f} s  {problem or 'equal'}", flush=True)
    print(f"{right} of {count} jobs ended with the losses and the checkpoint of one that nobody killed")
    return int(right < count)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
