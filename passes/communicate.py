"""Lowers a timetable to a program: adds every message between ranks, and the sums of shared parameters' gradients.

All messages get one place in one global order: a message follows the computation that makes its value, and on each of
its two ranks it stands between the computations that the global order has before and after it. So on every channel
sends and receives agree, and even ranks that stop in each message until its other end is there reach the end:

    rank 0   0F0 0SEND_F0>1 0F1            ...      the message of 0F0 is over before anything later in the order begins
    rank 1            1RECV_F0<0  1F0      ...

Where weights are updated inside the step, a shared parameter is updated on all its ranks at once, as soon as the last of
its gradients is there; that too has one place in the global order.

The order is that of the timetable run with equal costs (a forward 1, each half of a backward 1), messages before
computations of the same time. O(n log n) for n instructions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from pipecompile.errors import ProgramError
from pipecompile.ir import Instruction, Partition, Program, Route, Routes, Shared, StageCost, Timetable, Transfer
from pipecompile.ir.versions import group_ends, members, updates
from pipecompile.passes.verify import verify_compute
from pipecompile.simulate import AFTER_BACKWARD, compute_spans

EQUAL = StageCost(forward_ms=1.0, backward_ms=2.0, weight_ms=1.0, saved_bytes=1)
Event = tuple[float, int, int, int, int, tuple[tuple[int, Instruction], ...]]
"""(time, message 0, shared update 1 or computation 2, three numbers that make the order total, what stands where)."""


def communicate(timetable: Timetable, partition: Partition) -> Program:
    """The program of ``timetable`` for ``partition``; ProgramError if the compute order is not complete or cannot run."""
    if partition.stages != timetable.shape.stages:
        raise ProgramError(
            f"a timetable for {timetable.shape.stages} stages does not fit a partition into {partition.stages}; "
            "compile both again"
        )
    routes = Routes.of(partition)
    placement = verify_compute(timetable).shape.placement
    spans = compute_spans(timetable.rows, routes, (EQUAL,) * timetable.shape.stages)
    position = {one: place for row in timetable.rows for place, one in enumerate(row)}
    events: list[Event] = []
    for one, (start, end) in spans.items():
        rank = placement[one.stage]
        events.append((start, 2, rank, position[one], 0, ((rank, one),)))
        for route in _leaving(one, routes, placement):
            events.append(_message(one, route, end, placement))
    events += _shared_updates(timetable, partition, spans)
    rows: list[list[Instruction]] = [[] for _ in timetable.rows]
    for *_, parts in sorted(events, key=lambda event: event[:5]):
        for rank, one in parts:
            rows[rank].append(one)
    for shared in () if updates(timetable.rows) else partition.shared:
        for rank, one in _everywhere("REDUCE_GRAD", shared, placement):
            rows[rank].append(one)
    return Program(timetable.schedule, timetable.shape, tuple(map(tuple, rows)))


def _leaving(one: Instruction, routes: Routes, placement: Sequence[int]) -> list[Route]:
    """The routes over which the result of a computation goes to another rank."""
    if one.op in AFTER_BACKWARD:
        return []
    mine = (r for r in routes.routes if placement[r.source] != placement[r.target])
    if one.op == "FORWARD":
        return [r for r in mine if r.source == one.stage]
    return [r for r in mine if r.target == one.stage and r.gradients]


def _message(one: Instruction, route: Route, time: float, placement: Sequence[int]) -> Event:
    m = one.microbatch
    if one.op == "FORWARD":
        letter, here, there, values = "F", route.source, route.target, route.values
    else:
        letter, here, there, values = "B", route.target, route.source, route.gradients
    send = Instruction(f"SEND_{letter}", here, m, peer=there, values=values)
    receive = Instruction(f"RECV_{letter}", there, m, peer=here, values=values)
    return time, 0, here, there, m, ((placement[here], send), (placement[there], receive))


def _shared_updates(
    timetable: Timetable, partition: Partition, spans: Mapping[Instruction, tuple[float, float]]
) -> Iterator[Event]:
    """The updates of shared parameters, each when the last backward of its group is over on all its stages."""
    over: dict[tuple[int, int], float] = {}
    for one, (_, end) in spans.items():
        if one.op.startswith("BACKWARD"):
            over[one.stage, one.microbatch] = max(end, over.get((one.stage, one.microbatch), 0.0))
    ends = group_ends(timetable.rows)
    for index, shared in enumerate(partition.shared):
        for group, last in enumerate(ends):
            time = max(over[stage, m] for stage in shared.stages for m in members(ends, group))
            parts = _everywhere("UPDATE", shared, timetable.shape.placement, last, group + 1)
            yield time, 1, group, index, 0, parts


def _everywhere(
    op: str, shared: Shared, placement: Sequence[int], microbatch: int = -1, version: int = -1
) -> tuple[tuple[int, Instruction], ...]:
    """One instruction on each rank that holds the parameter, on its first stage that does; no sum over one rank."""
    first: dict[int, int] = {}
    for stage in sorted(shared.stages):
        first.setdefault(placement[stage], stage)
    if op == "REDUCE_GRAD" and len(first) < 2:
        return ()
    found = []
    for rank, stage in first.items():
        peers = tuple(other for other in sorted(first.values()) if other != stage)
        found.append((rank, Instruction(op, stage, microbatch, -1, (shared.parameter,), peers, version)))
    return tuple(found)


def chain(
    stages: int,
    costs: Sequence[StageCost] | None = None,
    bytes: int = 1,
    gradient_bytes: int = 1,
    shared: Sequence[Shared] = (),
) -> Partition:
    """The partition of a plain chain, one value "hidden" from each stage to the next, to print programs without a model."""
    return Partition(
        graph="chain",
        stages=stages,
        stage=tuple(range(stages)),
        costs=tuple(costs) if costs is not None else (EQUAL,) * stages,
        transfers=tuple(Transfer("hidden", s, s + 1, bytes, gradient_bytes) for s in range(stages - 1)),
        shared=tuple(shared),
    )
