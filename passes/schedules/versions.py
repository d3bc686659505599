"""Which version of a stage's weights each microbatch sees where nothing flushes: version n is the weights after n updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pipecompile.ir import Instruction

Reads = Callable[[int, int], int]
"""From a microbatch and the newest version there is, the version that its forward reads; its backward reads the same."""


def versions_read(row: Sequence[Instruction], every: int, reads: Reads) -> tuple[tuple[int, ...], int]:
    """The version that each microbatch reads on one stage, and the most versions that the stage holds at once.

    ``row`` are the stage's forwards and backwards; an update follows every ``every``-th backward. A version is held
    while it is the newest, a forward may still read it, or a microbatch in flight has read it.
    """
    wanted = [one.microbatch for one in row if one.op == "FORWARD"]
    read: dict[int, int] = {}
    flying: set[int] = set()
    done, most = 0, 1
    for one in row:
        if one.op == "FORWARD":
            read[one.microbatch] = reads(one.microbatch, done // every)
            flying.add(one.microbatch)
        else:
            flying.discard(one.microbatch)
            done += 1
        newest = done // every
        coming = {reads(m, newest) for m in wanted[len(read) :][:1]}
        most = max(most, len({newest, *coming, *(read[m] for m in flying)}))
    return tuple(read[m] for m in sorted(read)), most


def newest(microbatch: int, version: int) -> int:
    """PipeDream: a forward reads the newest version."""
    return version


def one_behind(every: int) -> Reads:
    """2BW: the microbatches of a group of ``every`` read the version before the one that their group could see last."""

    def reads(microbatch: int, version: int) -> int:
        return max(0, microbatch // every - 1)

    return reads
