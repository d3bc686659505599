"""Timetables as the CSV files of ``torch.distributed.pipelining``: one line a rank, one computation a cell.

``_PipelineScheduleRuntime._load_csv(file)`` runs what ``write_csv`` writes, and ``read_csv`` reads what torch's
``_dump_csv`` writes: idle cells are empty, messages and sharding are left out (communicate adds ours), overlapped cells
``(0F1;3B0)OVERLAP_F_B`` become their parts in order.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

from pipecompile.errors import ProgramError, ScheduleError
from pipecompile.ir import Instruction, Shape, Timetable
from pipecompile.ir.json_text import shortened
from pipecompile.ir.versions import updates
from pipecompile.passes.own_schedule import read_computation
from pipecompile.passes.verify import verify_compute

_ADDED = re.compile(r"\d+(UNSHARD|RESHARD|REDUCE_GRAD|SEND_F|RECV_F|SEND_B|RECV_B)\d*")
_PAIR = re.compile(r"\(([^()]*)\)OVERLAP_F_B")


def write_csv(timetable: Timetable, path: str | Path) -> None:
    """Write the computations of each rank, in order; ScheduleError if it updates weights, which torch's engine cannot."""
    if updates(timetable.rows):
        raise ScheduleError(
            f"{timetable.schedule} updates weights inside a step, which torch's pipelining has no word for; "
            "write a schedule that flushes, such as 1f1b"
        )
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([str(one) for one in row] for row in timetable.rows)


def read_csv(path: str | Path) -> Timetable:
    """The timetable of a file; ScheduleError names the line and cell of what is malformed."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        lines = list(csv.reader(text.splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ScheduleError(f"{path} cannot be read as text: {error}; give a CSV file of torch's pipelining") from error
    rows = []
    for line, cells in enumerate(lines, start=1):
        row: list[Instruction] = []
        for number, cell in enumerate(cells, start=1):
            row += _cell(cell.strip(), f"{path}, line {line}, cell {number}")
        if not row:
            raise ScheduleError(f"{path}, line {line} has no computation; give one line for each rank, and no other")
        rows.append(tuple(row))
    try:
        return verify_compute(Timetable(Path(path).stem, _shape(rows, str(path)), tuple(rows)))
    except ProgramError as error:
        raise ScheduleError(f"{path}: {error}; mend the rows, one line for each rank") from error


def _cell(text: str, where: str) -> list[Instruction]:
    """The computations of a cell."""
    pair = _PAIR.fullmatch(text)
    parts = pair[1].split(";") if pair else [text] if text and not _ADDED.fullmatch(text) else []
    found = []
    for part in parts:
        one = read_computation(part)
        if one is None:
            raise ScheduleError(
                f"{where}: {shortened(text)} is not a computation; expected a stage, F, B, I or W, and a microbatch, such as 0F0"
            )
        found.append(one)
    return found


def _shape(rows: list[tuple[Instruction, ...]], path: str) -> Shape:
    """Stages and microbatches as far as the cells count, each stage on the rank whose line has it first."""
    rank_of: dict[int, int] = {}
    for rank, row in enumerate(rows):
        for one in row:
            if rank_of.setdefault(one.stage, rank) != rank:
                raise ScheduleError(
                    f"{path}, line {rank + 1}: stage {one.stage} is on line {rank_of[one.stage] + 1} too"
                )
    if not rank_of:
        raise ScheduleError(f"{path} has no computation; expected one line a rank, cells such as 0F0")
    stages = max(rank_of) + 1
    if stages > len(rank_of):
        lost = next(stage for stage in range(stages) if stage not in rank_of)
        raise ScheduleError(f"{path} has stage {stages - 1} but no stage {lost}; number stages from 0")
    microbatches = 1 + max(one.microbatch for row in rows for one in row)
    try:
        return Shape(stages, len(rows), microbatches, tuple(rank_of[stage] for stage in range(stages)))
    except ScheduleError as error:
        raise ScheduleError(f"{path}: {error}") from error
