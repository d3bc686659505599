"""Costs that a user wrote down or measured elsewhere: ``--costs FILE``.

    {"unit": "ms", "nodes": {"hidden": {"fwd": 1.5, "bwd": 3.0, "weight": 1.5, "saved_bytes": 4096},
                             "model.layers.0": {"fwd": 2, "bwd": 4}},
     "default": {"fwd": 0, "bwd": 0}}

A key is the name of a node, or the FQN of a module for every call of it; ``weight`` and ``saved_bytes`` are 0 unless
given. How finely a model is lifted is not known beforehand, so a node without an entry of its own costs

 1. what the entries of the modules inside of it sum up to; otherwise
 2. its share of the entry of the innermost module around it, in proportion to estimates; otherwise
 3. the ``default``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipecompile.cost.estimate import estimate
from pipecompile.cost.graph import NodeCost
from pipecompile.errors import CostError
from pipecompile.ir import Call, Graph, Node
from pipecompile.ir.json_text import Reader, parse, shortened
from pipecompile.machine import MACHINES

MILLISECONDS = {"s": 1e3, "ms": 1.0, "us": 1e-3}
FIELDS = ("fwd", "bwd", "weight", "saved_bytes")
NOTHING = NodeCost(0.0, 0.0)


def existing(path: str | Path) -> str | Path:
    """The path of a cost file; CostError where there is none, or a misspelt word."""
    if not Path(path).is_file():
        raise CostError(
            f"there is no cost file {str(path)!r}; costs are 'measure', 'estimate', or a JSON file of costs"
        )
    return path


def read_costs(path: str | Path, graph: Graph) -> dict[str, NodeCost]:
    """The cost of each node of ``graph`` that is not replicated, from a cost file; CostError where there is none."""
    entries, default = _read(path)
    owned = [node for node in graph.nodes if node.name not in graph.replicated]
    _refuse_strangers(entries, graph, path)
    given = _Given(graph, entries)
    costs: dict[str, NodeCost | None] = {node.name: given.alone(node) for node in owned}
    costs |= _shares(given, [node for node in owned if costs[node.name] is None])
    missing = [name for name, cost in costs.items() if cost is None and default is None]
    if missing:
        raise CostError(
            f"cost file {str(path)!r} has no cost for {len(missing)} of {len(owned)} nodes: {_some(missing)}; "
            f'add them, the modules around them, or a "default"'
        )
    return {name: cost or default or NOTHING for name, cost in costs.items()}


@dataclass(frozen=True, slots=True)
class _Given:
    """The entries of a file, seen from a graph that is lifted to some depth."""

    graph: Graph
    entries: Mapping[str, NodeCost]

    def alone(self, node: Node) -> NodeCost | None:
        """The node's own entry, or the sum of the entries of the outermost modules inside of it (1)."""
        if node.kind != "call":
            return self.entries.get(node.name)
        if (own := self.entries.get(node.name, self.entries.get(node.target))) is not None:
            return own
        parts = [part for i, call in enumerate(self.graph.calls) if call.key == node.name for part in self._inside(i)]
        return sum(parts, NOTHING) if parts else None

    def _inside(self, index: int) -> Iterator[NodeCost]:
        for child, call in enumerate(self.graph.calls):
            if call.parent == index:
                if (own := self.of_call(call)) is not None:
                    yield own
                else:
                    yield from self._inside(child)

    def of_call(self, call: Call) -> NodeCost | None:
        return self.entries.get(call.key, self.entries.get(call.fqn))

    def around(self, node: Node) -> str:
        """The FQN of the innermost module around a node that has an entry (2); empty if there is none."""
        steps = (node.module if node.kind == "op" else node.target.rpartition(".")[0]).split(".")
        fqns = [".".join(steps[:length]) for length in range(len(steps), 0, -1)]
        return next((fqn for fqn in fqns if any(self._calls(fqn))), "")

    def _calls(self, fqn: str) -> Iterator[NodeCost]:
        """The entries of all calls of a module."""
        found = (self.of_call(call) for call in self.graph.calls if call.fqn == fqn)
        return (cost for cost in found if cost is not None)

    def remainder(self, fqn: str) -> NodeCost:
        """What the entries of a module leave over for the nodes inside of it that have no entry of their own."""
        nodes = [node for node in self.graph.nodes if self.around(node) == fqn]
        spent = sum((cost for cost in map(self.alone, nodes) if cost is not None), NOTHING)
        whole = sum(self._calls(fqn), NOTHING)
        return NodeCost(
            max(0.0, whole.forward_ms - spent.forward_ms),
            max(0.0, whole.backward_ms - spent.backward_ms),
            max(0, whole.saved_bytes - spent.saved_bytes),
            max(0.0, whole.weight_ms - spent.weight_ms),
        )


def _shares(given: _Given, nodes: Sequence[Node]) -> dict[str, NodeCost]:
    """Divide the entries of the modules around ``nodes`` over them, in proportion to their estimated times (2)."""
    groups: dict[str, list[Node]] = {}
    for node in nodes:
        if fqn := given.around(node):
            groups.setdefault(fqn, []).append(node)
    times = estimate(given.graph, MACHINES["cpu"]) if groups else {}
    found = {}
    for fqn, group in groups.items():
        work = {node.name: times[node.name].forward_ms + times[node.name].backward_ms for node in group}
        total = sum(work.values())
        whole = given.remainder(fqn)
        for name, part in work.items():
            found[name] = _scaled(whole, part / total if total else 1 / len(group))
    return found


def _scaled(cost: NodeCost, share: float) -> NodeCost:
    return NodeCost(
        cost.forward_ms * share, cost.backward_ms * share, round(cost.saved_bytes * share), cost.weight_ms * share
    )


def _refuse_strangers(entries: Mapping[str, NodeCost], graph: Graph, path: str | Path) -> None:
    known = {part.name for node in graph.nodes for part in (node, *node.inside)}
    known |= {node.target for node in graph.nodes if node.kind == "call"}
    known |= {name for call in graph.calls for name in (call.key, call.fqn)}
    strange = [key for key in entries if key not in known]
    if strange:
        raise CostError(
            f"cost file {str(path)!r} names {_some(strange)}, which the graph does not have; "
            f"its nodes are {_some([node.name for node in graph.nodes])}"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(name[:80] for name in names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _read(path: str | Path) -> tuple[dict[str, NodeCost], NodeCost | None]:
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise CostError(f"cost file {str(path)!r} cannot be read: {error.strerror}; give the path of one") from error
    whole = parse(content, f"cost file {str(path)!r}", CostError, "mend it")
    if not isinstance(whole, dict) or not isinstance(whole.get("nodes"), dict):
        raise CostError(f'cost file {str(path)!r} has no "nodes" object, expected {{"unit": "ms", "nodes": {{...}}}}')
    unit = whole.get("unit", "ms")
    if not isinstance(unit, str) or unit not in MILLISECONDS:
        raise CostError(
            f"cost file {str(path)!r}: its unit is {shortened(unit)}, expected one of {', '.join(MILLISECONDS)}"
        )
    entries = {key: _cost(entry, key, MILLISECONDS[unit], path) for key, entry in whole["nodes"].items()}
    return entries, _cost(whole["default"], "default", MILLISECONDS[unit], path) if "default" in whole else None


def _cost(entry: Any, key: str, unit_ms: float, path: str | Path) -> NodeCost:
    where = f"cost file {str(path)!r}, node {shortened(key)}"
    if not isinstance(entry, dict) or not {"fwd", "bwd"} <= set(entry) <= set(FIELDS):
        raise CostError(
            f'{where}: {shortened(entry)}, expected {{"fwd": .., "bwd": ..}} and perhaps "weight", "saved_bytes"'
        )
    read = Reader(CostError, "mend it")
    for what, cost in entry.items():
        read.as_type(int if what == "saved_bytes" else float, cost, f"{where}: {what}")
    if (weight := entry.get("weight", 0)) > entry["bwd"] >= 0:
        raise CostError(f"{where}: weight is {weight}, more than the whole backward, bwd, of {entry['bwd']}")
    try:
        return NodeCost(
            entry["fwd"] * unit_ms,
            entry["bwd"] * unit_ms,
            entry.get("saved_bytes", 0),
            entry.get("weight", 0) * unit_ms,
        )
    except CostError as error:
        raise CostError(f"{where}: {error}") from error
