"""One process of a program fails at one instruction: who is told what, and how soon all have ended.

``python -m tests.runtime.faults [raise|kill|stop|hang …]`` does it at 20 random instructions for each way to fail.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipecompile.errors import RuntimeFault
from pipecompile.ir import Instruction
from pipecompile.runtime import RankRuntime, connect
from tests.runtime.handmade import PLANS, Net, batch_of, program_of, stages_of
from tests.runtime.processes import run

MICROBATCHES = 4
TIMEOUT_S = 3.0
CASES = 20
SETTINGS = [("1f1b", 4), ("gpipe", 4), ("zb-h2", 4), ("interleaved-1f1b", 2), ("zb-v", 2)]


@dataclass(frozen=True, slots=True)
class Case:
    """``rank`` fails in instruction ``position`` of its second step. ``agent``: as under torchrun, which keeps the store."""

    how: str
    schedule: str
    ranks: int
    rank: int
    position: int
    shared_memory: bool = True
    agent: bool = True

    @property
    def instruction(self) -> Instruction:
        return program_of(self.schedule, self.ranks, MICROBATCHES).rows[self.rank][self.position]

    @property
    def place(self) -> str:
        """How every message must begin."""
        one = self.instruction
        where = f"rank {self.rank}, instruction {self.position} ({one})"
        where += f", microbatch {one.microbatch}" if one.microbatch >= 0 else ""
        return where + (f", peer stage {one.peer}" if one.peer >= 0 else "") + ": "


def cases(how: str, count: int, seed: int) -> Iterator[Case]:
    draw = random.Random(f"{how} {seed}")
    for index in range(count):
        schedule, ranks = draw.choice(SETTINGS)
        rank = draw.randrange(ranks)
        row = program_of(schedule, ranks, MICROBATCHES).rows[rank]
        yield Case(how, schedule, ranks, rank, draw.randrange(len(row)), bool(index % 2), bool(index % 3))


def outcome(case: Case) -> tuple[list[str | None], float]:
    """What each rank was told (None: it was ended), and the seconds from the failure to the end of all processes."""
    with tempfile.TemporaryDirectory() as folder:
        answers = run(take_part, case.ranks, case, folder, agent=case.agent)
        ended = time.time()
        return answers, ended - float(Path(folder, "began").read_text())


def wrong(case: Case, answers: list[str | None], seconds: float) -> str:
    """What is not as it must be; empty if all is."""
    others = [answer for rank, answer in enumerate(answers) if rank != case.rank]
    if any(answer is None or not answer.startswith(case.place) for answer in others):
        return f"expected {case.place!r}, but told was {others}"
    if len(set(others)) > 1:
        return f"ranks were told different causes: {others}"
    if case.how == "raise" and answers[case.rank] != others[0]:
        return f"rank {case.rank} itself told {answers[case.rank]!r}"
    if case.how != "raise" and answers[case.rank] is not None:
        return f"rank {case.rank} was not ended: {answers[case.rank]!r}"
    return f"it took {seconds:.1f} s" if seconds > TIMEOUT_S + 10 else ""


def take_part(rank: int, case: Case, folder: str) -> str:
    """One rank's steps, in the second of which the case happens."""
    connect(timeout_s=60)
    program = program_of(case.schedule, case.ranks, MICROBATCHES)
    stages = stages_of(Net())
    mine = {s: stages[s] for s in program.shape.stages_of(rank)}
    runtime = RankRuntime(
        program, rank, mine, PLANS, loss="loss", timeout_s=TIMEOUT_S, shared_memory=case.shared_memory
    )
    runtime.step(batch_of(MICROBATCHES))
    if rank == case.rank:
        _break(runtime, case, Path(folder, "began"))
    try:
        for _ in range(2):  # who needs nothing more of the one that fails hears of it in the next step
            runtime.step(batch_of(MICROBATCHES))
    except RuntimeFault as error:
        return str(error)
    return "no error"


def _break(runtime: RankRuntime, case: Case, began: Path) -> None:
    def handler(operand: Any) -> None:
        began.write_text(str(time.time()))
        if case.how == "raise":
            raise ValueError("spilled")
        if case.how == "hang":
            time.sleep(1000)
        os.kill(os.getpid(), signal.SIGKILL if case.how == "kill" else signal.SIGSTOP)

    steps = runtime._executor.steps
    steps[case.position] = replace(steps[case.position], handler=handler)


def main(ways: list[str]) -> int:
    failed = False
    for how in ways or ["raise", "kill", "stop", "hang"]:
        right, longest = 0, 0.0
        for case in cases(how, CASES, seed=0):
            answers, seconds = outcome(case)
            problem = wrong(case, answers, seconds)
            print(f"{how:5}  {case.schedule:16}  rank {case.rank} of {case.ranks}  {case.instruction!s:12}", end="  ")
            print(f"{seconds:4.1f} s  {problem or 'right'}", flush=True)
            right, longest = right + (not problem), max(longest, seconds)
        failed |= right < CASES
        print(f"{how}: {right} of {CASES} name the first cause; the longest took {longest:.1f} s", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
