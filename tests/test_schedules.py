"""Every schedule: its golden text, its closed forms at equal costs, and what it refuses."""

from __future__ import annotations

import json

import pytest

from pipecompile.cli import main
from pipecompile.errors import ScheduleError
from pipecompile.ir import Instruction, Program, Routes, Shape, StageCost, Timetable
from pipecompile.passes.communicate import chain, communicate
from pipecompile.passes.schedules import make_timetable, schedule_names
from pipecompile.passes.verify import verify
from pipecompile.simulate import compute_spans

PER_RANK = {"interleaved-1f1b": 2}
RANKS = (2, 4, 8, 16)
SIZES = [(p, m) for p in RANKS for m in range(1, 4 * p + 1)]


def shape_for(name: str, ranks: int, microbatches: int) -> Shape:
    return Shape(PER_RANK.get(name, 1) * ranks, ranks, microbatches)


def idle(timetable: Timetable, forward_ms: float = 1.0, input_ms: float = 1.0, weight_ms: float = 1.0) -> list[float]:
    """Idle time of each rank at equal costs, given for a whole rank's share, until the last rank is done."""
    shape = timetable.shape
    each = shape.stages // shape.ranks
    cost = StageCost(forward_ms / each, (input_ms + weight_ms) / each, weight_ms / each)
    spans = compute_spans(timetable.rows, Routes.of(chain(shape.stages)), (cost,) * shape.stages)
    step = max(end for _, end in spans.values())
    return [step - sum(spans[one][1] - spans[one][0] for one in row) for row in timetable.rows]


def peak_activations(row: tuple[Instruction, ...]) -> int:
    """The most microbatches, counted for each stage, whose forward is done and whose backward is not over."""
    split = {(one.stage, one.microbatch) for one in row if one.op == "BACKWARD_WEIGHT"}
    held = peak = 0
    for one in row:
        held += one.op == "FORWARD"
        peak = max(peak, held)
        held -= one.op == "BACKWARD_WEIGHT" or (one.op == "BACKWARD" and (one.stage, one.microbatch) not in split)
    return peak


@pytest.mark.parametrize("name", schedule_names())
def test_text(name, golden):
    timetable = make_timetable(name, shape_for(name, 3, 6))
    program = communicate(timetable, chain(timetable.shape.stages))
    golden(f"schedules/{name}.txt", f"{timetable}\n\n{program}")


@pytest.mark.parametrize("name", schedule_names())
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_shape_is_safe(name, ranks):
    for microbatches in range(1, 2 * ranks + 3):
        partition = chain(shape_for(name, ranks, microbatches).stages)
        verify(communicate(make_timetable(name, shape_for(name, ranks, microbatches)), partition), partition)


def test_gpipe_closed_forms():
    for p, m in SIZES:
        timetable = make_timetable("gpipe", Shape(p, p, m))
        assert idle(timetable, 1, 2, 2) == [(p - 1) * 5] * p
        assert [peak_activations(row) for row in timetable.rows] == [m] * p


def test_1f1b_closed_forms():
    for p, m in SIZES:
        timetable = make_timetable("1f1b", Shape(p, p, m))
        assert idle(timetable, 1, 2, 2) == [(p - 1) * 5] * p
        assert [peak_activations(row) for row in timetable.rows] == [min(m, p - r) for r in range(p)]


@pytest.mark.parametrize("v", [2, 3])
def test_interleaved_closed_forms(v):
    for p, m in SIZES:
        if p * v > 32:
            continue
        timetable = make_timetable("interleaved-1f1b", Shape(p * v, p, m))
        if m >= p:
            assert idle(timetable, v, v, v) == [(p - 1) * 3] * p
        if m % p == 0:
            peaks = [peak_activations(row) for row in timetable.rows]
            assert peaks == [min(m * v, 2 * (p - r - 1) + (v - 1) * p + 1) for r in range(p)]


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("2f2b", Shape(2, 2, 2), "unknown schedule '2f2b'; choose one of 1f1b, "),
        (
            "1f1b",
            Shape(4, 2, 2),
            "1f1b runs 1 stage on each rank, not 4 stages on 2 ranks; use --stages 2 --ranks 2, or",
        ),
        ("gpipe", Shape(4, 2, 2), "or use --schedule looped-bfs"),
        (
            "interleaved-1f1b",
            Shape(4, 4, 2),
            "needs at least two stages on each rank.*use --stages 8, or --schedule 1f1b",
        ),
    ],
)
def test_refused_shapes(name, shape, words):
    with pytest.raises(ScheduleError, match=words):
        make_timetable(name, shape)


def test_costs_must_fit_the_stages():
    with pytest.raises(ScheduleError, match="3 stage costs for 2 stages; give one for each stage"):
        make_timetable("1f1b", Shape(2, 2, 2), [StageCost(1, 2)] * 3)


def test_the_command_prints_and_refuses(capsys):
    assert main(["schedule", "1f1b", "--stages", "2", "--microbatches", "1"]) == 0
    assert capsys.readouterr().out == "0F0 0SEND_F0>1 0RECV_B0<1 0B0\n1RECV_F0<0 1F0 1B0 1SEND_B0>0\n"
    assert main(["schedule", "gpipe", "--stages", "2", "--microbatches", "2", "--compute"]) == 0
    assert capsys.readouterr().out == "0F0 0F1 0B0 0B1\n1F0 1F1 1B0 1B1\n"
    assert main(["schedule", "interleaved-1f1b", "--stages", "4", "--ranks", "2", "--microbatches", "4", "--json"]) == 0
    program = Program.from_json(json.loads(capsys.readouterr().out))
    assert program == communicate(make_timetable("interleaved-1f1b", Shape(4, 2, 4)), chain(4))
    assert main(["schedule", "1f1b", "--stages", "3", "--ranks", "2"]) == 1
    assert "3 stages do not divide over 2 ranks" in capsys.readouterr().err
