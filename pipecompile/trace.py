"""A forecast, and what ran, as traces that Perfetto (ui.perfetto.dev) and chrome://tracing open."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipecompile.ir import COMPUTE, RECEIVES, SENDS, Forecast, Instruction, Program

COMPUTE_TRACK, MESSAGE_TRACK = 0, 1
PLANNED_TRACK, RAN_TRACK = 0, 1
US = 1000.0
"""Microseconds in a millisecond: traces count in microseconds."""


def chrome_trace(program: Program, forecast: Forecast, memory: Sequence[Sequence[int]] = ()) -> dict[str, Any]:
    """The trace as JSON: a process for each rank, with its computations on one track and its messages on another.

    ``memory`` are bytes at each instruction of each row (``memory_over_time``): a third track.
    """
    events: list[dict[str, Any]] = []
    for rank in range(program.shape.ranks):
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}})
        for track, name in ((COMPUTE_TRACK, "computations"), (MESSAGE_TRACK, "messages")):
            events.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": track, "args": {"name": name}})
    for span in forecast.spans:
        one = program.rows[span.rank][span.position]
        track = COMPUTE_TRACK if one.op in COMPUTE else MESSAGE_TRACK
        place = {"pid": span.rank, "tid": track}
        start, length = span.start_ms * US, (span.end_ms - span.start_ms) * US
        events.append(
            {
                "ph": "X",
                "name": str(one),
                "cat": one.op,
                **place,
                "ts": start,
                "dur": length,
                "args": one.to_json(),
            }
        )
        if memory and one.op in COMPUTE:
            held = {"bytes": memory[span.rank][span.position]}
            events.append({"ph": "C", "name": "memory", "pid": span.rank, "ts": start, "args": held})
        if one.op in SENDS:
            name = f"{one.op[-1]}{one.microbatch} {one.stage}>{one.peer}"
            events.append({"ph": "s", "id": name, "name": name, "cat": "message", **place, "ts": start})
        elif one.op in RECEIVES:
            name = f"{one.op[-1]}{one.microbatch} {one.peer}>{one.stage}"
            event = {"ph": "f", "bp": "e", "id": name, "name": name, "cat": "message", **place, "ts": start + length}
            events.append(event)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


Ran = tuple[Instruction, float, float]
"""An instruction, and when it began and ended, in milliseconds from the start of the step."""


def run_trace(program: Program, planned: Forecast, ran: Sequence[Sequence[Ran]]) -> dict[str, Any]:
    """What was planned beside what ran: a process for each rank, with the planned computations on one track and the
    instructions of ``ran`` (by rank) on the other, where a receive lasts as long as the rank waits for its message."""
    events: list[dict[str, Any]] = []
    for rank in range(program.shape.ranks):
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}})
        for track, name in ((PLANNED_TRACK, "planned"), (RAN_TRACK, "ran")):
            events.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": track, "args": {"name": name}})
    for span in planned.spans:
        one = program.rows[span.rank][span.position]
        if one.op not in (*SENDS, *RECEIVES):
            events.append(_whole(one, span.rank, PLANNED_TRACK, span.start_ms, span.end_ms))
    for rank, row in enumerate(ran):
        events += [_whole(one, rank, RAN_TRACK, start, end) for one, start, end in row]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _whole(one: Instruction, rank: int, track: int, start_ms: float, end_ms: float) -> dict[str, Any]:
    place = {"pid": rank, "tid": track, "ts": start_ms * US, "dur": (end_ms - start_ms) * US}
    return {"ph": "X", "name": str(one), "cat": one.op, **place, "args": one.to_json()}
