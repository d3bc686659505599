"""One process of a program fails at one place: who is told what, and how soon all have ended.

``python -m tests.runtime.faults [raise|kill|stop|hang …] [FIRST-LAST] [SEED]`` does it at 20 random places for each way
to fail, or at those of them: in instructions of every kind of program, at the end of a step, in a sum, and between steps.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipecompile.errors import RuntimeFault
from pipecompile.ir import Program
from pipecompile.ir.batches import as_run
from pipecompile.ir.versions import updates
from pipecompile.passes.replicas import for_replicas
from pipecompile.runtime import RankRuntime, connect
from pipecompile.runtime.marks import OUTSIDE, PLACE, SUMMING
from pipecompile.runtime.places import place
from tests.runtime.handmade import PLANS, Net, batch_of, program_of, stages_of
from tests.runtime.processes import run

MICROBATCHES = 4
TIMEOUT_S = 3.0
CASES = 20
AT_ONCE = 3
"""Cases that run beside each other: they mostly wait."""
SETTINGS = [
    ("1f1b", 4, 1),
    ("gpipe", 4, 1),
    ("zb-h2", 4, 1),
    ("interleaved-1f1b", 2, 1),
    ("zb-v", 2, 1),
    ("pipedream", 4, 1),
    ("interleaved-1f1b", 2, 2),
    ("zb-v", 2, 2),
]


@dataclass(frozen=True, slots=True)
class Case:
    """``process`` fails at ``position`` of its second step: in an instruction, at the end (their number), in the SUMMING
    that follows, or OUTSIDE before it. ``agent``: as under torchrun, which keeps the store."""

    how: str
    schedule: str
    ranks: int
    process: int
    position: int
    shared_memory: bool = True
    agent: bool = True
    replicas: int = 1

    @property
    def program(self) -> Program:
        return as_run(for_replicas(program_of(self.schedule, self.ranks, MICROBATCHES), self.replicas))

    @property
    def place(self) -> str:
        """How every message must begin."""
        return place(self.program, self.process, self.ranks * self.replicas, self.position) + ": "


def cases(how: str, count: int, seed: int) -> Iterator[Case]:
    draw = random.Random(f"{how} {seed}")
    for index in range(count):
        schedule, ranks, replicas = draw.choice(SETTINGS)
        process = draw.randrange(ranks * replicas)
        case = Case(how, schedule, ranks, process, 0, bool(index % 2), bool(index % 3), replicas)
        row = case.program.rows[process % ranks]
        within = draw.randrange(len(row))
        yield replace(case, position=within if index % 4 else draw.choice([len(row), SUMMING, OUTSIDE]))


def outcome(case: Case) -> tuple[list[str | None], float]:
    """What each process was told (None: it was ended), and the seconds from the failure to the end of all processes."""
    with tempfile.TemporaryDirectory() as folder:
        answers = run(take_part, case.ranks * case.replicas, case, folder, agent=case.agent)
        ended = time.time()
        return answers, ended - float(Path(folder, "began").read_text())


def wrong(case: Case, answers: list[str | None], seconds: float) -> str:
    """What is not as it must be; empty if all is."""
    others = [answer for process, answer in enumerate(answers) if process != case.process]
    if any(answer is None or not answer.startswith(case.place) for answer in others):
        return f"expected {case.place!r}, but told was {others}"
    if len(set(others)) > 1:
        return f"processes were told different causes: {others}"
    if case.how == "raise" and answers[case.process] != (
        others[0] if case.position < OUTSIDE else "ValueError: spilled"
    ):
        return f"process {case.process} itself told {answers[case.process]!r}"
    if case.how != "raise" and answers[case.process] is not None:
        return f"process {case.process} was not ended: {answers[case.process]!r}"
    return f"it took {seconds:.1f} s" if seconds > TIMEOUT_S + 10 else ""


def take_part(process: int, case: Case, folder: str) -> str:
    """One process's steps, in the second of which the case happens."""
    connect(timeout_s=60)
    rank = process % case.ranks
    stages = stages_of(Net())
    mine = {s: stages[s] for s in case.program.shape.stages_of(rank)}
    runtime = RankRuntime(
        case.program, rank, mine, PLANS, loss="loss", timeout_s=TIMEOUT_S, shared_memory=case.shared_memory
    )
    parameters = [p for stage in mine.values() for p in stage.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.01) if updates(case.program.rows) else None
    try:
        for step in range(4):  # who needs nothing more of the one that fails hears of it in a later step
            if step == 1 and process == case.process:
                _break(runtime, case, Path(folder, "began"))
            runtime.step(batch_of(MICROBATCHES), optimizer=optimizer)
            _between_steps(process, step, case, folder)
            runtime.sum_over_ranks(torch.ones(1))
    except RuntimeFault as error:
        return str(error)
    return "no error"


def _between_steps(process: int, step: int, case: Case, folder: str) -> None:
    if step == 1 and process == case.process and case.position == OUTSIDE:
        _fail(case.how, Path(folder, "began"))


def _break(runtime: RankRuntime, case: Case, began: Path) -> None:
    """The next time that ``runtime`` comes to the case's place, it fails."""

    def failing(*operands: Any) -> None:
        _fail(case.how, began)

    steps = runtime._executor.steps
    if case.position < len(steps):
        steps[case.position] = replace(steps[case.position], handler=failing)
    elif case.position == len(steps):
        runtime._finish = failing  # type: ignore[assignment,method-assign]
    elif case.position == SUMMING:
        whole = dist.all_reduce
        dist.all_reduce = lambda *operands, **options: (
            failing() if runtime._sentry.words[PLACE] == SUMMING else whole(*operands, **options)
        )


def _fail(how: str, began: Path) -> None:
    began.write_text(str(time.time()))
    if how == "raise":
        raise ValueError("spilled")
    if how == "hang":
        time.sleep(1000)
    os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)


def main(words: list[str]) -> int:
    ways = [word for word in words if word in WAYS] or WAYS
    chosen = next((word for word in words if "-" in word), f"0-{CASES - 1}")
    first, last = map(int, chosen.split("-"))
    seed = next((int(word) for word in words if word.isdigit()), 0)
    failed = False
    for how in ways:
        wanted = list(cases(how, last + 1, seed))[first:]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            told = list(pool.map(_tell, wanted))
        right, longest = [not problem for problem, _ in told].count(True), max(seconds for _, seconds in told)
        failed |= right < len(wanted)
        print(f"{how}: {right} of {len(wanted)} name the first cause; the longest took {longest:.1f} s", flush=True)
    return int(failed)


def _tell(case: Case) -> tuple[str, float]:
    """Run a case and print what came of it."""
    answers, seconds = outcome(case)
    problem = wrong(case, answers, seconds)
    where = f"{case.replicas} x {case.ranks}{' shared memory' * case.shared_memory}{' agent' * case.agent}"
    line = f"{case.how:5}  {case.schedule:16}  {where:25}  {case.place:70}  {seconds:4.1f} s  {problem or 'right'}"
    print(line, flush=True)
    return problem, seconds


WAYS = ["raise", "kill", "stop", "hang"]

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
