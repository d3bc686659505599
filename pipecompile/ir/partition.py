"""What partitioning needs to know of a graph, and what it gives back."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipecompile.errors import CostError, PartitionError


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter as a cost: nodes that use the same one share its bytes when they are in one stage.

    ``master_bytes`` are those of the wider copy that is trained in its place.
    """

    name: str
    bytes: int
    trainable: bool = True
    master_bytes: int = 0


@dataclass(frozen=True, slots=True)
class CostNode:
    """What one microbatch costs in a node. ``weight_ms`` is the part of ``backward_ms`` that makes weight gradients.

    ``recomputed_bytes`` are saved only while its backward runs, which makes them again.
    """

    name: str
    forward_ms: float
    backward_ms: float
    parameters: tuple[Parameter, ...] = ()
    saved_bytes: int = 0
    weight_ms: float = 0.0
    recomputed_bytes: int = 0

    def __post_init__(self) -> None:
        for what, cost in (("forward", self.forward_ms), ("backward", self.backward_ms), ("weight", self.weight_ms)):
            if not (cost >= 0 and math.isfinite(cost)):
                raise CostError(
                    f"node {self.name!r}: its {what} time is {cost}, expected a finite number >= 0; mend its cost"
                )
        if self.saved_bytes < 0 or any(p.bytes < 0 for p in self.parameters):
            raise CostError(f"node {self.name!r}: a size is negative; mend its cost")

    @property
    def parameter_bytes(self) -> int:
        return sum(p.bytes for p in self.parameters)


@dataclass(frozen=True, slots=True)
class CostTensor:
    """A produced tensor: each other stage that reads it costs ``bytes`` there and ``gradient_bytes`` back."""

    name: str
    source: int
    targets: tuple[int, ...]
    bytes: int
    gradient_bytes: int = 0
    kind: str = "F"

    @property
    def total_bytes(self) -> int:
        return self.bytes + self.gradient_bytes


@dataclass(frozen=True, slots=True)
class CostGraph:
    """A directed acyclic graph of costs; node ids are positions in ``nodes`` and a topological order.

    ``recompute`` has a mode for each stage (empty: none anywhere): whether the nodes that are recomputed are so one by one
    ("calls") or a whole "stage" at once. Where stages differ in that, ``staged`` has for each the nodes as they cost there.
    """

    name: str
    nodes: tuple[CostNode, ...]
    edges: tuple[tuple[int, int], ...]
    tensors: tuple[CostTensor, ...]
    unit: str = "ms"
    recompute: tuple[str, ...] = ()
    staged: tuple[tuple[CostNode, ...], ...] = ()

    def nodes_in(self, stage: int) -> tuple[CostNode, ...]:
        """The nodes as they cost in a stage."""
        return self.staged[stage] if self.staged else self.nodes

    def mode_of(self, stage: int) -> str:
        """What a stage recomputes."""
        return self.recompute[stage] if self.recompute else "none"

    def __post_init__(self) -> None:
        count = len(self.nodes)
        for u, v in self.edges:
            if not (0 <= u < count and 0 <= v < count):
                raise CostError(
                    f"edge {(u, v)} of graph {self.name!r} names a node that is not there; ids go from 0 to {count - 1}"
                )
            if u >= v:
                raise CostError(f"edge {(u, v)} of graph {self.name!r} goes back; node ids must be a topological order")
        for t in self.tensors:
            if t.bytes < 0 or t.gradient_bytes < 0 or not all(0 <= n < count for n in (t.source, *t.targets)):
                raise CostError(
                    f"tensor {t.name!r} of graph {self.name!r} has a bad size or names a node that is not there"
                )


@dataclass(frozen=True, slots=True)
class Transfer:
    """A value that goes from stage ``source`` to stage ``target`` for each microbatch, and its gradient's bytes back."""

    value: str
    source: int
    target: int
    bytes: int
    gradient_bytes: int = 0


AFTER_HALF = "SEND_B_HALF"
"""A SEND_B after the input half of a backward: what the weight half needs of the gradient stays."""


@dataclass(frozen=True, slots=True)
class Use:
    """What an instruction of a stage was seen to take when the runtime ran it (pipecompile/weighing.py), or would take
    (pipecompile/rehearsing.py).

    ``first``: the stage's first microbatch, which makes the gradients that later ones are added to. ``ms`` is its time,
    None where no clock ran;
    ``after`` and ``peak`` are bytes over what was held before it, afterwards and at most meanwhile. ``peer`` is the stage
    at the other end of a SEND, after which the message is no longer held. The op "HOLD" is what a stage always holds
    (``peak``: and what the optimizer takes meanwhile), "BATCH" a microbatch,
    "AHEAD" the most that a channel posts ahead, "LIBRARIES" what a device's libraries keep once they have been used.
    """

    op: str
    after: int
    peak: int = 0
    ms: float | None = None
    first: bool = False
    peer: int = -1


@dataclass(frozen=True, slots=True)
class StageCost:
    """What a stage costs for each microbatch (times, saved activations) and once (parameters).

    The times are sums over its nodes. ``uses`` are what its instructions take as a whole; empty if it was never run.
    A backward holds ``recomputed_bytes`` more until it ends. ``master_bytes`` are the float32 copies of narrow parameters that are trained
    instead of them.
    """

    forward_ms: float
    backward_ms: float
    weight_ms: float = 0.0
    parameter_bytes: int = 0
    trainable_bytes: int = 0
    saved_bytes: int = 0
    recomputed_bytes: int = 0
    master_bytes: int = 0
    uses: tuple[Use, ...] = ()

    @property
    def total_ms(self) -> float:
        return self.forward_ms + self.backward_ms


@dataclass(frozen=True, slots=True)
class StageFormulas:
    """A stage's estimated cost of a microbatch as texts in its open sizes (``ir.size``): milliseconds, bytes, FLOPs.

    ``backward_input_ms`` is a backward without weight gradients; ``flops`` are forward's and backward's together.
    """

    forward_ms: str
    backward_ms: str
    backward_input_ms: str
    saved_bytes: str
    flops: str


@dataclass(frozen=True, slots=True)
class Shared:
    """A trainable parameter (canonical FQN) that lives in several stages, whose gradients are summed."""

    parameter: str
    stages: tuple[int, ...]
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Partition:
    """A stage for each node of a cost graph, and what follows from it.

    ``bound_ms``/``bound_bytes`` are proved lower bounds of the bottleneck and of the bytes (0: nothing proved).
    """

    graph: str
    stages: int
    stage: tuple[int, ...]
    costs: tuple[StageCost, ...]
    transfers: tuple[Transfer, ...] = ()
    shared: tuple[Shared, ...] = ()
    bound_ms: float = 0.0
    bound_bytes: int = 0

    def __post_init__(self) -> None:
        if len(self.costs) != self.stages:
            raise PartitionError(f"{len(self.costs)} stage costs for {self.stages} stages")
        bad = [t for t in self.transfers if not 0 <= t.source < t.target < self.stages]
        if bad:
            raise PartitionError(f"value {bad[0].value!r} would go from stage {bad[0].source} to stage {bad[0].target}")

    @property
    def bottleneck_ms(self) -> float:
        return max(cost.total_ms for cost in self.costs)

    @property
    def bytes(self) -> int:
        return sum(t.bytes + t.gradient_bytes for t in self.transfers)

    def __str__(self) -> str:
        lines = [f"partition of {self.graph} into {self.stages} stages"]
        for s, cost in enumerate(self.costs):
            lines.append(f"stage {s}: {self.stage.count(s)} nodes, {cost.parameter_bytes} parameter bytes")
        for t in self.transfers:
            back = f", {t.gradient_bytes} back" if t.gradient_bytes else ""
            lines.append(f"{t.source} > {t.target}: {t.value} {t.bytes} bytes{back}")
        for shared in self.shared:
            lines.append(f"shared {shared.parameter}: stages {', '.join(map(str, shared.stages))}")
        return "\n".join(lines)
