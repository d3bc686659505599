"""Messages for every kind of partition: chains, skips, several consumers, one rank's own stages, shared parameters."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipecompile.errors import ProgramError
from pipecompile.ir import Instruction, Partition, Shape, Shared, StageCost, Timetable, Transfer
from pipecompile.passes.communicate import chain, communicate
from pipecompile.passes.schedules import make_timetable
from pipecompile.passes.verify import verify


def partition_of(stages: int, *transfers: Transfer, shared: tuple[Shared, ...] = ()) -> Partition:
    cost = StageCost(1.0, 2.0, 1.0, saved_bytes=10)
    return Partition("test", stages, tuple(range(stages)), (cost,) * stages, transfers, shared)


def test_chain_of_two():
    program = communicate(make_timetable("1f1b", Shape(2, 2, 2)), chain(2))
    assert str(program) == (
        "0F0 0SEND_F0>1 0F1 0SEND_F1>1 0RECV_B0<1 0B0 0RECV_B1<1 0B1\n"
        "1RECV_F0<0 1F0 1RECV_F1<0 1B0 1SEND_B0>0 1F1 1B1 1SEND_B1>0"
    )
    assert program.rows[0][1].values == ("hidden",)


def test_a_skip_goes_straight_to_each_consumer_and_several_values_share_a_message():
    partition = partition_of(
        3,
        Transfer("x", 0, 1, 4, 4),
        Transfer("skip", 0, 2, 8, 8),
        Transfer("mask", 0, 2, 1, 0),
        Transfer("y", 1, 2, 4, 4),
    )
    program = verify(communicate(make_timetable("gpipe", Shape(3, 3, 1)), partition), partition)
    assert str(program) == (
        "0F0 0SEND_F0>1 0SEND_F0>2 0RECV_B0<2 0RECV_B0<1 0B0\n"
        "1RECV_F0<0 1F0 1SEND_F0>2 1RECV_B0<2 1B0 1SEND_B0>0\n"
        "2RECV_F0<0 2RECV_F0<1 2F0 2B0 2SEND_B0>0 2SEND_B0>1"
    )
    assert program.rows[0][2].values == ("skip", "mask")
    assert program.rows[0][3].values == ("skip",)


def test_no_gradient_no_message_back():
    partition = partition_of(2, Transfer("mask", 0, 1, 1, 0))
    program = verify(communicate(make_timetable("1f1b", Shape(2, 2, 1)), partition), partition)
    assert str(program) == "0F0 0SEND_F0>1 0B0\n1RECV_F0<0 1F0 1B0"


def test_stages_of_one_rank_need_no_message():
    rows = ("0F0 1F0 1B0 0B0",)
    timetable = Timetable("own", Shape(2, 1, 1), (tuple(map(parse, rows[0].split())),))
    assert str(verify(communicate(timetable, chain(2)), chain(2))) == rows[0]


def parse(text: str) -> Instruction:
    op = {"F": "FORWARD", "B": "BACKWARD", "I": "BACKWARD_INPUT", "W": "BACKWARD_WEIGHT"}[text[1]]
    return Instruction(op, int(text[0]), int(text[2]))


def test_shared_parameters_are_summed_once_on_each_rank_in_one_order():
    shared = (Shared("a.weight", (0, 2, 3)), Shared("b.weight", (0, 1)), Shared("mine", (0, 2)))
    partition = chain(4, shared=shared)
    program = verify(communicate(make_timetable("interleaved-1f1b", Shape(4, 2, 2)), partition), partition)
    sums = [[one for one in row if one.op == "REDUCE_GRAD"] for row in program.rows]
    assert sums[0] == [
        Instruction("REDUCE_GRAD", 0, values=("a.weight",), peers=(3,)),
        Instruction("REDUCE_GRAD", 0, values=("b.weight",), peers=(1,)),
    ]
    assert sums[1] == [
        Instruction("REDUCE_GRAD", 3, values=("a.weight",), peers=(0,)),
        Instruction("REDUCE_GRAD", 1, values=("b.weight",), peers=(0,)),
    ]


def timetable_of(*rows: str, stages: int = 2) -> Timetable:
    microbatches = 1 + max(int(word[2]) for row in rows for word in row.split())
    shape = Shape(stages, len(rows), microbatches)
    return Timetable("own", shape, tuple(tuple(map(parse, row.split())) for row in rows))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (("0F0 0B0 0F1 0B1", "1F1 1F0 1B0 1B1"), "every rank waits for another: rank 0 in 0B0, rank 1 in 1F1; reorder"),
        (("0B0 0F0", "1F0 1B0"), r"0B0 \(rank 0, instruction 0\): it stands before 0F0"),
        (("0F0", "1F0 1B0"), "rank 0 has 0F0 for stage 0 and microbatch 0; expected 0F0 and 0B0, or 0F0, 0I0 and 0W0"),
        (("0F0 0B0 1B0", "1F0"), r"1B0 \(rank 0, instruction 2\): stage 1 belongs to rank 1"),
        (("0F0 0B0 0F0", "1F0 1B0"), r"0F0 \(rank 0, instruction 2\): it stands twice, first at instruction 0; remove"),
    ],
)
def test_a_compute_order_that_cannot_run_is_refused(rows, words):
    with pytest.raises(ProgramError, match=words):
        communicate(timetable_of(*rows), chain(2))


def test_a_timetable_of_another_kind_is_refused():
    right = timetable_of("0F0 0B0", "1F0 1B0")
    with pytest.raises(ProgramError, match="for 2 stages does not fit a partition into 3; compile both again"):
        communicate(right, chain(3))
    with pytest.raises(ProgramError, match="has 1 rows for 2 ranks; give one for each"):
        communicate(Timetable("own", right.shape, right.rows[:1]), chain(2))
    send = Instruction("SEND_F", 0, 0, peer=1, values=("hidden",))
    with pytest.raises(
        ProgramError, match=r"0SEND_F0>1 \(rank 0, instruction 2\): a timetable holds computations only"
    ):
        communicate(Timetable("own", right.shape, ((*right.rows[0], send), right.rows[1])), chain(2))


@st.composite
def partitions(draw: st.DrawFn, stages: int) -> Partition:
    """Random values from earlier to later stages, with and without gradients, and random shared parameters."""
    pairs = [(a, b) for a in range(stages) for b in range(a + 1, stages)]
    chosen = draw(st.lists(st.tuples(st.sampled_from(pairs), st.integers(0, 3)), max_size=8))
    transfers = [Transfer(f"v{i}", a, b, 4, g) for i, ((a, b), g) in enumerate(chosen)]
    holders = draw(st.lists(st.sets(st.integers(0, stages - 1), min_size=2), max_size=3))
    shared = tuple(Shared(f"p{i}", tuple(sorted(own))) for i, own in enumerate(holders))
    return partition_of(stages, *transfers, shared=shared)


@given(st.data(), st.sampled_from(["gpipe", "1f1b", "interleaved-1f1b"]), st.integers(2, 4), st.integers(1, 6))
def test_any_partition_is_safe_under_any_schedule(data, name, ranks, microbatches):
    stages = ranks * (2 if name == "interleaved-1f1b" else 1)
    partition = data.draw(partitions(stages))
    verify(communicate(make_timetable(name, Shape(stages, ranks, microbatches)), partition), partition)
