"""The step is what is minimised: nodes move over a cut if that shortens it, within the tolerance and in order."""

from __future__ import annotations

import random

import pytest

from pipecompile.compiled import Options
from pipecompile.cost import Costed
from pipecompile.cutting import Cutter, with_shorter_step
from pipecompile.ir import CostGraph, CostNode, CostTensor, Graph, Partition, Shape
from pipecompile.memory import peak_bytes
from pipecompile.passes.communicate import communicate
from pipecompile.passes.opening import Split
from pipecompile.passes.partitioners import evaluate
from pipecompile.passes.schedules import find_schedule, make_timetable, schedule_names
from pipecompile.passes.shorten import Order, Score, moves, shorten
from pipecompile.simulate import Link, simulate

SEARCHED = [name for name in schedule_names() if find_schedule(name).adapts]


def chain(times: list[float]) -> CostGraph:
    nodes = tuple(CostNode(f"n{i}", time, 0.0) for i, time in enumerate(times))
    edges = tuple((i, i + 1) for i in range(len(times) - 1))
    return CostGraph("chain", nodes, edges, tuple(CostTensor(f"t{u}", u, (v,), 1) for u, v in edges))


def fixed(score: Score) -> Order:
    """A schedule whose order does not depend on the partition."""
    return lambda found: score


def test_only_nodes_at_a_cut_move_and_no_stage_gets_empty() -> None:
    assert set(moves(chain([1, 2, 3, 4]), (0, 0, 1, 1))) == {(0, 1, 1, 1), (0, 0, 0, 1)}
    assert list(moves(chain([1, 1]), (0, 1))) == []


def test_a_shorter_step_is_taken_within_the_tolerance() -> None:
    graph = chain([1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    start = evaluate(graph, (0, 0, 0, 0, 1, 1))

    def slowest(found: Partition) -> float:
        return found.bottleneck_ms

    best = shorten(graph, start, fixed(slowest), lambda tolerance: start, 0.05)
    assert best.stage == (0, 0, 0, 1, 1, 1)

    def crooked(found: Partition) -> float:
        return -found.costs[0].total_ms

    kept = shorten(graph, best, fixed(crooked), lambda tolerance: best, 0.05)
    assert kept.stage == best.stage, "a slower bottleneck than the tolerance allows is never taken"


def test_a_finer_tolerance_wins_if_its_step_is_shorter() -> None:
    graph = chain([1.0, 1.0, 1.0, 1.0])
    worse, better = evaluate(graph, (0, 1, 1, 1)), evaluate(graph, (0, 0, 1, 1))
    asked = []

    def cut(tolerance: float) -> Partition:
        asked.append(tolerance)
        return better

    assert shorten(graph, worse, fixed(lambda found: found.bottleneck_ms), cut, 0.05, tries=0) == better
    assert max(asked) < 0.05


def test_a_shorter_step_counts_in_the_order_made_anew() -> None:
    """In the order of the start every move to the right is shorter; in its own order only the first one is."""
    graph = chain([1.0] * 8)
    start = evaluate(graph, (0, 1, 1, 1, 1, 1, 1, 1))
    asked = []

    def order(found: Partition) -> Score:
        asked.append(found.stage.count(0))
        first = found.stage.count(0)
        return lambda other: 10.0 - other.stage.count(0) + (8.0 if first > 2 else 0.0)

    best = shorten(graph, start, order, lambda tolerance: start, 9.0)
    assert best.stage.count(0) == 2
    assert asked[:3] == [1, 7, 2], "the end of the way down is tried, then its first move"


def test_without_a_link_no_bytes_are_added() -> None:
    nodes = tuple(CostNode(f"n{i}", 1.0, 0.0) for i in range(4))
    tensors = tuple(CostTensor(f"t{u}", u, (u + 1,), 5 if u == 1 else 1) for u in range(3))
    graph = CostGraph("chain", nodes, ((0, 1), (1, 2), (2, 3)), tensors)
    start = evaluate(graph, (0, 0, 0, 1))
    order = fixed(lambda found: found.bottleneck_ms)
    assert shorten(graph, start, order, None, 0.05) == start
    assert shorten(graph, start, order, lambda tolerance: start, 0.05).stage == (0, 0, 1, 1)


def split_of(graph: CostGraph, stage: tuple[int, ...]) -> Split:
    """A split with nothing but its partition."""
    return Split(Graph((), (), {}, "loss"), Costed(graph, ()), evaluate(graph, stage))


def step_ms(cutter: Cutter, found: Partition) -> float:
    timetable = make_timetable(cutter.options.schedule, cutter.shape, partition=found, link=cutter.options.link)
    return simulate(communicate(timetable, found), found, cutter.options.link).step_ms


@pytest.mark.usefixtures("little_effort")
@pytest.mark.parametrize("link", [None, Link(0.2)])
@pytest.mark.parametrize("schedule", ["1f1b", *SEARCHED])
def test_a_known_better_neighbour_is_found_for_every_schedule(
    schedule: str, link: Link | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One node too many in stage 0, one too few in stage 1; the partitioner itself is not asked."""
    nodes = tuple(CostNode(f"n{i}", 1.0, 2.0, (), 10, 1.0) for i in range(8))
    edges = tuple((i, i + 1) for i in range(7))
    graph = CostGraph("chain", nodes, edges, tuple(CostTensor(f"t{u}", u, (v,), 1, 1) for u, v in edges))
    ranks = 4 if schedule == "1f1b" else 2
    cutter = Cutter(Options(4, ranks, 8, schedule, link=link), Shape(4, ranks, 8))
    start = split_of(graph, (0, 0, 0, 1, 2, 2, 3, 3))
    monkeypatch.setattr("pipecompile.cutting.partition", lambda *_, **__: start.partition)
    found = with_shorter_step(start, cutter).partition
    neighbour = evaluate(graph, (0, 0, 1, 1, 2, 2, 3, 3))
    assert step_ms(cutter, found) <= step_ms(cutter, neighbour) < 0.9 * step_ms(cutter, start.partition)


@pytest.mark.usefixtures("little_effort")
@pytest.mark.parametrize("schedule", SEARCHED)
@pytest.mark.parametrize("seed", range(2))
def test_never_worse_within_tolerance_and_memory(schedule: str, seed: int) -> None:
    draw = random.Random(seed)
    nodes = tuple(CostNode(f"n{i}", draw.uniform(1, 3), draw.uniform(2, 4), (), 10, 1.0) for i in range(14))
    edges = tuple((i, i + 1) for i in range(13)) + ((2, 9), (4, 7))
    graph = CostGraph("chain", nodes, edges, tuple(CostTensor(f"t{u}{v}", u, (v,), u % 5 + 1, 1) for u, v in edges))
    cutter = Cutter(Options(4, 2, 4, schedule, link=Link(0.1, 10.0), memory=260, tolerance=0.1), Shape(4, 2, 4))
    start = evaluate(graph, cutter(graph).stage)
    found = with_shorter_step(split_of(graph, start.stage), cutter).partition
    assert found.bottleneck_ms <= 1.1 * start.bottleneck_ms
    program = communicate(cutter.timetable(found), found)
    assert max(peak_bytes(program, found)) <= 260
    before = simulate(communicate(cutter.timetable(start), start), start, cutter.options.link).step_ms
    assert simulate(program, found, cutter.options.link).step_ms <= before
