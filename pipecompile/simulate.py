"""When every instruction of a program runs, how long the step takes and how much memory it needs, from costs alone.

A rank computes in the order of its row, each instruction as soon as its inputs are there. Messages leave when their
value is made, one at a time on each channel (source rank, target rank, direction), and take ``bytes / bytes_per_ms``
of the channel and ``latency_ms`` more to arrive; with ``overlap`` off, both ranks stand still meanwhile. A gradient
reduction is a ring over its ranks in all replicas, which all wait for the last one; one of a stage over replicas goes on
while the rank computes, one after another, and the step ends when it has. An update inside the step waits for the stage's
sum over replicas and takes the rank's optimizer time; of a shared parameter, the reduction's. (A ring of n moves 2(n-1)
messages of 1/n of the bytes: Patarasuk and Yuan 2009.) O(instructions).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pipecompile.errors import ProgramError
from pipecompile.ir import COMPUTE, RECEIVES, SENDS, Forecast, Instruction, Partition, Program, Routes, Span, StageCost
from pipecompile.ir.versions import updates
from pipecompile.memory import ADAM, peak_bytes

Rows = Sequence[Sequence[Instruction]]
AFTER_BACKWARD = ("BACKWARD_WEIGHT", "UPDATE")
Key = tuple[str, int, int]
"""What a rank has finished: ("F" or "B", stage, microbatch); "B" is the backward, or its input half if it is split."""


@dataclass(frozen=True, slots=True)
class Link:
    """The way between any two ranks, in each direction; ``overlap``: messages travel while the ranks compute."""

    latency_ms: float = 0.0
    bytes_per_ms: float = math.inf
    overlap: bool = True

    def occupied_ms(self, size: int) -> float:
        return size / self.bytes_per_ms


def cost_ms(instruction: Instruction, costs: Sequence[StageCost]) -> float:
    """Milliseconds of a compute instruction; the whole backward is its input half and its weight half together.

    An update takes no time here: what an optimizer needs is no cost of a stage.
    """
    cost = costs[instruction.stage]
    for use in cost.uses:
        if use.ms is not None and use.op == instruction.op and use.first == (instruction.microbatch == 0):
            return use.ms
    return {
        "UPDATE": 0.0,
        "FORWARD": cost.forward_ms,
        "BACKWARD": cost.backward_ms,
        "BACKWARD_INPUT": cost.backward_ms - cost.weight_ms,
        "BACKWARD_WEIGHT": cost.weight_ms,
    }[instruction.op]


def copy_ms(send: Instruction, costs: Sequence[StageCost]) -> float:
    """Milliseconds that each end of a message is busy with copying it, if that was seen."""
    uses = costs[send.stage].uses
    return next((use.ms or 0.0 for use in uses if (use.op, use.peer, use.first) == (send.op, send.peer, False)), 0.0)


def needs(instruction: Instruction, routes: Routes) -> tuple[tuple[Key, int], ...]:
    """What a compute instruction waits for: the key of what is finished, and the stage that makes it."""
    stage, m = instruction.stage, instruction.microbatch
    if instruction.op == "FORWARD":
        return tuple((("F", r.source, m), r.source) for r in routes.into(stage))
    if instruction.op in AFTER_BACKWARD:
        return ((("B", stage, m), stage),)
    return (("F", stage, m), stage), *((("B", r.target, m), r.target) for r in routes.back(stage))


def _letter(instruction: Instruction) -> str:
    return "F" if instruction.op == "FORWARD" else "B"


def walk(rows: Rows, step: Callable[[int, int, Instruction], bool]) -> tuple[int, ...]:
    """Offer each rank's next instruction to ``step`` until all are taken, or none is; the positions reached.

    ``step(rank, position, instruction)`` says False as long as the instruction has to wait for another rank.
    """
    at = [0] * len(rows)
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(rows):
            while at[rank] < len(row) and step(rank, at[rank], row[at[rank]]):
                at[rank] += 1
                moved = True
    return tuple(at)


def stuck(rows: Rows, reached: Sequence[int]) -> str:
    """Which instruction each rank waits in, for an error's text; empty if every row was finished."""
    waiting = [f"rank {r} in {row[at]}" for r, (row, at) in enumerate(zip(rows, reached)) if at < len(row)]
    return ", ".join(waiting)


def compute_spans(rows: Rows, routes: Routes, costs: Sequence[StageCost]) -> Mapping[Instruction, tuple[float, float]]:
    """Start and end of each compute instruction when messages take no time; ProgramError if the ranks wait in a ring."""
    clock = [0.0] * len(rows)
    finished: dict[Key, float] = {}
    spans: dict[Instruction, tuple[float, float]] = {}

    def step(rank: int, position: int, one: Instruction) -> bool:
        before = [finished.get(key) for key, _ in needs(one, routes)]
        if None in before:
            return False
        start = max([clock[rank], *(time for time in before if time is not None)])
        clock[rank] = start + cost_ms(one, costs)
        spans[one] = (start, clock[rank])
        if one.op not in AFTER_BACKWARD:
            finished[_letter(one), one.stage, one.microbatch] = clock[rank]
        return True

    waiting = stuck(rows, walk(rows, step))
    if waiting:
        raise ProgramError(f"the compute order cannot run, every rank waits for another: {waiting}; reorder them")
    return spans


Message = tuple[str, int, int, int]
"""A message by its receive: (op, stage, peer, microbatch)."""


@dataclass(slots=True)
class _State:
    """How far a simulated step has come."""

    program: Program
    costs: Sequence[StageCost]
    routes: Routes
    sizes: Mapping[str, int]
    link: Link
    clock: list[float]
    busy: list[float]
    finished: dict[Key, float] = field(default_factory=dict)
    optimizer_ms: Sequence[float] = ()
    messages: dict[Message, tuple[float, float]] = field(default_factory=dict)
    channel: dict[tuple[int, int, str], float] = field(default_factory=dict)
    waiting: dict[tuple[str, int], dict[int, float]] = field(default_factory=dict)
    spans: dict[tuple[int, int], tuple[float, float]] = field(default_factory=dict)
    replicas: int = 1
    summed: dict[int, float] = field(default_factory=dict)
    summed_apart: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def step(self, rank: int, position: int, one: Instruction) -> bool:
        span = self.run(rank, one)
        if span is None:
            return False
        self.spans[rank, position] = span
        return True

    def run(self, rank: int, one: Instruction) -> tuple[float, float] | None:
        if one.op in COMPUTE:
            return self.compute(rank, one)
        if one.op in SENDS:
            return self.send(rank, one)
        if one.op in RECEIVES:
            return self.receive(rank, one)
        if one.op == "UPDATE" and not one.values:
            return self.update(rank, one)
        return self.reduce_replicas(rank, one) if one.op == "REDUCE_REPLICAS" else self.reduce(rank, one)

    def update(self, rank: int, one: Instruction) -> tuple[float, float]:
        start = self.clock[rank]
        took = self.optimizer_ms[rank]
        self.clock[rank] += self.ring_ms(self.own_bytes(one.stage), self.replicas) + took
        self.busy[rank] += took
        return start, self.clock[rank]

    def ring_ms(self, size: int, processes: int) -> float:
        """Milliseconds of a sum over so many processes, which all have ``size`` bytes."""
        return 2 * (processes - 1) * (self.link.occupied_ms(size) / processes + self.link.latency_ms)

    def own_bytes(self, stage: int) -> int:
        """A stage's gradients that are summed with no other stage's."""
        shared = sum(size for name, size in self.sizes.items() if stage in self.summed_apart.get(name, ()))
        return max(0, self.costs[stage].trainable_bytes - shared)

    def compute(self, rank: int, one: Instruction) -> tuple[float, float] | None:
        start = self.clock[rank]
        for (letter, stage, microbatch), _ in needs(one, self.routes):
            if self.program.shape.placement[stage] == rank:
                time = self.finished.get((letter, stage, microbatch))
            else:
                span = self.messages.get((f"RECV_{letter}", one.stage, stage, microbatch))
                time = span[1] if span else None
            if time is None:
                return None
            start = max(start, time)
        end = start + cost_ms(one, self.costs)
        self.clock[rank] = end
        self.busy[rank] += end - start
        if one.op not in AFTER_BACKWARD:
            self.finished[_letter(one), one.stage, one.microbatch] = end
        return start, end

    def send(self, rank: int, one: Instruction) -> tuple[float, float]:
        letter = one.op[-1]
        self.clock[rank] += copy_ms(one, self.costs)
        channel = (rank, self.program.shape.placement[one.peer], letter)
        start = max(self.clock[rank], self.channel.get(channel, 0.0))
        free = start + self.link.occupied_ms(self.size(one))
        self.channel[channel] = free
        span = (start, free + self.link.latency_ms)
        self.messages[f"RECV_{letter}", one.peer, one.stage, one.microbatch] = span
        if not self.link.overlap:
            self.clock[rank] = span[1]
        return span

    def size(self, one: Instruction) -> int:
        ends = (one.stage, one.peer) if one.op == "SEND_F" else (one.peer, one.stage)
        found = [r for r in self.routes.routes if (r.source, r.target) == ends]
        return sum(r.bytes if one.op == "SEND_F" else r.gradient_bytes for r in found)

    def receive(self, rank: int, one: Instruction) -> tuple[float, float] | None:
        copying = copy_ms(replace(one, op=f"SEND_{one.op[-1]}", stage=one.peer, peer=one.stage), self.costs)
        if self.link.overlap and not copying:
            return self.clock[rank], self.clock[rank]
        span = self.messages.get((one.op, one.stage, one.peer, one.microbatch))
        if span is not None:
            self.clock[rank] = max(self.clock[rank], span[1]) + copying
        return span

    def reduce(self, rank: int, one: Instruction) -> tuple[float, float] | None:
        """A ring over the ranks of the parameter, in all replicas."""
        name = one.values[0]
        here = self.waiting.setdefault((name, one.version), {})
        here.setdefault(rank, self.clock[rank])
        count = len(one.peers) + 1
        if len(here) < count:
            return None
        start = max(here.values())
        self.clock[rank] = start + self.ring_ms(self.sizes.get(name, 0), count * self.replicas)
        return start, self.clock[rank]

    def reduce_replicas(self, rank: int, one: Instruction) -> tuple[float, float]:
        """A ring over the replicas of this rank, which come here at the same time."""
        start = max(self.clock[rank], self.summed.get(rank, 0.0))
        self.summed[rank] = start + self.ring_ms(self.own_bytes(one.stage), self.replicas)
        if not self.link.overlap:
            self.clock[rank] = self.summed[rank]
        return start, self.summed[rank]


def simulate(
    program: Program,
    partition: Partition,
    link: Link | None = None,
    optimizer_factor: float = ADAM,
    optimizer_ms: Sequence[float] = (),
    replicas: int = 1,
) -> Forecast:
    """Forecast a step: its time, each rank's busy time and peak memory (an upper bound), and when everything runs.

    ``optimizer_factor`` is the optimizer's state as a factor of the trainable bytes, ``optimizer_ms`` what each rank's
    optimizer step takes after its row, or each update in it, ``replicas`` how many run the program beside each other.
    ProgramError names who waits if the program cannot run to its end.
    """
    ranks = program.shape.ranks
    sizes = {shared.parameter: shared.bytes for shared in partition.shared}
    apart = {one.values[0] for row in program.rows for one in row if one.op in ("REDUCE_GRAD", "UPDATE") and one.values}
    after = optimizer_ms or [0.0] * ranks
    state = _State(
        program,
        partition.costs,
        Routes.of(partition),
        sizes,
        link or Link(),
        clock=[0.0] * ranks,
        busy=[0.0] * ranks,
        replicas=replicas,
        optimizer_ms=after,
        summed_apart={shared.parameter: shared.stages for shared in partition.shared if shared.parameter in apart},
    )
    waiting = stuck(program.rows, walk(program.rows, state.step))
    if waiting:
        raise ProgramError(f"the program cannot run to its end: {waiting} wait for ever; verify it to see why")
    for rank, row in enumerate(program.rows):
        for position, one in enumerate(row):
            if one.op in RECEIVES:
                key = (one.op, one.stage, one.peer, one.microbatch)
                state.spans[rank, position] = state.messages.get(key, state.spans[rank, position])
    if updates(program.rows):
        after = [0.0] * ranks
    ready = [max(time, state.summed.get(rank, 0.0)) for rank, time in enumerate(state.clock)]
    ends = [time + optimizer for time, optimizer in zip(ready, after)]
    busy = [time + optimizer for time, optimizer in zip(state.busy, after)]
    return Forecast(
        step_ms=max(ends),
        busy_ms=tuple(busy),
        peak_bytes=peak_bytes(program, partition, optimizer_factor),
        spans=tuple(Span(rank, position, *span) for (rank, position), span in sorted(state.spans.items())),
    )
