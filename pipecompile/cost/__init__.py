"""What each node of a traced model costs, and the graph of costs that partitioning cuts.

Graph ──measure | estimate | read_costs──▶ {node: NodeCost} ──cost_graph──▶ Costed(CostGraph, members)
"""

from pipecompile.cost.estimate import estimate
from pipecompile.cost.file import existing, read_costs
from pipecompile.cost.formulas import stage_formulas
from pipecompile.cost.graph import Costed, NodeCost, cost_graph, owned_reads
from pipecompile.cost.measure import measure

__all__ = [
    "Costed",
    "NodeCost",
    "cost_graph",
    "estimate",
    "existing",
    "measure",
    "owned_reads",
    "read_costs",
    "stage_formulas",
]
