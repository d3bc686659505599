"""Measured against estimated costs of each call: ``python -m benchmarks.gpu.costs [--machine NAME] [--device cpu]``.

For GPT-2 and Llama, the time of each distinct call's forward and backward as ``--costs measure`` takes it on the device,
beside what ``--costs estimate`` gives for the machine. Prints each ratio estimated / measured, the median and the worst,
and that of the sum over the model. There is no bar: the figures say how far a plan made without the device can be trusted.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.gpu.setting import MODELS, Result, arguments, checked, machine_of, make, tell
from pipecompile.capture import capture
from pipecompile.cost import Costed, NodeCost, cost_graph, estimate, measure
from pipecompile.ir import CostGraph, Graph, Partition
from pipecompile.machine import find_machine
from pipecompile.passes.opening import split
from pipecompile.passes.partitioners import partition

STAGES = 4
SHORTEST_MS = 0.001


def run(device: str, machine: str, models: tuple[str, ...] = tuple(MODELS)) -> Result:
    """One row for each distinct call."""
    rows: list[Result] = []
    totals = {}
    for name in models:
        model, batch = make(name, device, 1)
        found = compare(model, batch, machine)
        rows += [{"model": name, **row} for row in found]
        totals[name] = sum(r["count"] * r["estimated_ms"] for r in found) / sum(
            r["count"] * r["measured_ms"] for r in found
        )
    ratios = [row["ratio"] for row in rows]
    worst = max(ratios, key=lambda ratio: max(ratio, 1 / ratio))
    return {
        "machine": machine,
        "rows": rows,
        "median": statistics.median(ratios),
        "worst": worst,
        "total": totals,
        "ok": True,
    }


def compare(model: nn.Module, batch: Any, machine: str) -> list[Result]:
    """The calls of the graph from which the model's stages are cut; equal ones once, with their number."""
    graph = lifted(model, batch, machine)
    estimated = estimate(graph, find_machine(machine))
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(graph, model, batch, Path(folder) / "costs.json", progress=False)
    found: dict[tuple[str, NodeCost], Result] = {}
    for node in graph.nodes:
        if node.name in measured:
            kind = type(model.get_submodule(node.target)).__name__ if node.kind == "call" else node.target
            here, there = _ms(measured[node.name]), _ms(estimated[node.name])
            if here < SHORTEST_MS or not there:
                continue  # a view: it launches nothing
            row = {"call": kind, "count": 0, "measured_ms": here, "estimated_ms": there, "ratio": there / here}
            found.setdefault((kind, measured[node.name]), row)["count"] += 1
    return list(found.values())


def lifted(model: nn.Module, batch: Any, machine: str) -> Graph:
    """The graph as it was opened for balance."""

    def cost(graph: Graph) -> Costed:
        return cost_graph(graph, estimate(graph, find_machine(machine)), type(model).__name__)

    def cut(costs: CostGraph) -> Partition:
        return partition(costs, STAGES)

    return split(capture(model, batch, None), STAGES, cost, cut).graph


def _ms(cost: NodeCost) -> float:
    return cost.forward_ms + cost.backward_ms


def main() -> int:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument(
        "--machine", default="", help="what the card is called here, or a JSON file (default: its name)"
    )
    options = checked(parser)
    machine = options.machine or machine_of(options.device)
    if not machine:
        parser.error("no machine is known by this card's name; give the nearest with --machine, or a file (machine.py)")
    return tell(run(options.device, machine), options)


if __name__ == "__main__":
    sys.exit(main())
