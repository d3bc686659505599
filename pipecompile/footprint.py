"""How much memory each rank holds while its row runs, where its stages were weighed: what ``uses`` add up to.

    always      parameters, buffers, optimizer state, the batch; a place for every message that may be under way at once,
                for the next receives posted ahead, and for what an instruction takes while it runs
    FORWARD     + saved activations and outputs        SEND   - the output or gradient, unless something saved it
    RECV        + the message                          BACKWARD   - all of these, + gradients of parameters

Parameters have no gradients when a step begins (``zero_grad``'s default), and what a value that stays on its rank takes is
counted as if it were sent. O(instructions).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property

from pipecompile.errors import CostError
from pipecompile.ir import AFTER_HALF, COMPUTE, RECEIVES, SENDS, Instruction, Partition, Program, Route, Routes, Use
from pipecompile.ir.batches import as_run
from pipecompile.ir.lifetimes import Channel, arrivals, channel_of, most_on_the_way

AHEAD = 2
"""Receives that the runtime posts ahead on a channel, at least."""


def weighed(partition: Partition) -> bool:
    """Whether every stage has been run."""
    return all(cost.uses for cost in partition.costs)


@dataclass(frozen=True)
class Footprint:
    """A program's memory: ``lines`` gives the most bytes that each rank holds during each instruction."""

    program: Program
    partition: Partition
    optimizer_factor: float

    def lines(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(peak for peak, _ in walked) for walked in self._walks())

    def peaks(self) -> tuple[int, ...]:
        """The most that each rank holds, its optimizer's step after the row included."""
        found = []
        for rank, walked in enumerate(self._walks()):
            step = walked[-1][1] + (self._hold(rank, "peak") if self.optimizer_factor else 0)
            found.append(max(step, *(peak for peak, _ in walked)))
        return tuple(found)

    def _walks(self) -> list[list[tuple[int, int]]]:
        program = as_run(self.program)
        under_way = most_on_the_way(program, arrivals(program))
        ranks = range(self.program.shape.ranks)
        return [list(self._walk(rank, self._standing(rank) + self._places(rank, under_way))) for rank in ranks]

    def _hold(self, rank: int, what: str) -> int:
        """Bytes of the rank's stages: held, or taken by the optimizer's step."""
        return sum(
            getattr(use, what)
            for s in self.program.shape.stages_of(rank)
            for use in self.partition.costs[s].uses
            if use.op == "HOLD"
        )

    def _standing(self, rank: int) -> int:
        mine = self.program.shape.stages_of(rank)
        state = sum(int(self.partition.costs[s].trainable_bytes * self.optimizer_factor) for s in mine)
        masters = sum(self.partition.costs[s].master_bytes for s in mine)
        state += masters + int(masters / 2 * self.optimizer_factor)  # state is twice as wide
        batch, libraries = (
            max((use.after for s in mine for use in self.partition.costs[s].uses if use.op == op), default=0)
            for op in ("BATCH", "LIBRARIES")
        )
        return self._hold(rank, "after") + state + libraries + batch * self.program.shape.microbatches

    def _places(self, rank: int, under_way: Mapping[Channel, int]) -> int:
        """Room for messages: those sent and not known to have arrived, and those that are received next."""
        size: dict[Channel, int] = {}
        count: dict[Channel, int] = {}
        for one in self.program.rows[rank]:
            if one.op in (*SENDS, *RECEIVES):
                channel = channel_of(one, self.program.shape.placement)
                size[channel] = max(size.get(channel, 0), _message_bytes(one, self._routes))
                count[channel] = count.get(channel, 0) + 1
        total = 0
        for channel, largest in size.items():
            ahead = min(count[channel], max(AHEAD, self._ahead // max(largest, 1)))
            total += largest * (under_way[channel] if channel[0] == rank else ahead)
        return total

    @cached_property
    def _ahead(self) -> int:
        """Bytes of receives that may be posted ahead on a channel."""
        return max((use.after for cost in self.partition.costs for use in cost.uses if use.op == "AHEAD"), default=0)

    @cached_property
    def _routes(self) -> Mapping[tuple[int, int], Route]:
        return {(r.source, r.target): r for r in Routes.of(self.partition).routes}

    def _walk(self, rank: int, held: int) -> Iterator[tuple[int, int]]:
        """The most bytes held during each instruction of the row, and those held after it."""
        routes, placement = self._routes, self.program.shape.placement
        uses = {
            (s, use.op, use.first, use.peer): use
            for s in self.program.shape.stages_of(rank)
            for use in self.partition.costs[s].uses
        }
        split = {(one.stage, one.microbatch) for one in self.program.rows[rank] if one.op == "BACKWARD_INPUT"}
        begun: set[tuple[int, str]] = set()
        for one in self.program.rows[rank]:
            peak = 0
            first = (one.stage, one.op) not in begun
            if one.op in COMPUTE:
                begun.add((one.stage, one.op))
                for send, receive in _local(one, routes.values(), placement):
                    held += _use(uses, send, first, split).after + _message_bytes(receive, routes)
                use = _use(uses, one, first, split)
                peak, after = use.peak, use.after
            elif one.op in SENDS:
                after = _use(uses, one, first, split).after
            else:
                after = _message_bytes(one, routes) if one.op in RECEIVES else 0
            yield held + max(peak, after, 0), held + after
            held += after


def _use(
    uses: Mapping[tuple[int, str, bool, int], Use], one: Instruction, first: bool, split: Set[tuple[int, int]]
) -> Use:
    """What was seen of an instruction; ``split`` are the (stage, microbatch) whose backward comes in halves."""
    peer = one.peer if one.op in SENDS else -1
    op = AFTER_HALF if one.op == "SEND_B" and (one.stage, one.microbatch) in split else one.op
    found = uses.get((one.stage, op, first, peer)) or uses.get((one.stage, op, not first, peer))
    if found is None:
        raise CostError(
            f"nothing says what {one} takes; plan.json has no {op} among the uses of stage {one.stage}: compile again"
        )
    return found


def _local(
    one: Instruction, routes: Iterable[Route], placement: Sequence[int]
) -> Iterator[tuple[Instruction, Instruction]]:
    """The sends and receives that a computation's values would need if they had not been made on its own rank."""
    if one.op == "BACKWARD_WEIGHT":
        return
    for r in routes:
        if placement[r.source] != placement[r.target]:
            continue
        if one.op == "FORWARD" and r.target == one.stage:
            yield (
                Instruction("SEND_F", r.source, one.microbatch, r.target),
                Instruction("RECV_F", r.target, one.microbatch, r.source),
            )
        elif one.op != "FORWARD" and r.source == one.stage and r.gradients:
            yield (
                Instruction("SEND_B", r.target, one.microbatch, r.source),
                Instruction("RECV_B", r.source, one.microbatch, r.target),
            )


def _message_bytes(one: Instruction, routes: Mapping[tuple[int, int], Route]) -> int:
    """Bytes of a SEND or RECV."""
    low, high = min(one.stage, one.peer), max(one.stage, one.peer)
    return routes[low, high].bytes if one.op[-1] == "F" else routes[low, high].gradient_bytes
