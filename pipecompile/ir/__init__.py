"""The values that passes hand to each other: frozen, checked when made, and free of torch objects.

    Graph        the traced model: inputs, nodes in program order, the module calls they belong to
    CostGraph    what partitioning needs to know of a graph: time, bytes, order
    Partition    a stage for every node, and what crosses between stages
    Shape        stages, ranks, microbatches, placement
    Timetable    the compute order of each rank            Program    the same with communication
    Forecast     when everything runs, and how much memory it takes

Units: times in milliseconds, sizes in bytes. ``str(value)`` is the text that golden tests compare.
"""

from pipecompile.ir.graph import AtMost, Attribute, AttributeInfo, Call, Graph, Node, Path, Ref, Spec, Value
from pipecompile.ir.partition import (
    AFTER_HALF,
    CostGraph,
    CostNode,
    CostTensor,
    Parameter,
    Partition,
    Shared,
    StageCost,
    StageFormulas,
    Transfer,
    Use,
)
from pipecompile.ir.program import (
    COMPUTE,
    OPS,
    PROGRAM_VERSION,
    RECEIVES,
    SENDS,
    SUMS,
    Forecast,
    Instruction,
    Port,
    Program,
    Shape,
    Span,
    StagePlan,
    Timetable,
)
from pipecompile.ir.routes import Route, Routes
from pipecompile.ir.size import Condition, Size

__all__ = [
    "AFTER_HALF",
    "COMPUTE",
    "OPS",
    "PROGRAM_VERSION",
    "RECEIVES",
    "SENDS",
    "SUMS",
    "AtMost",
    "Attribute",
    "AttributeInfo",
    "Call",
    "Condition",
    "CostGraph",
    "CostNode",
    "CostTensor",
    "Forecast",
    "Graph",
    "Instruction",
    "Node",
    "Parameter",
    "Partition",
    "Path",
    "Port",
    "Program",
    "Ref",
    "Route",
    "Routes",
    "Shape",
    "Shared",
    "Size",
    "Span",
    "Spec",
    "StageCost",
    "StageFormulas",
    "StagePlan",
    "Timetable",
    "Transfer",
    "Use",
    "Value",
]
