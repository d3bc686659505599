"""Versions of the weights in a program that never flushes: who makes them, who reads them, how many are held at once.

Version 0 of a stage's weights is what a step begins with; the stage's n-th UPDATE makes version n out of the gradients of
its group, the microbatches after those of the update before. A shared parameter has versions of its own, the same on all
its stages: a microbatch reads the version that its first stage, whose weights are the oldest, has named in the forward.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pipecompile.ir.program import Instruction

Rows = Sequence[Sequence[Instruction]]
LAST = ("BACKWARD", "BACKWARD_WEIGHT")
"""The instructions that end a microbatch on a stage."""


def updates(rows: Rows) -> bool:
    """Whether the program updates weights inside a step."""
    return any(one.op == "UPDATE" for row in rows for one in row)


def group_ends(rows: Rows, stage: int = 0) -> tuple[int, ...]:
    """The last microbatch of each group, in the order of the stage's updates."""
    own = (one for row in rows for one in row if one.op == "UPDATE" and one.stage == stage and not one.values)
    return tuple(one.microbatch for one in own)


def group_of(ends: Sequence[int], microbatch: int) -> int:
    """The group that a microbatch is in."""
    return bisect_left(ends, microbatch)


def members(ends: Sequence[int], group: int) -> range:
    """The microbatches of a group."""
    return range(ends[group - 1] + 1 if group else 0, ends[group] + 1)


def versions_read(rows: Rows) -> dict[tuple[int, int], int]:
    """By (stage, microbatch): the version that the forward names."""
    return {(one.stage, one.microbatch): one.version for row in rows for one in row if one.op == "FORWARD"}


@dataclass(slots=True)
class Line:
    """The versions of one set of weights on one rank: a stage's own, or a shared parameter's on ``stages``.

    ``reads`` are the versions that the microbatches of ``stages`` will still read or read now, ``newest`` the last one;
    ``open`` are the groups that have a gradient and wait for their update.
    """

    stages: tuple[int, ...]
    values: tuple[str, ...]
    reads: list[int]
    version_of: Mapping[int, int]
    ends: tuple[int, ...]
    newest: int = 0
    open: set[int] = field(default_factory=set)

    def step(self, one: Instruction) -> None:
        """What an instruction does to the versions that must be kept."""
        if one.op == "UPDATE" and one.values == self.values and one.stage in self.stages:
            self.newest = one.version
            self.open.discard(one.version - 1)
        elif one.op in LAST and one.stage in self.stages:
            self.reads.remove(self.version_of[one.microbatch])
            self.open.add(group_of(self.ends, one.microbatch))

    @property
    def held(self) -> int:
        """Versions that exist and are still needed: the newest, and every older one that somebody reads."""
        return len({self.newest, *(version for version in self.reads if version < self.newest)})


def lines(rows: Rows, rank: int, shared: Iterable[tuple[str, Sequence[int]]] = ()) -> tuple[Line, ...]:
    """The lines of a rank at the beginning of a step; ``shared`` are parameters with all the stages that hold them."""
    read = versions_read(rows)
    here = sorted({one.stage for one in rows[rank] if one.op == "FORWARD"})
    ends = group_ends(rows)
    microbatches = sorted({microbatch for _, microbatch in read})

    def line(stages: tuple[int, ...], first: int, values: tuple[str, ...] = ()) -> Line:
        version_of = {m: read[first, m] for m in microbatches}
        return Line(stages, values, [version for version in version_of.values() for _ in stages], version_of, ends)

    common = [((name,), tuple(s for s in stages if s in here), min(stages)) for name, stages in shared]
    return (
        *(line((stage,), stage) for stage in here),
        *(line(mine, first, values) for values, mine, first in common if mine),
    )
