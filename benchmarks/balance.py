"""How even are the stages: the slowest one against the best contiguous split of the lifted graph.

    python benchmarks/balance.py [--models gpt2,t5] [--stages 2,4,8]

For each model and number of stages the model is compiled with measured costs. The slowest stage is then compared with the
best contiguous split, over a handful of topological orders, of the graph that was lifted as compile lifted it, and of the
graph lifted before any call was opened for balance ("coarse"). A ratio below 1 means that the chosen partition is faster.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from pipecompile.capture import capture
from pipecompile.cost import NodeCost, cost_graph, measure
from pipecompile.ir import CostGraph, Graph, Partition
from pipecompile.passes.opening import split as split_graph
from pipecompile.passes.partitioners import partition
from pipecompile.runtime import split
from tests.models import MODELS

MICROBATCHES = 4
BAR = 1.05


def compare(name: str, stages: int) -> tuple[float, float, float]:
    """Milliseconds of the slowest stage: chosen, best contiguous split of the same graph, and of the coarse one."""
    model, batch, loss = MODELS[name]()
    microbatch = split(batch, MICROBATCHES)[0]
    seen: list[CostGraph] = []

    def price(graph: Graph) -> Mapping[str, NodeCost]:
        return measure(graph, model, microbatch, progress=False)

    def cut(costs: CostGraph) -> Partition:
        seen.append(costs)
        return partition(costs, stages)

    def contiguous(costs: CostGraph) -> float:
        return partition(costs, stages, method="contiguous", tolerance=0.0).bottleneck_ms

    found = split_graph(
        capture(model, microbatch, loss), stages, lambda graph: cost_graph(graph, price(graph), name), cut
    )
    return found.partition.bottleneck_ms, contiguous(found.costed.graph), contiguous(seen[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--stages", default="2,4,8")
    options = parser.parse_args()
    torch.set_num_threads(1)
    worst = 0.0
    print(f"{'model':8} stages  chosen ms  contiguous ms  ratio  coarse ms")
    for name in options.models.split(","):
        for stages in map(int, options.stages.split(",")):
            chosen, best, coarse = compare(name, stages)
            worst = max(worst, chosen / best)
            print(f"{name:8} {stages:6}  {chosen:9.3f}  {best:13.3f}  {chosen / best:5.3f}  {coarse:9.3f}", flush=True)
    print(f"worst ratio {worst:.3f}, allowed {BAR}")
    return int(worst > BAR)


if __name__ == "__main__":
    sys.exit(main())
