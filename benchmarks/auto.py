"""How far the ``auto`` schedule is from the proved optimum, on forty random cases: ``python benchmarks/auto.py [--prove]``.

Four ranks, eight microbatches, stage costs F in 0.8 to 1.6, I and W 0.5 to 1.2 of it, latency 0 to 0.3, room for four
activations a rank. The optima lie in ``auto_optimum.json``; ``--prove`` computes them again (CP-SAT, ``pip install
ortools``). Last, eight ranks and 64 microbatches, for the time.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from pathlib import Path
from typing import Any

from pipecompile.errors import MemoryLimitError, ScheduleError
from pipecompile.ir import Partition, Shape, StageCost
from pipecompile.passes.communicate import chain, communicate
from pipecompile.passes.schedules import find_schedule, make_timetable, schedule_names
from pipecompile.passes.verify import verify
from pipecompile.simulate import Link, simulate

OPTIMA = Path(__file__).with_name("auto_optimum.json")
RANKS, MICROBATCHES, CASES = 4, 8, 40
ACTIVATION = 1000
"""Bytes of an activation, large beside a message of one byte."""


def random_case(seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    forward = [round(draw.uniform(0.8, 1.6), 3) for _ in range(RANKS)]
    inputs = [round(f * draw.uniform(0.5, 1.2), 3) for f in forward]
    weights = [round(f * draw.uniform(0.5, 1.2), 3) for f in forward]
    return {"F": forward, "I": inputs, "W": weights, "latency": round(draw.uniform(0, 0.3), 3)}


def partition_of(case: dict[str, Any]) -> Partition:
    times = zip(case["F"], case["I"], case["W"])
    return chain(RANKS, [StageCost(f, i + w, w, saved_bytes=ACTIVATION) for f, i, w in times])


def step_ms(name: str, case: dict[str, Any]) -> float:
    """The step time of a schedule's program; infinite if it is not for this shape, or does not fit."""
    partition, link = partition_of(case), Link(case["latency"])
    limits = [ACTIVATION * RANKS + 100] * RANKS
    shape = Shape(RANKS, RANKS, MICROBATCHES)
    try:
        timetable = make_timetable(name, shape, partition=partition, link=link, limits=limits)
        program = verify(communicate(timetable, partition), partition, limits, optimizer_factor=0)
    except (ScheduleError, MemoryLimitError):
        return math.inf
    return simulate(program, partition, link).step_ms


def best_named_ms(case: dict[str, Any]) -> float:
    """The best of the other schedules that flush."""
    return min(step_ms(name, case) for name in schedule_names() if name != "auto" and find_schedule(name).flushes)


def prove(case: dict[str, Any]) -> float:
    """The optimum, proved by CP-SAT over all orders of all tasks."""
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()
    times = {letter: [round(1000 * t) for t in case[letter]] for letter in "FIW"}
    latency = round(1000 * case["latency"])
    horizon = 2 * MICROBATCHES * sum(map(sum, times.values()))
    start = {
        (letter, s, m): model.new_int_var(0, horizon, "")
        for letter in "FIW"
        for s in range(RANKS)
        for m in range(MICROBATCHES)
    }
    end = {task: var + times[task[0]][task[1]] for task, var in start.items()}
    for s in range(RANKS):
        own = [task for task in start if task[1] == s]
        model.add_no_overlap([model.new_fixed_size_interval_var(start[t], times[t[0]][s], "") for t in own])
        for m in range(MICROBATCHES):
            model.add(start["I", s, m] >= end["F", s, m])
            model.add(start["W", s, m] >= end["I", s, m])
            if s:
                model.add(start["F", s, m] >= end["F", s - 1, m] + latency)
                model.add(start["I", s - 1, m] >= end["I", s, m] + latency)
            if m:
                for letter in "FIW":
                    model.add(start[letter, s, m] >= end[letter, s, m - 1])
            if m >= RANKS:
                model.add(start["F", s, m] >= end["W", s, m - RANKS])
    last = model.new_int_var(0, horizon, "")
    for s in range(RANKS):
        model.add(last >= end["W", s, MICROBATCHES - 1])
    model.minimize(last)
    solver = cp_model.CpSolver()
    if solver.solve(model) != cp_model.OPTIMAL:
        raise SystemExit("no proof; give the solver more time")
    return float(solver.objective_value / 1000)


def main() -> None:
    if "--prove" in sys.argv:
        cases = [random_case(seed) for seed in range(CASES)]
        lines = [json.dumps({**case, "optimum": prove(case)}) for case in cases]
        OPTIMA.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    gaps, seconds, named = [], [], []
    for case in json.loads(OPTIMA.read_text()):
        began = time.perf_counter()
        took = step_ms("auto", case)
        seconds.append(time.perf_counter() - began)
        gaps.append(took / case["optimum"] - 1)
        named.append(took / best_named_ms(case))
    print(f"{len(gaps)} cases: mean {sum(gaps) / len(gaps):.3%}, worst {max(gaps):.3%} over the proved optimum")
    print(f"seconds each: mean {sum(seconds) / len(seconds):.1f}, most {max(seconds):.1f}")
    print(f"over the best named schedule that fits: mean {sum(named) / len(named):.3f}, worst {max(named):.3f}")
    began = time.perf_counter()
    make_timetable("auto", Shape(8, 8, 64), [StageCost(1 + s / 20, 1.9, 0.8) for s in range(8)], link=Link(0.1))
    print(f"8 ranks, 64 microbatches: {time.perf_counter() - began:.1f} seconds")


if __name__ == "__main__":
    main()
