"""Lowers a timetable to a program: adds every message between ranks, and the sums of shared parameters' gradients.

All messages get one place in one global order: a message follows the computation that makes its value, and on each of
its two ranks it stands between the computations that the global order has before and after it. So on every channel
sends and receives agree, and even ranks that stop in each message until its other end is there reach the end:

    rank 0   0F0 0SEND_F0>1 0F1            ...      the message of 0F0 is over before anything later in the order begins
    rank 1            1RECV_F0<0  1F0      ...

The order is that of the timetable run with equal costs (a forward 1, each half of a backward 1), messages before
computations of the same time. O(n log n) for n instructions.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipecompile.errors import ProgramError
from pipecompile.ir import Instruction, Partition, Program, Route, Routes, Shared, StageCost, Timetable, Transfer
from pipecompile.passes.verify import verify_compute
from pipecompile.simulate import compute_spans

EQUAL = StageCost(forward_ms=1.0, backward_ms=2.0, weight_ms=1.0, saved_bytes=1)
Event = tuple[float, int, int, int, int, tuple[tuple[int, Instruction], ...]]
"""(time, message 0 or computation 1, three numbers that make the order total, what stands on which rank)."""


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
    events: list[Event] = []
    for one, (start, end) in spans.items():
        rank = placement[one.stage]
        events.append((start, 1, rank, one.stage, one.microbatch, ((rank, one),)))
        for route in _leaving(one, routes, placement):
            events.append(_message(one, route, end, placement))
    rows: list[list[Instruction]] = [[] for _ in timetable.rows]
    for *_, parts in sorted(events, key=lambda event: event[:5]):
        for rank, one in parts:
            rows[rank].append(one)
    for shared in partition.shared:
        for rank, one in _reductions(shared, placement):
            rows[rank].append(one)
    return Program(timetable.schedule, timetable.shape, tuple(map(tuple, rows)))


def _leaving(one: Instruction, routes: Routes, placement: Sequence[int]) -> list[Route]:
    """The routes over which the result of a computation goes to another rank."""
    if one.op == "BACKWARD_WEIGHT":
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


def _reductions(shared: Shared, placement: Sequence[int]) -> list[tuple[int, Instruction]]:
    """One REDUCE_GRAD on each rank that holds the parameter, if there are several, on its first stage that does."""
    first: dict[int, int] = {}
    for stage in sorted(shared.stages):
        first.setdefault(placement[stage], stage)
    if len(first) < 2:
        return []
    return [
        (
            rank,
            Instruction(
                "REDUCE_GRAD",
                stage,
                values=(shared.parameter,),
                peers=tuple(other for other in sorted(first.values()) if other != stage),
            ),
        )
        for rank, stage in first.items()
    ]


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
