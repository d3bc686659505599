"""A user's own schedule: a Python function in a file, named ``my.py:function`` wherever a schedule's name is expected.

    def mine(shape):                              # or mine(shape, setting), for costs, links and memory
        first = "0F0 0F1 0B0 0B1"                 # a row for each rank: text, or Instructions
        second = "1F0 1B0 1F1 1B1"
        return [first, second]

``shape`` has ``stages``, ``ranks``, ``microbatches`` and ``stages_of(rank)``. The function may also return a Timetable,
whose shape places the stages. What it gives is verified like every other schedule.
"""

from __future__ import annotations

import inspect
import re
import runpy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pipecompile.errors import ScheduleError
from pipecompile.ir import COMPUTE, Instruction, Shape, Timetable
from pipecompile.ir.json_text import shortened

Rows = tuple[tuple[Instruction, ...], ...]
_OPS = {letter: op for op, letter in COMPUTE.items()}


def read_computation(text: str) -> Instruction | None:
    """The instruction that ``2F0`` (B, I, W) writes; None if the text is not one."""
    match = re.fullmatch(r"([0-9]{1,9})([FBIW])([0-9]{1,9})", text.strip())
    return Instruction(_OPS[match[2]], int(match[1]), int(match[3])) if match else None


def own_order(name: str) -> Callable[[Shape, Any], Rows | Timetable]:
    """The function that ``my.py:function`` names, as an order; ScheduleError says what is wrong with it."""
    path, _, function_name = name.rpartition(":")
    if not Path(path).is_file():
        raise ScheduleError(f"schedule {name!r}: there is no file {path}; give the path of a Python file")
    try:
        function = runpy.run_path(path).get(function_name)
    except (Exception, SystemExit) as error:
        raise ScheduleError(f"schedule {name!r}: {path} cannot be run: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise ScheduleError(f"schedule {name!r}: {path} has no function {function_name!r}; define one, or name another")

    def order(shape: Shape, setting: Any) -> Rows | Timetable:
        try:
            given = (shape, setting)[: len(inspect.signature(function).parameters)]
            made = function(*given)
        except (Exception, SystemExit) as error:
            raise ScheduleError(f"schedule {name!r} failed: {type(error).__name__}: {error}") from error
        if not isinstance(made, Timetable):
            return _rows(name, made)
        if _size(made.shape) != _size(shape):
            raise ScheduleError(
                f"schedule {name!r} gave a timetable for {_size(made.shape)}, not for the {_size(shape)} asked for; "
                "make it for the shape that the function is given, or ask for that one"
            )
        return made

    return order


def _size(shape: Shape) -> str:
    return f"{shape.stages} stages on {shape.ranks} ranks and {shape.microbatches} microbatches"


def _rows(name: str, made: object) -> Rows:
    if not isinstance(made, Iterable) or isinstance(made, str):
        raise ScheduleError(f"schedule {name!r} gave {shortened(made)}; expected one row for each rank")
    return tuple(tuple(_row(name, rank, row)) for rank, row in enumerate(made))


def _row(name: str, rank: int, row: object) -> list[Instruction]:
    if not isinstance(row, Iterable):
        raise ScheduleError(
            f"schedule {name!r} gave {shortened(row)} for rank {rank}; expected instructions such as '0F0 0B0'"
        )
    found = []
    for part in row.split() if isinstance(row, str) else row:
        one = read_computation(part) if isinstance(part, str) else part
        if not isinstance(one, Instruction):
            raise ScheduleError(
                f"schedule {name!r} gave {shortened(part)} for rank {rank}; expected a stage, F, B, I or W, and a microbatch, "
                "for example '0F0'"
            )
        found.append(one)
    return found
