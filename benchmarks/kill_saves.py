"""Kills a program that saves checkpoints, at random moments, and counts the checkpoints that are lost: none may be.

python -m benchmarks.kill_saves [KILLS]
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from tests.runtime.processes import CONTEXT
from tests.weights.killing import check, forever


def kill_once(directory: Path, step: int, moment: random.Random) -> tuple[int, int, bool]:
    """Start the saver after ``step``, kill it during some save; (last step it told, newest complete, cut a save off)."""
    here, there = CONTEXT.Pipe(duplex=False)
    saver = CONTEXT.Process(target=forever, args=(str(directory), step, there))
    saver.start()
    there.close()
    told = here.recv()
    time.sleep(moment.uniform(0, 0.15))
    saver.kill()
    with suppress(EOFError):
        while True:
            told = here.recv()
    saver.join()
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
