"""The four rules of a safe program, by example, and every message of a refusal."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from pipecompile.errors import MemoryLimitError, PipecompileError, ProgramError, ScheduleError
from pipecompile.ir import Instruction, Program, Shape, Shared, StageCost
from pipecompile.passes.communicate import chain, communicate
from pipecompile.passes.replicas import for_replicas
from pipecompile.passes.schedules import make_timetable
from pipecompile.passes.verify import verify

ROWS = ("0F0 0SEND_F0>1 0RECV_B0<1 0B0", "1RECV_F0<0 1F0 1B0 1SEND_B0>0")
OPS = {"F": "FORWARD", "B": "BACKWARD", "I": "BACKWARD_INPUT", "W": "BACKWARD_WEIGHT"}


def read(text: str) -> Instruction:
    stage, op, microbatch, peer = re.fullmatch(r"(\d+)([A-Z]_?[A-Z_]*)(\d+)[<>]?(\d*)", text).groups()
    values = ("hidden",) if peer else ()
    return Instruction(OPS.get(op, op), int(stage), int(microbatch), int(peer or -1), values)


def program_of(*rows: str, stages: int = 2) -> Program:
    shape = Shape(stages, len(rows), 1 + max(int(n) for row in rows for n in re.findall(r"F(\d)", row)))
    return Program("test", shape, tuple(tuple(read(word) for word in row.split()) for row in rows))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            ("0F0 0SEND_F0>1 0RECV_B0<1", ROWS[1]),
            "rank 0 has 0F0 for stage 0 and microbatch 0; expected 0F0 and 0B0, or",
        ),
        (("0F0 0F0 0SEND_F0>1 0RECV_B0<1 0B0", ROWS[1]), r"0F0 \(rank 0, instruction 1\): it stands twice, first at"),
        (("0B0 0F0 0SEND_F0>1 0RECV_B0<1", ROWS[1]), r"0B0 \(rank 0, instruction 0\): it stands before 0F0"),
        (("0F0 0SEND_F0>1 0RECV_B0<1 0W0 0I0", ROWS[1]), r"0W0 \(rank 0, instruction 3\): it stands before 0I0"),
        (("0F0 0SEND_F0>1 0RECV_B0<1 0B0 1F0", ROWS[1]), r"1F0 \(rank 0, instruction 4\): stage 1 belongs to rank 1"),
        (("0F0 0SEND_F0>1 0RECV_B0<1 0B0 4F0", ROWS[1]), r"4F0 .*there is no stage 4, only 0 to 1"),
        (("0F0 0SEND_F0>1 0RECV_B0<1 0B0 0B7", ROWS[1]), r"0B7 .*its microbatch is not one of 0 to 0"),
        (("0F0 0RECV_B0<1 0B0", ROWS[1]), "0SEND_F0>1 is missing on rank 0; 0F0 needs it"),
        ((ROWS[0], "1F0 1RECV_F0<0 1B0 1SEND_B0>0"), r"1RECV_F0<0 \(rank 1, instruction 1\): 1F0 uses it before it is"),
        (("0SEND_F0>1 0F0 0RECV_B0<1 0B0", ROWS[1]), r"0SEND_F0>1 \(rank 0, instruction 0\): it sends what 0F0 makes"),
        ((ROWS[0] + " 0SEND_B0>1", ROWS[1]), r"0SEND_B0>1 .*nothing is to be sent between these stages; remove it"),
        (("0F0 0SEND_F0>1 0B0 0RECV_B0<1", ROWS[1]), r"0RECV_B0<1 .*0B0 uses it before it is received"),
        (
            ("0F0 0F1 0SEND_F1>1 0SEND_F0>1 0B0 0B1", "1RECV_F0<0 1F0 1RECV_F1<0 1F1 1B0 1B1"),
            r"0SEND_F1>1 .*on the channel from rank 0 to rank 1 it meets 1RECV_F0<0; send and receive in the same order",
        ),
        (
            ("0F0 0SEND_F0>1 0F1 0SEND_F1>1 0RECV_B0<1 0B0 0RECV_B1<1 0B1", "1RECV_F0<0 1F0 1B0 1SEND_B0>0 1RECV_F1<0"),
            "rank 1 has nothing for stage 1 and microbatch 1",
        ),
    ],
)
def test_messages_of_refusals(rows, words):
    partition = chain(2, gradient_bytes=0) if "in the same order" in words else chain(2)
    with pytest.raises(ProgramError, match=words):
        verify(program_of(*rows), partition)


def test_a_computation_cannot_be_hidden_behind_a_peer():
    program = program_of(*ROWS)
    again = replace(program.rows[0][0], peer=1)
    with pytest.raises(ProgramError, match=r"0F0 \(rank 0, instruction 1\): a computation has no peer"):
        verify(replace(program, rows=((program.rows[0][0], again, *program.rows[0][1:]), program.rows[1])), chain(2))


def test_the_naive_order_of_1f1b_waits_for_ever():
    rows = (
        "0F0 0SEND_F0>1 0F1 0SEND_F1>1 0RECV_B0<1 0B0 0RECV_B1<1 0B1",
        "1RECV_F0<0 1F0 1B0 1SEND_B0>0 1F1 1B1 1SEND_B1>0",
    )
    late = rows[1].replace("1SEND_B0>0 1F1", "1SEND_B0>0 1RECV_F1<0 1F1")
    verify(program_of(rows[0], late), chain(2))
    apart = (rows[0].replace("0F1 0SEND_F1>1 0RECV_B0<1 0B0", "0RECV_B0<1 0B0 0F1 0SEND_F1>1"), late)
    verify(program_of(*apart), chain(2))
    early = rows[1].replace("1RECV_F0<0 1F0 1B0", "1RECV_F0<0 1RECV_F1<0 1F0 1B0")
    with pytest.raises(
        ProgramError, match=r"0RECV_B0<1 \(rank 0.*waits for ever, as does rank 1 in 1RECV_F1<0; move one"
    ):
        verify(program_of(apart[0], early), chain(2))


def test_wrong_values_and_own_order():
    program = program_of(*ROWS)
    rows = (tuple(replace(one, values=("x",)) if one.peer >= 0 else one for one in program.rows[0]), program.rows[1])
    with pytest.raises(ProgramError, match=r"0SEND_F0>1 .*carries the wrong values; expected hidden"):
        verify(replace(program, rows=rows), chain(2))
    with pytest.raises(ProgramError, match=r"1F0 \(rank 0, instruction 0\): it reads what 0F0 makes later"):
        verify(program_of("1F0 0F0 1B0 0B0"), chain(2))


def test_reductions():
    partition = chain(2, shared=(Shared("w", (0, 1)),))
    program = communicate(make_timetable("1f1b", Shape(2, 2, 1)), partition)
    first, second = program.rows
    with pytest.raises(ProgramError, match="REDUCE_GRAD of w is missing on rank 1; every rank that holds it sums it"):
        verify(replace(program, rows=(first, second[:-1])), partition)
    with pytest.raises(ProgramError, match="w still gets a gradient from 0B0; move it behind"):
        verify(replace(program, rows=((*first[:-2], first[-1], first[-2]), second)), partition)
    with pytest.raises(ProgramError, match=r"w lives on ranks \[0, 1\]; name a stage of each"):
        verify(replace(program, rows=((*first[:-1], replace(first[-1], peers=())), second)), partition)
    with pytest.raises(ProgramError, match="x is not to be summed here"):
        verify(replace(program, rows=((*first[:-1], replace(first[-1], values=("x",))), second)), partition)


def test_sums_over_replicas():
    partition = chain(2)
    program = for_replicas(communicate(make_timetable("1f1b", Shape(2, 2, 1)), partition), 2)
    first, second = program.rows
    assert str(program) == (
        "0F0 0SEND_F0>1 0RECV_B0<1 0B0 0REDUCE_REPLICAS\n1RECV_F0<0 1F0 1B0 1SEND_B0>0 1REDUCE_REPLICAS"
    )
    assert Program.from_json(program.to_json()) == verify(program, partition)
    with pytest.raises(ProgramError, match="1REDUCE_REPLICAS is missing on rank 1; each stage is summed, or none is"):
        verify(replace(program, rows=(first, second[:-1])), partition)
    with pytest.raises(
        ProgramError, match=r"0REDUCE_REPLICAS \(rank 0, instruction 3\): the stage still makes gradients"
    ):
        verify(replace(program, rows=((*first[:-2], first[-1], first[-2]), second)), partition)
    with pytest.raises(ProgramError, match=r"0REDUCE_REPLICAS .*stands twice, first at instruction 4"):
        verify(replace(program, rows=((*first, first[-1]), second)), partition)
    with pytest.raises(ScheduleError, match="replicas is 0, expected at least 1"):
        for_replicas(program, 0)


def test_another_number_of_stages():
    with pytest.raises(
        ProgramError, match="2 rows for 2 ranks and 2 stages, the partition 3 stages; compile both again"
    ):
        verify(program_of(*ROWS), chain(3))


def test_memory_limits():
    costs = [StageCost(1, 2, 1, parameter_bytes=100, trainable_bytes=100, saved_bytes=10)] * 2
    partition = chain(2, costs, bytes=0, gradient_bytes=0)
    program = communicate(make_timetable("gpipe", Shape(2, 2, 4)), partition)
    verify(program, partition, limits=(440, 440))
    with pytest.raises(
        MemoryLimitError, match=r"1F3 \(rank 1.*holds 440 bytes here \(400 .*1 more than its limit of 439; use"
    ):
        verify(program, partition, limits=(440, 439))
    with pytest.raises(PipecompileError, match="1 memory limits for 2 ranks; give one for each rank"):
        verify(program, partition, limits=(440,))
