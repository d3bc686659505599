"""The ways between stages that a partition implies: which values go from a stage to another, and which come back."""

from __future__ import annotations

from dataclasses import dataclass

from pipecompile.ir.partition import Partition


@dataclass(frozen=True, slots=True)
class Route:
    """Everything that goes from stage ``source`` to stage ``target`` for one microbatch, in the partition's order.

    ``gradients`` are the values whose gradient comes back.
    """

    source: int
    target: int
    values: tuple[str, ...]
    gradients: tuple[str, ...]
    bytes: int
    gradient_bytes: int


@dataclass(frozen=True, slots=True)
class Routes:
    """The routes of a partition, by (source, target) in ascending order."""

    routes: tuple[Route, ...]

    @staticmethod
    def of(partition: Partition) -> Routes:
        pairs = sorted({(t.source, t.target) for t in partition.transfers})
        found = []
        for source, target in pairs:
            own = [t for t in partition.transfers if (t.source, t.target) == (source, target)]
            found.append(
                Route(
                    source,
                    target,
                    values=tuple(t.value for t in own),
                    gradients=tuple(t.value for t in own if t.gradient_bytes > 0),
                    bytes=sum(t.bytes for t in own),
                    gradient_bytes=sum(t.gradient_bytes for t in own),
                )
            )
        return Routes(tuple(found))

    def into(self, stage: int) -> tuple[Route, ...]:
        """The routes that bring ``stage`` what its forward reads."""
        return tuple(route for route in self.routes if route.target == stage)

    def back(self, stage: int) -> tuple[Route, ...]:
        """The routes over which gradients return to ``stage`` before its backward."""
        return tuple(route for route in self.routes if route.source == stage and route.gradients)
