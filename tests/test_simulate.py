"""Forecasts: times that can be counted by hand, messages, reductions, memory, and a program that cannot end."""

from __future__ import annotations

import pytest

from pipecompile.errors import ProgramError
from pipecompile.ir import Instruction, Partition, Program, Shape, Shared, StageCost, Transfer
from pipecompile.passes.communicate import chain, communicate
from pipecompile.passes.replicas import for_replicas
from pipecompile.passes.schedules import make_timetable
from pipecompile.simulate import Link, simulate


def program_of(name: str, shape: Shape, partition: Partition) -> Program:
    return communicate(make_timetable(name, shape), partition)


def test_one_microbatch_through_two_stages():
    forecast = simulate(program_of("gpipe", Shape(2, 2, 1), chain(2)), chain(2))
    assert forecast.step_ms == 6
    assert forecast.busy_ms == (3, 3)
    assert forecast.bubble == (0.5, 0.5)


def test_messages_take_latency_and_bandwidth():
    partition = chain(2, bytes=20, gradient_bytes=10)
    program = program_of("gpipe", Shape(2, 2, 1), partition)
    assert simulate(program, partition, Link(latency_ms=0.5, bytes_per_ms=10)).step_ms == 6 + (0.5 + 2) + (0.5 + 1)


def test_a_channel_carries_one_message_at_a_time():
    partition = chain(2, bytes=30, gradient_bytes=0)
    forecast = simulate(program_of("gpipe", Shape(2, 2, 3), partition), partition, Link(bytes_per_ms=10))
    assert forecast.step_ms == 1 + 3 * 3 + 1 + 3 * 2


def test_without_overlap_both_ranks_stand_still():
    partition = chain(2)
    program = program_of("gpipe", Shape(2, 2, 2), partition)
    link = Link(latency_ms=1.0)
    assert simulate(program, partition, link).spans[2].start_ms == 1
    assert simulate(program, partition, Link(latency_ms=1.0, overlap=False)).spans[2].start_ms == 2


def test_a_gradient_sum_waits_for_all_and_costs_a_ring():
    partition = chain(2, shared=[Shared("w", (0, 1), bytes=40)])
    program = program_of("gpipe", Shape(2, 2, 1), partition)
    forecast = simulate(program, partition, Link(latency_ms=0.0, bytes_per_ms=10))
    assert forecast.step_ms == pytest.approx(6 + 0.1 + 0.1 + 2 * 40 / 2 / 10)
    assert {s.end_ms for s in forecast.spans if program.rows[s.rank][s.position].op == "REDUCE_GRAD"} == {
        forecast.step_ms
    }


def test_sums_over_replicas_go_on_while_a_rank_computes():
    """A ring of two over 40 bytes at 10 bytes a ms: 4 ms. Stage 1 sums while stage 0 still computes."""
    partition = chain(2, costs=[StageCost(1.0, 2.0, 1.0, saved_bytes=1, trainable_bytes=40)] * 2)
    program = for_replicas(program_of("gpipe", Shape(2, 2, 1), partition), 2)
    forecast = simulate(program, partition, Link(bytes_per_ms=10), replicas=2)
    sums = {
        s.rank: (s.start_ms, s.end_ms)
        for s in forecast.spans
        if program.rows[s.rank][s.position].op == "REDUCE_REPLICAS"
    }
    assert sums == {0: pytest.approx((6.2, 10.2)), 1: pytest.approx((4.1, 8.1))}
    assert forecast.step_ms == pytest.approx(10.2)
    assert forecast.busy_ms == pytest.approx((3, 3))


def test_a_shared_parameter_is_summed_over_ranks_and_replicas_once():
    """A ring of four over its 40 bytes: 6 ms; of the 60 bytes of each stage, 20 are its own: 2 ms over two replicas."""
    costs = [StageCost(1.0, 2.0, 1.0, saved_bytes=1, trainable_bytes=60)] * 2
    partition = chain(2, costs=costs, shared=[Shared("w", (0, 1), bytes=40)])
    program = for_replicas(program_of("gpipe", Shape(2, 2, 1), partition), 2)
    forecast = simulate(program, partition, Link(bytes_per_ms=10), replicas=2)
    took = {
        program.rows[s.rank][s.position].op: s.end_ms - s.start_ms
        for s in forecast.spans
        if program.rows[s.rank][s.position].op.startswith("REDUCE")
    }
    assert took == {"REDUCE_GRAD": pytest.approx(6), "REDUCE_REPLICAS": pytest.approx(2)}


def test_an_update_waits_for_its_sum_over_replicas():
    """One microbatch, whose update of each stage is a ring of two over 40 bytes (4 ms), then the optimizer's 1 ms."""
    partition = chain(2, costs=[StageCost(1.0, 2.0, 1.0, saved_bytes=1, trainable_bytes=40)] * 2)
    program = program_of("pipedream", Shape(2, 2, 1), partition)
    alone, both = (
        simulate(program, partition, Link(bytes_per_ms=10), optimizer_ms=(1, 1), replicas=replicas)
        for replicas in (1, 2)
    )
    assert both.step_ms == pytest.approx(alone.step_ms + 4)
    assert both.busy_ms == alone.busy_ms == pytest.approx((4, 4))


def test_the_optimizer_adds_to_its_rank():
    forecast = simulate(program_of("gpipe", Shape(2, 2, 1), chain(2)), chain(2), optimizer_ms=(1, 4))
    assert forecast.step_ms == 4 + 4
    assert forecast.busy_ms == (4, 7)


def test_memory_of_one_microbatch():
    costs = [StageCost(1, 2, 1, parameter_bytes=100, trainable_bytes=80, saved_bytes=7)] * 2
    partition = chain(2, costs, bytes=3, gradient_bytes=2)
    forecast = simulate(program_of("gpipe", Shape(2, 2, 1), partition), partition, optimizer_factor=2)
    assert forecast.peak_bytes == (100 + 3 * 80 + 7 + 3 + 2, 100 + 3 * 80 + 7 + 3)


def test_memory_grows_with_the_activations_in_flight():
    costs = [StageCost(1, 2, 1, saved_bytes=1000)] * 4
    partition = chain(4, costs, bytes=0, gradient_bytes=0)
    for name, peaks in (("gpipe", (8000,) * 4), ("1f1b", (4000, 3000, 2000, 1000))):
        assert simulate(program_of(name, Shape(4, 4, 8), partition), partition).peak_bytes == peaks


def test_a_program_that_cannot_end_names_who_waits():
    rows = ((Instruction("FORWARD", 0, 0),), (Instruction("FORWARD", 1, 0),))
    partition = Partition("bad", 2, (0, 1), (StageCost(1, 2),) * 2, (Transfer("x", 0, 1, 1),))
    with pytest.raises(ProgramError, match="cannot run to its end: rank 1 in 1F0 wait for ever; verify it"):
        simulate(Program("bad", Shape(2, 2, 1), rows), partition)
