"""A forecast as a trace that Perfetto (ui.perfetto.dev) and chrome://tracing open: a track a rank, arrows for messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipecompile.ir import COMPUTE, RECEIVES, SENDS, Forecast, Program

COMPUTE_TRACK, MESSAGE_TRACK = 0, 1
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
