"""Costs that a user wrote down or measured elsewhere: ``--costs FILE``.

    {"unit": "ms", "nodes": {"hidden": {"fwd": 1.5, "bwd": 3.0, "weight": 1.5, "saved_bytes": 4096},
                             "model.layers.0": {"fwd": 2, "bwd": 4}},
     "default": {"fwd": 0, "bwd": 0}}

A key is a node's name, or the FQN of a module for every call of it. ``default``, which may be left out, is the cost of
nodes that are not named. ``weight`` and ``saved_bytes`` are 0 unless given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipecompile.cost.graph import NodeCost
from pipecompile.errors import CostError
from pipecompile.ir import Graph, Node

MILLISECONDS = {"s": 1e3, "ms": 1.0, "us": 1e-3}
FIELDS = ("fwd", "bwd", "weight", "saved_bytes")


def read_costs(path: str | Path, graph: Graph) -> dict[str, NodeCost]:
    """The cost of each node of ``graph`` that is not replicated, from a cost file; CostError where there is none."""
    try:
        whole: Any = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise CostError(f"cost file {str(path)!r} cannot be read as JSON: {error}") from error
    if not isinstance(whole, dict) or not isinstance(whole.get("nodes"), dict):
        raise CostError(f'cost file {str(path)!r} has no "nodes" object, expected {{"unit": "ms", "nodes": {{...}}}}')
    unit = whole.get("unit", "ms")
    if unit not in MILLISECONDS:
        raise CostError(f"cost file {str(path)!r}: its unit is {unit!r}, expected one of {', '.join(MILLISECONDS)}")
    entries = {key: _cost(entry, key, MILLISECONDS[unit], path) for key, entry in whole["nodes"].items()}
    default = _cost(whole["default"], "default", MILLISECONDS[unit], path) if "default" in whole else None
    owned = [node for node in graph.nodes if node.name not in graph.replicated]
    _refuse_strangers(entries, owned, path)
    costs = {node.name: entries.get(node.name, entries.get(_module(node), default)) for node in owned}
    missing = [name for name, cost in costs.items() if cost is None]
    if missing:
        raise CostError(
            f"cost file {str(path)!r} has no cost for {len(missing)} of {len(owned)} nodes: {_some(missing)}; "
            f'add them, or a "default"'
        )
    return {name: cost for name, cost in costs.items() if cost is not None}


def _module(node: Node) -> str:
    return node.target if node.kind == "call" else ""


def _refuse_strangers(entries: Mapping[str, NodeCost], owned: list[Node], path: str | Path) -> None:
    known = {node.name for node in owned} | {_module(node) for node in owned}
    strange = [key for key in entries if key not in known]
    if strange:
        raise CostError(
            f"cost file {str(path)!r} names {_some(strange)}, which the graph does not have; "
            f"its nodes are {_some([node.name for node in owned])}"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _cost(entry: Any, key: str, unit_ms: float, path: str | Path) -> NodeCost:
    where = f"cost file {str(path)!r}, node {key!r}"
    if not isinstance(entry, dict) or not {"fwd", "bwd"} <= set(entry) <= set(FIELDS):
        raise CostError(f'{where}: {entry!r}, expected {{"fwd": .., "bwd": ..}} and perhaps "weight", "saved_bytes"')
    strange = [what for what, cost in entry.items() if not isinstance(cost, int | float) or isinstance(cost, bool)]
    if strange:
        raise CostError(f"{where}: {strange[0]} is {entry[strange[0]]!r}, expected a number")
    try:
        return NodeCost(
            entry["fwd"] * unit_ms,
            entry["bwd"] * unit_ms,
            entry.get("saved_bytes", 0),
            entry.get("weight", 0) * unit_ms,
        )
    except CostError as error:
        raise CostError(f"{where}: {error}") from error
