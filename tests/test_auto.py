"""The ``auto`` schedule: near the proved optimum, never slower than a named one, within the memory, the same each time."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pipecompile.errors import MemoryLimitError, ScheduleError
from pipecompile.ir import Partition, Shape, StageCost, Timetable
from pipecompile.passes.communicate import chain, communicate
from pipecompile.passes.schedules import Setting, make_timetable, schedule_names
from pipecompile.passes.schedules.greedy import Rule, list_schedule
from pipecompile.passes.schedules.improve import improve, makespan
from pipecompile.passes.schedules.problem import Problem
from pipecompile.passes.verify import verify
from pipecompile.simulate import Link, simulate

OPTIMA = json.loads((Path(__file__).parent.parent / "benchmarks" / "auto_optimum.json").read_text())


@pytest.fixture
def little_effort(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that ask for what holds whatever the effort."""
    monkeypatch.setattr(sys.modules["pipecompile.passes.schedules.auto"], "EFFORT", 100_000)


def step_ms(timetable: Timetable, partition: Partition, link: Link) -> float:
    return simulate(communicate(timetable, partition), partition, link).step_ms


def partition_of(case: dict) -> Partition:
    return chain(4, [StageCost(f, i + w, w, saved_bytes=1000) for f, i, w in zip(case["F"], case["I"], case["W"])])


@pytest.mark.parametrize("index", [7, 12, 29])
def test_near_the_proved_optimum(index):
    """Three of the forty cases of benchmarks/auto.py: those where the best named schedule is far off."""
    case = OPTIMA[index]
    partition, link, limits = partition_of(case), Link(case["latency"]), [4100] * 4
    timetable = make_timetable("auto", Shape(4, 4, 8), partition=partition, link=link, limits=limits)
    verify(communicate(timetable, partition), partition, limits)
    assert case["optimum"] * 0.999999 <= step_ms(timetable, partition, link) <= case["optimum"] * 1.01


@pytest.mark.usefixtures("little_effort")
@pytest.mark.parametrize(("stages", "ranks", "microbatches"), [(3, 3, 5), (4, 2, 4), (6, 2, 3)])
def test_never_slower_than_a_named_schedule(stages, ranks, microbatches):
    costs = [StageCost(1 + s % 3 / 4, 1.9 + s % 2 / 3, 0.8, saved_bytes=1) for s in range(stages)]
    shape, link, partition = Shape(stages, ranks, microbatches), Link(0.2), chain(stages, costs)
    best = step_ms(make_timetable("auto", shape, costs, link=link), partition, link)
    for name in schedule_names():
        try:
            timetable = make_timetable(name, shape, costs)
        except ScheduleError:
            continue
        assert best <= step_ms(timetable, partition, link), name


@pytest.mark.usefixtures("little_effort")
def test_the_same_input_gives_the_same_program():
    partition = partition_of(OPTIMA[2])
    first, second = (make_timetable("auto", Shape(4, 4, 6), partition=partition) for _ in range(2))
    assert first == second


@pytest.mark.usefixtures("little_effort")
def test_less_memory_gives_another_program_and_too_little_none():
    partition = partition_of(OPTIMA[0])
    shape = Shape(4, 4, 6)
    for activations in (1, 2, 3):
        limits = [1000 * activations + 100] * 4
        timetable = make_timetable("auto", shape, partition=partition, limits=limits)
        verify(communicate(timetable, partition), partition, limits)
    with pytest.raises(
        MemoryLimitError, match=r"rank 1 has 900 bytes and needs 1\d\d\d, .*; use --memory 1\d\d\d, more"
    ):
        make_timetable("auto", shape, partition=partition, limits=[2000, 900, 900, 900])
    with pytest.raises(ScheduleError, match="1 memory limits for 4 ranks; give one for each rank"):
        make_timetable("auto", shape, partition=partition, limits=[900])


@pytest.mark.usefixtures("little_effort")
def test_no_split_where_nothing_is_gained():
    """Without a weight half's time there is nothing to keep for later."""
    timetable = make_timetable("auto", Shape(3, 3, 4), [StageCost(1.0, 2.0)] * 3)
    assert {one.op for row in timetable.rows for one in row} <= {"FORWARD", "BACKWARD"}


def test_list_scheduling_and_improvement_by_hand():
    """Two ranks, one microbatch: F F I I on the way down and up, and both weight halves behind."""
    setting = Setting(chain(2, [StageCost(1.0, 2.0, 1.0, saved_bytes=1)] * 2))
    problem = Problem.of(Shape(2, 2, 1), setting)
    time, rows = list_schedule(problem, Rule())
    assert (time, rows) == (5.0, [[("F", 0, 0), ("I", 0, 0), ("W", 0, 0)], [("F", 1, 0), ("I", 1, 0), ("W", 1, 0)]])
    assert makespan(problem, rows)[0] == 5.0
    assert makespan(problem, rows)[1][::-1] == [("F", 0, 0), ("F", 1, 0), ("I", 1, 0), ("I", 0, 0), ("W", 0, 0)]
    slow = [[("F", 0, 0), ("F", 0, 1), ("I", 0, 0), ("I", 0, 1), ("W", 0, 0), ("W", 0, 1)]]
    slow.append([("F", 1, 0), ("F", 1, 1), ("I", 1, 0), ("I", 1, 1), ("W", 1, 0), ("W", 1, 1)])
    two = Problem.of(Shape(2, 2, 2), setting)
    assert makespan(two, slow)[0] == 8.0
    assert improve(two, slow, 300)[0] == 7.0 == makespan(two, improve(two, slow, 300)[1])[0]
