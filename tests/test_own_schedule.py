"""A user's own schedule from a file: accepted forms, and what is said about a wrong one."""

from __future__ import annotations

import pytest

from pipecompile.cli import main
from pipecompile.errors import ProgramError, ScheduleError
from pipecompile.ir import Shape, StageCost
from pipecompile.passes.communicate import chain, communicate
from pipecompile.passes.schedules import make_timetable

GOOD = """
from pipecompile.ir import Instruction, Shape, Timetable

def text(shape):
    return ["0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1"]

def costs(shape, setting):
    assert setting.costs[0].forward_ms == 3.0
    return [[Instruction("FORWARD", s, 0), Instruction("BACKWARD", s, 0)] for s in range(shape.stages)]

def whole(shape):
    return Timetable("mine", Shape(2, 1, 1), (tuple(map(lambda w: Instruction(*w), [("FORWARD", 0, 0), ("FORWARD", 1, 0),
        ("BACKWARD", 1, 0), ("BACKWARD", 0, 0)])),))

def number(shape):
    return 3

def numbers(shape):
    return [1, 2]

def wrong(shape):
    return ["0F0 0X0", "1F0 1B0"]

def breaks(shape):
    return 1 / 0

def leaves(shape):
    raise SystemExit(0)

unknown = type

def twice(shape):
    return ["0F0 0F0 0B0", "1F0 1B0"]

def short(shape):
    return ["0F0 0B0"]

def sends(shape):
    return [[Instruction("FORWARD", 0, 0), Instruction("SEND_F", 0, 0, peer=1)], "1F0 1B0"]

constant = 4
"""


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "my.py"
    path.write_text(GOOD)
    return str(path)


def test_rows_as_text_instructions_or_a_timetable(mine):
    assert str(make_timetable(f"{mine}:text", Shape(2, 2, 2))) == "0F0 0F1 0B0 0B1\n1F0 1B0 1F1 1B1"
    assert str(make_timetable(f"{mine}:costs", Shape(2, 2, 1), [StageCost(3.0, 1.0)] * 2)) == "0F0 0B0\n1F0 1B0"
    assert str(make_timetable(f"{mine}:whole", Shape(2, 1, 1))) == "0F0 1F0 1B0 0B0"


@pytest.mark.parametrize("shape", [Shape(2, 2, 1), Shape(2, 1, 3), Shape(4, 1, 1)])
def test_a_timetable_of_another_shape_is_refused(mine, shape):
    asked = f"{shape.stages} stages on {shape.ranks} ranks and {shape.microbatches} microbatches"
    words = f"gave a timetable for 2 stages on 1 ranks and 1 microbatches, not for the {asked} asked for; make it for"
    with pytest.raises(ScheduleError, match=words):
        make_timetable(f"{mine}:whole", shape)


def test_the_command_verifies_it(mine, capsys):
    assert main(["schedule", "--schedule", f"{mine}:text", "--stages", "2", "--microbatches", "2", "--compute"]) == 0
    assert capsys.readouterr().out == "0F0 0F1 0B0 0B1\n1F0 1B0 1F1 1B1\n"
    assert main(["schedule", f"{mine}:text", "--stages", "2", "--microbatches", "3"]) == 1
    assert "rank 0 has nothing for stage 0 and microbatch 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("number", "gave 3; expected one row for each rank"),
        ("numbers", "gave 1 for rank 0; expected instructions such as '0F0 0B0'"),
        ("wrong", "gave '0X0' for rank 0; expected a stage, F, B, I or W, and a microbatch"),
        ("breaks", "failed: ZeroDivisionError: division by zero"),
        ("leaves", "failed: SystemExit: 0"),
        ("unknown", "failed: ValueError: no signature found"),
        ("missing", "has no function 'missing'; define one, or name another"),
        ("constant", "has no function 'constant'"),
    ],
)
def test_what_a_function_must_give(mine, name, words):
    with pytest.raises(ScheduleError, match=words):
        make_timetable(f"{mine}:{name}", Shape(2, 2, 1))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("twice", r"0F0 \(rank 0, instruction 1\): it stands twice"),
        ("short", "the timetable has 1 rows for 2 ranks; give one for each"),
        ("sends", r"0SEND_F0>1 .*a timetable holds computations only; leave messages out"),
    ],
)
def test_what_it_gives_is_verified(mine, name, words):
    with pytest.raises(ProgramError, match=words):
        communicate(make_timetable(f"{mine}:{name}", Shape(2, 2, 1)), chain(2))


def test_a_file_that_is_not_there_or_does_not_run(tmp_path):
    with pytest.raises(ScheduleError, match=r"there is no file .*none\.py; give the path of a Python file"):
        make_timetable(f"{tmp_path}/none.py:f", Shape(2, 2, 1))
    (tmp_path / "leaves.py").write_text("raise SystemExit(0)")
    with pytest.raises(ScheduleError, match=r"leaves\.py cannot be run: SystemExit: 0"):
        make_timetable(f"{tmp_path}/leaves.py:f", Shape(2, 2, 1))
    (tmp_path / "bad.py").write_text("1 +")
    with pytest.raises(ScheduleError, match="cannot be run: SyntaxError"):
        make_timetable(f"{tmp_path}/bad.py:f", Shape(2, 2, 1))
