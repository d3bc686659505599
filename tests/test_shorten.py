"""The step is what is minimised: nodes move over a cut if that shortens it, within the tolerance and in order."""

from __future__ import annotations

from pipecompile.ir import CostGraph, CostNode, CostTensor, Partition
from pipecompile.passes.partitioners import evaluate
from pipecompile.passes.shorten import Order, Score, moves, shorten


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
