"""Partitioners: what a partition costs, that none breaks a rule, and messages of what cannot be cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipecompile.errors import MemoryLimitError, PartitionError
from pipecompile.ir import CostGraph, CostNode, CostTensor, Parameter, Shared, StageCost, Transfer
from pipecompile.passes.partitioners import evaluate, partition, partitioners, pose
from pipecompile.passes.partitioners.exact import into_memory
from pipecompile.passes.partitioners.milp import Model, Solved
from tests.cost_graphs import graphs


def chain(*costs: float) -> CostGraph:
    """Nodes one after another, each sending 8 bytes and 8 bytes of gradient to the next."""
    nodes = tuple(CostNode(f"n{k}", cost, 0.0) for k, cost in enumerate(costs))
    edges = tuple((k, k + 1) for k in range(len(costs) - 1))
    return CostGraph("chain", nodes, edges, tuple(CostTensor(f"t{u}", u, (v,), 8, 8) for u, v in edges))


def test_evaluate_counts_once_what_is_once():
    weight, frozen = Parameter("w", 100), Parameter("f", 7, trainable=False)
    nodes = (
        CostNode("a", 1.0, 2.0, (weight,), 10, 0.5),
        CostNode("b", 1.0, 1.0, (weight, frozen), 20),
        CostNode("c", 4.0, 0.0, (weight, frozen)),
        CostNode("d", 1.0, 1.0),
    )
    tensors = (
        CostTensor("x", 0, (1, 2, 3), 16, 4),
        CostTensor("y", 1, (3,), 8),
        CostTensor("g", 3, (0, 1), 5, 0, "B"),
    )
    found = evaluate(CostGraph("g", nodes, ((0, 1), (0, 2), (1, 3)), tensors), (0, 0, 1, 2))
    assert found.costs == (
        StageCost(2.0, 3.0, 0.5, 107, 100, 30),
        StageCost(4.0, 0.0, 0.0, 107, 100, 0),
        StageCost(1.0, 1.0),
    )
    assert found.transfers == (
        Transfer("x", 0, 1, 16, 4),
        Transfer("x", 0, 2, 16, 4),
        Transfer("y", 0, 2, 8),
        Transfer("g", 0, 2, 0, 5),
    )
    assert found.shared == (Shared("w", (0, 1), 100),)
    assert (found.bottleneck_ms, found.bytes) == (5.0, 53)


@pytest.mark.parametrize("method", sorted(partitioners()))
def test_chain(method: str):
    assert partition(chain(1, 1, 1, 3), 2, method=method).stage == (0, 0, 0, 1)


@pytest.mark.parametrize("method", sorted(partitioners()))
@settings(max_examples=25, deadline=None)
@given(graph=graphs(), data=st.data())
def test_valid(method: str, graph: CostGraph, data: st.DataObject):
    """No edge goes back (evaluate refuses it), no stage is empty, and T stays near the best contiguous split."""
    stages = data.draw(st.integers(1, min(4, len(graph.nodes))))
    found = partition(graph, stages, method=method)
    assert set(found.stage) == set(range(stages))
    line = range(len(graph.nodes) + 1)
    best = min(
        max(sum(n.forward_ms + n.backward_ms for n in graph.nodes[i:j]) for i, j in itertools.pairwise(ends))
        for ends in itertools.combinations(line, stages + 1)
        if ends[0] == 0 and ends[-1] == line[-1]
    )
    assert found.bottleneck_ms <= 1.05 * best + 1e-6


def test_more_stages_than_nodes():
    with pytest.raises(
        PartitionError, match=r"3 stages asked for, but graph 'chain' has 2 nodes: at most 2 stages are possible"
    ):
        partition(chain(1, 1), 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": 0}, "0 stages asked for, expected at least 1"),
        ({"tolerance": -1}, "the tolerance is -1, expected a number >= 0"),
        ({"speeds": (1,)}, "1 speeds given for 2 stages, expected 2"),
        ({"speeds": (1, 0)}, "one of the speeds is 0, expected numbers > 0"),
        ({"bandwidths": (1, 2)}, "2 bandwidths given for 2 stages, expected 1"),
        ({"memory": (1, 2, 3)}, "3 memory limits given for 2 ranks"),
        ({"memory": 1, "placement": (0,)}, "placement has 1 entries for 2 stages"),
        ({"method": "none"}, "partitioner 'none' is unknown; expected one of contiguous"),
    ],
)
def test_bad_options(options: dict, message: str):
    with pytest.raises(PartitionError, match=message):
        partition(chain(1, 1, 1), **({"stages": 2} | options))


def test_memory_that_nothing_fits():
    """Stage 0 holds the activations of two microbatches: 200 + 2 · 30."""
    weight = Parameter("w", 50)
    nodes = (CostNode("a", 1.0, 1.0, (weight,), 30), CostNode("b", 1.0, 1.0))
    graph = CostGraph("g", nodes, ((0, 1),), ())
    assert partition(graph, 2, memory=260).stage == (0, 1)
    message = "the nearest needs 260 bytes on rank 0, 1 more than its 259; give more memory, use more ranks"
    with pytest.raises(MemoryLimitError, match=message):
        partition(graph, 2, memory=259)
    message = "contiguous found no partition into 2 stages within the memory; try --method default"
    with pytest.raises(MemoryLimitError, match=message):
        partition(graph, 2, memory=259, method="contiguous")


def test_no_time_to_fit_in_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Model, "solve", lambda *_, **__: Solved("limit", None, 0.0))
    with pytest.raises(
        MemoryLimitError, match="no partition that fits in memory was found in 7 s; raise the time limit"
    ):
        into_memory(pose(chain(1, 1, 1), 2, memory=10), seconds=7)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ((0, 0), "2 stages given for the 3 nodes"),
        ((0, 1, 0), r"the edge from 'n1' \(stage 1\) to 'n2' \(stage 0\) goes back"),
        ((0, 1, -1), "stage -1 is out of range, expected 0 to 1"),
    ],
)
def test_bad_stage(stage: tuple[int, ...], message: str):
    with pytest.raises(PartitionError, match=message):
        evaluate(chain(1, 1, 1), stage)
