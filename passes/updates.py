"""The rules of a program that updates weights inside a step, for each stage and for each shared parameter:

1. a forward reads a version that an update before it has made, and the backward of its microbatch reads the same one;
2. the updates make versions 1, 2, … in order, each after every backward of its group, and the last group ends the step;
3. all stages have the same groups;
4. a shared parameter is updated once for each group on each rank that holds it, before anybody there reads the result.

In any other program no instruction names a version. O(instructions).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipecompile.ir import SUMS, Instruction, Partition, Program, Shared
from pipecompile.ir.versions import LAST, group_ends, members, updates, versions_read

Wrong = tuple[tuple[int, int], str]
"""Where an instruction stands, (rank, position), and what is wrong with it."""


def wrong_updates(program: Program, partition: Partition) -> Iterator[Wrong]:
    """What breaks the rules; every computation must be there, once and in order."""
    if not updates(program.rows):
        yield from _unneeded_versions(program)
        return
    ends = group_ends(program.rows)
    for stage in range(program.shape.stages):
        yield from _stage(program, stage, ends)
    for rank in range(program.shape.ranks):
        yield from _others(program, partition, rank)
    for shared in partition.shared:
        for rank in sorted({program.shape.placement[stage] for stage in shared.stages}):
            yield from _shared(program, shared, rank, ends)


def _unneeded_versions(program: Program) -> Iterator[Wrong]:
    for rank, row in enumerate(program.rows):
        for position, one in enumerate(row):
            if one.version >= 0:
                yield (rank, position), f"nothing makes version {one.version} of the weights; leave the version out"


def _stage(program: Program, stage: int, ends: Sequence[int]) -> Iterator[Wrong]:
    """Rules 1 to 3 for a stage's own weights."""
    rank = program.shape.placement[stage]
    made, read, over = 0, versions_read(program.rows), set()
    last = 0
    for position, one in enumerate(program.rows[rank]):
        if one.stage != stage:
            continue
        place = (rank, position)
        if one.op == "FORWARD" and not 0 <= one.version <= made:
            yield place, f"it reads version {one.version} of the weights, of which there are 0 to {made}"
        if one.op.startswith("BACKWARD") and one.version != read[stage, one.microbatch]:
            yield place, f"its forward read version {read[stage, one.microbatch]} of the weights; read the same"
        if one.op in LAST:
            over.add(one.microbatch)
            last = position
        if one.op == "UPDATE" and not one.values:
            yield from _order(place, one, made, ends, over)
            made += 1
            last = position
    if made < len(ends) or not ends or ends[-1] != program.shape.microbatches - 1:
        yield (rank, last), f"stage {stage} has no update for the microbatches after it"


def _order(place: tuple[int, int], one: Instruction, made: int, ends: Sequence[int], over: set[int]) -> Iterator[Wrong]:
    """What is wrong with an update that follows ``made`` others, when the microbatches of ``over`` are over."""
    if made >= len(ends) or one.microbatch != ends[made] or (made and ends[made] <= ends[made - 1]):
        yield place, f"it is update {made + 1}; stage 0 updates after microbatches {', '.join(map(str, ends))}"
    elif one.version != made + 1:
        yield place, f"it makes version {one.version}, but follows version {made}"
    elif late := [m for m in members(ends, made) if m not in over]:
        yield place, f"the gradient of microbatch {late[0]} is not there yet; move it behind its backward"


def _others(program: Program, partition: Partition, rank: int) -> Iterator[Wrong]:
    """Updates and sums of what is not shared."""
    names = {shared.parameter: shared.stages for shared in partition.shared}
    for position, one in enumerate(program.rows[rank]):
        if one.op in SUMS:
            yield (rank, position), "the weights are updated inside the step; sum their gradients in an UPDATE"
        elif one.op == "UPDATE" and one.values:
            if len(one.values) != 1 or one.stage not in names.get(one.values[0], ()):
                yield (rank, position), f"{', '.join(one.values)} is not to be updated here"
        elif one.op == "UPDATE" and one.peers:
            yield (rank, position), "the stage's own weights are on no other rank; leave the peers out"
        elif one.op not in ("FORWARD", "UPDATE", *LAST, "BACKWARD_INPUT") and one.version >= 0:
            yield (rank, position), "a message has no version; leave it out"


def _shared(program: Program, shared: Shared, rank: int, ends: Sequence[int]) -> Iterator[Wrong]:
    """Rules 1, 2 and 4 for a shared parameter on a rank."""
    placement = program.shape.placement
    holders = sorted({placement[stage] for stage in shared.stages})
    read = versions_read(program.rows)
    mine = [stage for stage in shared.stages if placement[stage] == rank]
    made, last, over = 0, 0, dict.fromkeys(range(program.shape.microbatches), 0)
    for position, one in enumerate(program.rows[rank]):
        place = (rank, position)
        if one.op == "UPDATE" and one.values == (shared.parameter,):
            complete = {m for m, count in over.items() if count == len(mine)}
            yield from _order(place, one, made, ends, complete)
            if sorted([rank, *(placement[p] if p in shared.stages else rank for p in one.peers)]) != holders:
                yield place, f"{shared.parameter} lives on ranks {holders}; name a stage of each"
            made, last = made + 1, position
        elif one.stage in mine and one.op == "FORWARD":
            version = read[min(shared.stages), one.microbatch]
            if version > made:
                yield place, f"it reads version {version} of {shared.parameter}, of which there are 0 to {made} yet"
        elif one.stage in mine and one.op in LAST:
            over[one.microbatch] += 1
            last = position
    if made < len(ends):
        yield (rank, last), f"{shared.parameter} is not updated on rank {rank} after it"
