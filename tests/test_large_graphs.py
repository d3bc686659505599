"""Large graphs: cut as intervals of an order first, then again around the boundaries."""

from __future__ import annotations

import random

import pytest

from pipecompile.ir import CostGraph, CostNode, CostTensor
from pipecompile.passes.partitioners import large, partition, pose
from pipecompile.passes.partitioners.large import around_boundaries
from pipecompile.passes.partitioners.problem import contract


def ladder(rungs: int) -> CostGraph:
    """Two rails that meet in every rung, with few bytes after every third; three nodes a rung."""
    generator = random.Random(rungs)
    nodes, edges, tensors = [], [], []
    for k in range(rungs):
        a, b, c = 3 * k, 3 * k + 1, 3 * k + 2
        nodes += [CostNode(f"{name}{k}", generator.uniform(0.5, 1.5), 1.0) for name in "abc"]
        edges += [(a, b), (a, c)] + ([(c, a + 3), (b, a + 3)] if k + 1 < rungs else [])
        size = 8 if k % 3 == 2 else generator.randint(50, 90)
        tensors.append(CostTensor(f"a{k}", a, (b, c), 100, 100))
        if k + 1 < rungs:
            tensors += [CostTensor(f"b{k}", b, (a + 3,), size), CostTensor(f"c{k}", c, (a + 3,), size)]
    return CostGraph("ladder", tuple(nodes), tuple(edges), tuple(tensors))


@pytest.mark.parametrize("method", ["default", "mincut", "contiguous"])
def test_every_boundary_is_a_cheap_one(method: str):
    """7 boundaries of 2 · 8 bytes, at places that single nodes near them reach."""
    graph = ladder(600)
    found = partition(graph, 8, method=method, time_limit=6)
    assert set(found.stage) == set(range(8))
    assert found.bytes == 7 * 16
    assert found.bound_ms <= found.bottleneck_ms <= 1.05 * found.bound_ms * 1.005


def test_memory_is_kept():
    """A limit that leaves no stage more than a fifth above its share of the saved bytes."""
    graph = ladder(600)
    heavy = CostGraph(
        "heavy", tuple(CostNode(n.name, 1.0, 1.0, saved_bytes=10) for n in graph.nodes), graph.edges, graph.tensors
    )
    found = partition(heavy, 4, memory=5400, in_flight=(1, 1, 1, 1), time_limit=6)
    assert max(cost.saved_bytes for cost in found.costs) <= 5400


def test_groups_around_boundaries():
    """Single nodes near the boundary, the rest of each stage in one group, numbered along the order."""
    problem = pose(ladder(400), 2)
    stage = tuple(int(v >= 600) for v in range(1200))
    groups = around_boundaries(problem, stage, list(range(1200)))
    near = large.COARSE // 2
    assert groups[: 600 - near] == [0] * (600 - near)
    assert groups[600 - near : 600 + near] == list(range(1, 2 * near + 1))
    assert set(groups[600 + near :]) == {2 * near + 1}
    small = contract(problem, groups)
    assert all(u < v for u, v in small.edges)
    assert sum(small.load) == pytest.approx(sum(problem.load))
    assert small.traffic([stage[groups.index(g)] for g in range(small.nodes)]) == problem.traffic(stage)
