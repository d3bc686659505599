"""Partitioners side by side: ``python benchmarks/partition.py FOLDER``, a folder of cost graphs with reference.json.

    ours         pipecompile's default                     mincut       the same without a solver
    dfs          the best contiguous split of one depth-first order (least time, then bytes)
    blocks       torchgpipe's block partition: blocks of one order that differ by at most the largest element, bytes
                 unseen (I. Bárány, V. Grinberg, "Block partitions of sequences", 2015)
    pipedream    PipeDream's dynamic program without replication: the slowest of all stages and all transfers between
                 neighbours (D. Narayanan et al., SOSP 2019), at 10 GB/s
    even         as many nodes in each stage, as one does by hand

Each column gives T / T_best and bytes / bytes_best; T above 1.05 T_best is marked with *.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipecompile.ir import CostGraph
from pipecompile.ir.cost_file import read_cost_graph
from pipecompile.passes.partitioners import pose, solve
from pipecompile.passes.partitioners.contiguous import cheapest, fastest, line
from pipecompile.passes.partitioners.orders import depth_first, neighbours
from pipecompile.passes.partitioners.problem import Problem

Stages = tuple[int, ...]
LINK_BYTES_PER_MS = 10e6


def order_of(problem: Problem) -> list[int]:
    after, before = neighbours(problem)
    return depth_first(after, before, list(range(problem.nodes)))


def dfs(problem: Problem) -> Stages:
    """The least time over the order, then the fewest bytes within the tolerance of that."""
    on = line(problem, order_of(problem))
    least, _ = fastest(problem, on)
    return on.stages_of(cheapest(problem, on, least * (1 + problem.tolerance))[1])


def blocks(problem: Problem) -> Stages:
    """Bárány and Grinberg: while the largest block p exceeds the smallest q (the one nearest to p) by more than the
    largest element, q takes one element from its neighbour on p's side."""
    order = order_of(problem)
    total = np.concatenate(([0.0], np.cumsum([problem.load[v] for v in order])))
    ends = [round(k * problem.nodes / problem.stages) for k in range(problem.stages + 1)]
    while True:
        sizes = np.diff(total[ends])
        p = int(sizes.argmax())
        q = min((s for s in range(problem.stages) if sizes[s] == sizes.min()), key=lambda s: abs(s - p))
        if sizes[p] <= sizes[q] + max(problem.load) * (1 + 1e-9):
            break
        if q < p:
            ends[q + 1] += 1
        else:
            ends[q] -= 1
    stage = [0] * problem.nodes
    for s in range(problem.stages):
        for v in order[ends[s] : ends[s + 1]]:
            stage[v] = s
    return tuple(stage)


def pipedream(problem: Problem) -> Stages:
    """A[j, s] = min over i of max(A[i, s-1], 2 · time to send what crosses after i, time of (i, j])."""
    order = order_of(problem)
    on = line(problem, order)
    count = problem.nodes
    position = {v: p for p, v in enumerate(order)}
    crossing = np.zeros(count + 1)
    for source, targets, size in problem.tensors:
        where = [position[source], *(position[v] for v in targets)]
        crossing[min(where) + 1 : max(where) + 1] += size
    took = on.load[None, :] - on.load[:, None]
    took[np.tri(count + 1, dtype=bool)] = np.inf
    best, choices = np.where(np.arange(count + 1) == 0, 0.0, np.inf), []
    for _ in range(problem.stages):
        through = np.maximum(np.maximum(best, 2 * crossing / LINK_BYTES_PER_MS)[:, None], took)
        choices.append(through.argmin(axis=0))
        best = through.min(axis=0)
    ends = [count]
    for choice in choices[:0:-1]:
        ends.append(int(choice[ends[-1]]))
    return on.stages_of(ends[::-1])


def even(problem: Problem) -> Stages:
    """As many nodes in each stage."""
    return tuple(v * problem.stages // problem.nodes for v in range(problem.nodes))


METHODS: dict[str, Callable[[Problem], Stages]] = {
    "ours": lambda problem: solve(problem).stage,
    "mincut": lambda problem: solve(problem, "mincut").stage,
    "dfs": dfs,
    "blocks": blocks,
    "pipedream": pipedream,
    "even": even,
}


def main(folder: Path) -> None:
    ratios: dict[str, list[tuple[float, float, float]]] = {name: [] for name in METHODS}
    print(f"{'':24} S " + "".join(f"{name:>22}" for name in METHODS))
    graphs: dict[str, CostGraph] = {}
    for case in json.loads((folder / "reference.json").read_text()):
        name, stages = case["graph"], case["stages"]
        graph = graphs.setdefault(name, read_cost_graph(folder / f"{name}.json").graph)
        problem = pose(graph, stages)
        row = f"{name:24} {stages} "
        for method, cut in METHODS.items():
            start = time.perf_counter()
            stage = cut(problem)
            seconds = time.perf_counter() - start
            slow, much = max(problem.times(stage)) / case["T_best"], problem.traffic(stage) / case["bytes_best"]
            ratios[method].append((slow, much, seconds))
            row += f"{slow:10.4f}{'*' if slow > 1.05 + 1e-6 else ' '} {much:9.4f} "
        print(row, flush=True)
    for what, at, summary in (
        ("T geomean", 0, lambda x: math.exp(sum(map(math.log, x)) / len(x))),
        ("T worst", 0, max),
        ("bytes geomean", 1, lambda x: math.exp(sum(map(math.log, x)) / len(x))),
        ("bytes worst", 1, max),
        ("seconds worst", 2, max),
    ):
        print(f"{what:26} " + "".join(f"{summary([r[at] for r in rows]):22.4f}" for rows in ratios.values()))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} FOLDER (of cost graphs and their reference.json)")
    main(Path(sys.argv[1]))
