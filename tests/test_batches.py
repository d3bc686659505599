"""The order in which a run of messages is begun."""

from __future__ import annotations

import pytest

from pipecompile.ir import COMPUTE, RECEIVES, SENDS, Program, Shape
from pipecompile.ir.batches import as_run
from pipecompile.ir.lifetimes import channel_of, interleave
from pipecompile.passes.communicate import chain, communicate
from pipecompile.passes.schedules import make_timetable
from pipecompile.passes.waits import stuck


def program_of(schedule: str, stages: int, ranks: int, microbatches: int) -> Program:
    return communicate(make_timetable(schedule, Shape(stages, ranks, microbatches)), chain(stages))


def test_a_gradient_is_sent_before_the_next_activation_is_awaited() -> None:
    row = " ".join(map(str, as_run(program_of("1f1b", 2, 2, 3)).rows[1]))
    assert "1B0 1SEND_B0>0 1F1 1B1 1SEND_B1>0 1RECV_F2<0 1F2" in row


@pytest.mark.parametrize(
    ("schedule", "stages"), [("gpipe", 4), ("1f1b", 4), ("zb-h2", 4), ("interleaved-1f1b", 8), ("zb-v", 8)]
)
def test_only_the_order_within_runs_of_messages_changes(schedule: str, stages: int) -> None:
    program = program_of(schedule, stages, 4, 8)
    ran = as_run(program)
    placement = program.shape.placement
    assert ran.rows != program.rows or schedule == "gpipe"
    for row, other in zip(program.rows, ran.rows, strict=True):
        assert sorted(map(str, row)) == sorted(map(str, other))
        places = [place for place, one in enumerate(row) if one.op in COMPUTE]
        assert [(p, row[p]) for p in places] == [(p, other[p]) for p in places]
        messages = [one for one in row if one.op in (*SENDS, *RECEIVES)]
        for channel in {channel_of(one, placement) for one in messages}:
            sent, begun = (
                [one for one in some if one.op in (*SENDS, *RECEIVES) and channel_of(one, placement) == channel]
                for some in (row, other)
            )
            assert sent == begun
    assert len(interleave(ran)) == sum(map(len, program.rows))
    assert not stuck(ran)
