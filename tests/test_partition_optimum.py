"""Brute force over every stage map of small graphs: the partitioners' optimum, limits included."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipecompile.errors import MemoryLimitError
from pipecompile.ir import CostGraph
from pipecompile.passes.partitioners import partition
from tests.cost_graphs import graphs


@dataclass(frozen=True)
class Everything:
    """Every stage map without an empty stage that no edge goes against, with its time, cost of bytes, and memory."""

    stages: np.ndarray
    time: np.ndarray
    traffic: np.ndarray
    held: np.ndarray
    """A column for each stage."""

    def row(self, stage: Sequence[int]) -> int:
        return int(np.flatnonzero((self.stages == np.array(stage)).all(axis=1))[0])


def everything(
    graph: CostGraph, stages: int, speeds: Sequence[float], bandwidths: Sequence[float], in_flight: Sequence[int]
) -> Everything:
    """Enumerate; written from the definitions, apart from the code under test."""
    maps = np.array(list(itertools.product(range(stages), repeat=len(graph.nodes))))
    keep = np.all([(maps == s).any(axis=1) for s in range(stages)], axis=0)
    for u, v in graph.edges:
        keep &= maps[:, u] <= maps[:, v]
    maps = maps[keep]
    load = np.array([n.forward_ms + n.backward_ms for n in graph.nodes])
    time = np.max([((maps == s) @ load) / speeds[s] for s in range(stages)], axis=0)

    link = np.zeros((stages, stages))
    for one, other in itertools.combinations(range(stages), 2):
        link[one, other] = link[other, one] = max(bandwidths) / min(bandwidths[one:other])
    traffic = np.zeros(len(maps))
    for t in graph.tensors:
        for s in range(stages):
            reads = (maps[:, list(t.targets)] == s).any(axis=1)
            traffic += reads * (t.bytes + t.gradient_bytes) * link[maps[:, t.source], s]

    held = np.zeros((len(maps), stages))
    for s in range(stages):
        held[:, s] = (maps == s) @ np.array([n.saved_bytes for n in graph.nodes]) * in_flight[s]
        for weight in {p for n in graph.nodes for p in n.parameters}:
            users = [v for v, n in enumerate(graph.nodes) if weight in n.parameters]
            held[:, s] += (maps[:, users] == s).any(axis=1) * weight.bytes * (4 if weight.trainable else 1)
    return Everything(maps, time, traffic, held)


@pytest.mark.parametrize("method", ["exact", "default"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_brute_force(method: str, data: st.DataObject):
    stages = data.draw(st.integers(1, 4), "stages")
    graph = data.draw(graphs(10 if stages < 4 else 8).filter(lambda g: len(g.nodes) >= stages))
    numbers = st.sampled_from((1.0, 2.0, 3.0))
    speeds = data.draw(st.lists(numbers, min_size=stages, max_size=stages), "speeds")
    bandwidths = data.draw(st.lists(numbers, min_size=stages - 1, max_size=stages - 1), "bandwidths")
    in_flight = data.draw(st.lists(st.integers(1, 4), min_size=stages, max_size=stages), "in flight")
    placement = data.draw(st.sampled_from([tuple(s % ranks for s in range(stages)) for ranks in range(1, stages + 1)]))
    memory = data.draw(st.none() | st.integers(0, 150), "memory")
    tolerance = data.draw(st.sampled_from((0.0, 0.05, 0.3)), "tolerance")

    def cut():
        return partition(
            graph,
            stages,
            tolerance=tolerance,
            method=method,
            speeds=speeds,
            bandwidths=bandwidths,
            in_flight=in_flight,
            placement=placement,
            memory=memory,
        )

    known = everything(graph, stages, speeds, bandwidths, in_flight)
    held = known.held @ np.array([[rank == r for r in range(stages)] for rank in placement])
    fits = np.full(len(known.time), True) if memory is None else (held <= memory).all(axis=1)
    if not fits.any():
        short = int((held - memory).max(axis=1).min())
        with pytest.raises(MemoryLimitError, match=f" {short} more than its {memory}; give more memory"):
            cut()
        return
    least = known.time[fits].min()
    within = fits & (known.time <= least * (1 + tolerance) + 1e-9)
    found = cut()
    row = known.row(found.stage)
    assert within[row]
    assert known.traffic[row] == pytest.approx(known.traffic[within].min())
    assert found.bound_ms == pytest.approx(least)
    if len(set(bandwidths)) < 2:
        assert found.bound_bytes == found.bytes
