"""Memory is a hard limit: a partition that fits by the program's own count is found whenever there is one."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn

import pipecompile
from pipecompile.compiled import Options
from pipecompile.cutting import Cutter
from pipecompile.errors import MemoryLimitError
from pipecompile.ir import CostGraph, CostNode, CostTensor, Instruction, Parameter, Partition, Shape
from pipecompile.memory import Holdings, peak_bytes
from pipecompile.passes.communicate import communicate
from pipecompile.passes.partitioners import evaluate, fitting
from pipecompile.passes.partitioners.fitting import Fitting
from pipecompile.passes.schedules import make_timetable
from pipecompile.passes.schedules.auto import serial

CASES = [("1f1b", 3, 3), ("1f1b", 4, 4), ("gpipe", 4, 4), ("interleaved-1f1b", 4, 2), ("zb-h1", 3, 3)]


def random_graph(draw: random.Random, count: int) -> CostGraph:
    """A graph as lifted models have them: skips, shared parameters, messages as large as activations."""
    edges = {(u, u + 1) for u in range(count - 1)} - {(draw.randrange(count - 1),) * 2}
    edges |= {(u, v) for u in range(count) for v in range(u + 2, count) if draw.random() < 0.2}
    shared = Parameter("shared", draw.randint(1, 40))
    nodes = tuple(
        CostNode(
            f"n{k}",
            draw.randint(1, 9),
            draw.randint(1, 9),
            (Parameter(f"w{k}", draw.randint(0, 30), draw.random() < 0.8), *([shared] * (draw.random() < 0.3))),
            draw.randint(0, 30),
        )
        for k in range(count)
    )
    tensors = []
    for u in range(count):
        readers = tuple(v for a, v in sorted(edges) if a == u)
        size = draw.randint(0, 30)
        if readers:
            tensors.append(CostTensor(f"t{u}", u, readers, size, size if draw.random() < 0.7 else 0))
    return CostGraph("random", nodes, tuple(sorted(edges)), tuple(tensors))


def partitions(graph: CostGraph, stages: int) -> Iterator[Partition]:
    """Every one there is."""
    for stage in itertools.product(range(stages), repeat=len(graph.nodes)):
        if len(set(stage)) == stages and all(stage[u] <= stage[v] for u, v in graph.edges):
            yield evaluate(graph, stage, stages=stages)


def peak_of(found: Partition, schedule: str, shape: Shape) -> int:
    """The largest peak of a rank in the program that compiling gives."""
    return max(peak_bytes(communicate(make_timetable(schedule, shape, partition=found), found), found))


@pytest.mark.parametrize(("schedule", "stages", "ranks"), CASES)
@pytest.mark.parametrize("seed", range(3))
def test_what_fits_is_found_and_what_does_not_is_said(seed: int, schedule: str, stages: int, ranks: int) -> None:
    graph = random_graph(random.Random(seed), 7)
    shape = Shape(stages, ranks, 4)
    least = min(peak_of(found, schedule, shape) for found in partitions(graph, stages))

    def cut(memory: int) -> Partition:
        return Cutter(Options(stages, ranks, 4, schedule, memory=memory), shape)(graph)

    assert peak_of(cut(least), schedule, shape) == least
    assert peak_of(cut(least + 7), schedule, shape) <= least + 7
    message = (
        f"no partition into {stages} stages fits in memory: {least} bytes .*, 1 more than its {least - 1}, and less"
    )
    with pytest.raises(MemoryLimitError, match=message) as error:
        cut(least - 1)
    assert error.value.needed == least


def recomputing(graph: CostGraph, modes: tuple[str, ...], draw: random.Random) -> CostGraph:
    """The graph with the nodes of each stage in its mode; of the calls, some keep what they are given only."""
    again = {node.name: draw.randint(0, node.saved_bytes // 2) for node in graph.nodes if draw.random() < 0.7}

    def under(node: CostNode, mode: str) -> CostNode:
        if mode == "none" or (mode == "calls" and node.name not in again):
            return node
        kept = again[node.name] if mode == "calls" else 0
        backward_ms = node.backward_ms + node.forward_ms
        return replace(node, backward_ms=backward_ms, saved_bytes=kept, recomputed_bytes=node.saved_bytes)

    staged = tuple(tuple(under(node, mode) for node in graph.nodes) for mode in modes)
    if len(set(modes)) == 1:
        return replace(graph, nodes=staged[0], recompute=modes)
    return replace(graph, recompute=modes, staged=staged)


MODES = [("stage",) * 3, ("calls",) * 3, ("none", "stage", "calls"), ("calls", "none", "none")]


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zb-h1"])
@pytest.mark.parametrize("modes", MODES, ids=",".join)
def test_what_fits_by_recomputation_is_found(modes: tuple[str, ...], schedule: str) -> None:
    draw, shape = random.Random(5), Shape(3, 3, 4)
    graph = recomputing(random_graph(draw, 7), modes, draw)
    least = min(peak_of(found, schedule, shape) for found in partitions(graph, 3))

    def cutter(memory: int) -> Cutter:
        return Cutter(Options(3, 3, 4, schedule, memory=memory, recompute=modes), shape)

    assert peak_of(cutter(least)(graph), schedule, shape) == least
    short = cutter(least - 1)
    with pytest.raises(MemoryLimitError, match=f"{least} bytes for each rank would do, .* and less would not"):
        short(graph)
    assert not any(search.refused for search in short.searches[graph]), "the rows count what is made again"


@pytest.mark.usefixtures("little_effort")
@pytest.mark.parametrize("schedule", ["auto", "v-half", "v-min", "zb-v"])
def test_orders_made_for_the_partition_fit_too(schedule: str) -> None:
    """As little as the search itself names as enough is enough."""
    graph, shape = random_graph(random.Random(1), 7), Shape(4, 2, 4)
    with pytest.raises(MemoryLimitError, match=r"that fits in memory was found: .* would do") as error:
        Cutter(Options(4, 2, 4, schedule, memory=10), shape)(graph)
    assert compiled_peak(graph, schedule, shape, int(error.value.needed)) <= error.value.needed


def compiled_peak(graph: CostGraph, schedule: str, shape: Shape, memory: int) -> int:
    cutter = Cutter(Options(shape.stages, shape.ranks, shape.microbatches, schedule, memory=memory), shape)
    found = cutter(graph)
    return cutter.peak(found, cutter.timetable(found))


FALLBACKS = [
    ("auto", 3, 3, ("1f1b", "gpipe", "zb-h1"), 0),
    ("auto", 4, 2, ("interleaved-1f1b", "looped-bfs", "dualpipe-v"), 0),
    ("v-half", 4, 2, ("v-half",), 0),
    ("v-min", 4, 2, ("v-min",), 3),
    ("zb-v", 4, 2, ("zb-v",), 12),
]


@pytest.mark.usefixtures("little_effort")
@pytest.mark.parametrize(("schedule", "stages", "ranks", "names", "seed"), FALLBACKS)
def test_what_an_order_for_any_partition_can_do_is_found(
    schedule: str, stages: int, ranks: int, names: tuple[str, ...], seed: int
) -> None:
    """Searched schedules need no more than the best partition under the order for equal stages, or a named one."""
    graph, shape = random_graph(random.Random(seed), 6), Shape(stages, ranks, 4)
    orders = [make_timetable(name, shape) for name in names]
    every = list(partitions(graph, stages))
    least = min(max(peak_bytes(communicate(order, found), found)) for order in orders for found in every)
    assert compiled_peak(graph, schedule, shape, least) <= least


@pytest.mark.usefixtures("little_effort")
@pytest.mark.parametrize(("largest", "placement"), [((0, 2), (0, 1, 1, 0)), ((0, 3), (0, 1, 0, 1))])
def test_auto_puts_stages_where_they_fit(largest: tuple[int, int], placement: tuple[int, ...]) -> None:
    """Two large nodes that a chain keeps apart fit on two ranks only if these do not meet."""
    nodes = tuple(CostNode(f"n{k}", 1.0, 1.0, (Parameter(f"w{k}", 100 if k in largest else 1),), 30) for k in range(4))
    edges = tuple((k, k + 1) for k in range(3))
    graph = CostGraph("chain", nodes, edges, tuple(CostTensor(f"t{u}", u, (v,), 1, 1) for u, v in edges))
    shape = Shape(4, 2, 4)
    least = serial(shape, placement)
    memory = Cutter(Options(4, 2, 4, "auto"), shape).peak(evaluate(graph, (0, 1, 2, 3)), least)
    cutter = Cutter(Options(4, 2, 4, "auto", memory=memory), shape)
    assert cutter.timetable(cutter(graph)).shape.placement == placement


def long_graph(count: int) -> CostGraph:
    """A chain of many small nodes with skips; each keeps as much as it sends."""
    draw = random.Random(count)
    readers = [(u + 1,) if u % 7 or u + 5 >= count else (u + 1, u + 5) for u in range(count - 1)]
    edges = tuple((u, v) for u, targets in enumerate(readers) for v in targets)
    nodes = tuple(
        CostNode(f"n{k}", draw.uniform(1, 2), draw.uniform(2, 4), (Parameter(f"w{k}", draw.randint(0, 9)),), 10)
        for k in range(count)
    )
    tensors = tuple(CostTensor(f"t{u}", u, targets, 2000, 2000) for u, targets in enumerate(readers))
    return CostGraph("long", nodes, edges, tensors)


@pytest.mark.parametrize("count", [2000, 5000])
def test_a_large_graph_is_fitted_in_coarser_parts(count: int) -> None:
    """What is found fits by the program's count; what is not found is not said to be impossible."""
    graph, shape = long_graph(count), Shape(4, 4, 4)
    ranks = Cutter(Options(4, 4, 4, "1f1b"), shape).ranks[0]
    search = Fitting.of(graph, 4, ranks)
    assert [flows.whole for flows in search.grains] == [False]
    even = evaluate(graph, [4 * v // count for v in range(count)])
    limit = int(0.95 * ranks.peak(even))
    found = search.any(limit, 20.0)
    assert found is not None
    assert len(found.stage) == count
    assert peak_of(found, "1f1b", shape) <= limit
    search.fit = None
    assert search.any(100, 1.0) is None
    assert search.bound == 0


def test_a_graph_that_is_too_large_for_the_solver_is_not_said_to_fit_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "MOST", 9)
    graph = random_graph(random.Random(0), 7)
    with pytest.raises(MemoryLimitError, match=r"into 3 stages that fits in memory was found: .* would do") as error:
        Cutter(Options(3, 3, 4, "1f1b", memory=100), Shape(3, 3, 4))(graph)
    assert error.value.needed > 100


def test_a_model_is_compiled_within_the_least_memory_of_its_parts() -> None:
    torch.manual_seed(0)
    sizes = (8, 24, 4, 16, 4, 8)
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))
    batch, options = (torch.randn(8, 8),), {"stages": 3, "microbatches": 4, "costs": "estimate"}

    def loss(model: nn.Module, batch: tuple[torch.Tensor]) -> torch.Tensor:
        return model(batch[0]).square().mean()

    with pytest.raises(MemoryLimitError, match=r"would do \(.*; less than \d+ would not, for param") as error:
        pipecompile.compile(model, batch, loss=loss, memory=100, **options)
    needed = int(error.value.needed)
    pipe = pipecompile.compile(model, batch, loss=loss, memory=needed, **options)
    assert max(pipe.forecast.peak_bytes) == needed
    free = pipecompile.compile(model, batch, loss=loss, **options)
    assert max(free.forecast.peak_bytes) > needed


def test_what_is_held_along_a_row() -> None:
    """Stages 0 and 2 on this rank, 1 on another: what arrives for a microbatch is held until its backward."""
    text = [("RECV_F", 2, 1), ("FORWARD", 2, -1), ("BACKWARD", 2, -1), ("SEND_B", 2, 1), ("SEND_B", 2, 1)]
    row = [Instruction(op, stage, 0, peer) for op, stage, peer in text]
    found = Holdings.of(row, (0, 1, 0), [(0, 1), (1, 2), (0, 2)])
    assert found.columns == (("forward", 1, 2), ("saved", 2, 2), ("backward", 1, 2))
    assert found.counts.tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 0], [0, 0, 1], [0, 0, 1]]
