"""Kills a program that saves checkpoints, at random moments, and counts the checkpoints that are lost: none may be.

python -m benchmarks.kill_saves [KILLS]
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.weights.killing import check


def kill_once(directory: Path, step: int, moment: random.Random) -> tuple[int, int, bool]:
    """Start the saver after ``step``, kill it during some save; (last step it told, newest complete, cut a save off)."""
    command = [sys.executable, "-m", "tests.weights.killing", str(directory), str(step)]
    saver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert saver.stdout is not None
    told = int(saver.stdout.readline())
    time.sleep(moment.uniform(0, 0.15))
    saver.kill()
    told = max([told, *map(int, saver.stdout.read().split())])
    saver.wait()
    cut = any(directory.glob(".step-*.partial"))
    return told, check(directory), cut


def kill(kills: int, seed: int = 0) -> tuple[int, int]:
    """(checkpoints lost, kills that cut a save off) of ``kills``."""
    moment, lost, cuts, step = random.Random(seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as place:
        for _ in range(kills):
            told, step, cut = kill_once(Path(place), step, moment)
            lost += step < told
            cuts += cut
    return lost, cuts


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    lost, cuts = kill(count)
    print(f"{count} kills, {cuts} of them in the middle of a save: {lost} checkpoints lost")
    sys.exit(bool(lost))
