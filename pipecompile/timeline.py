"""Draws when each rank computes what, as papers do: one row a rank, one cell a time unit, a number for the microbatch.

rank 0  F0 F1 .. .. B0 == B1 ==      F forward   B backward   I input half   W weight half   == goes on   .. idle
rank 1  .. F0 B0 == F1 B1 == ..      small letters: a rank's second, fourth, … stage
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from pipecompile.ir import COMPUTE, Forecast, Instruction, Shape, Span

IDLE, GOES_ON = "..", "=="
COLOURS = {"F": "white on blue", "B": "black on green", "I": "black on cyan", "W": "black on yellow"}

Rows = Sequence[Sequence[Instruction]]
Cell = tuple[str, str]
"""What a cell says, and its style."""


def computations(rows: Rows, forecast: Forecast) -> list[list[tuple[Instruction, Span]]]:
    """Each rank's computations with their times, in order."""
    found: list[list[tuple[Instruction, Span]]] = [[] for _ in rows]
    for span in forecast.spans:
        one = rows[span.rank][span.position]
        if one.op in COMPUTE:
            found[span.rank].append((one, span))
    return found


def cells(rows: Rows, shape: Shape, forecast: Forecast, unit_ms: float = 0.0) -> list[list[Cell]]:
    """The grid: for each rank and time unit what runs in its middle. ``unit_ms`` 0: the shortest computation."""
    lines = computations(rows, forecast)
    unit = unit_ms or min(span.end_ms - span.start_ms for line in lines for _, span in line)
    columns = round(forecast.step_ms / unit)
    grid = []
    for line in lines:
        cell: list[Cell] = [(IDLE, "dim")] * columns
        for one, span in line:
            first, last = round(span.start_ms / unit), round(span.end_ms / unit)
            for column in range(first, min(max(last, first + 1), columns)):
                cell[column] = (_label(one, shape) if column == first else GOES_ON, COLOURS[COMPUTE[one.op]])
        grid.append(cell)
    return grid


def _label(one: Instruction, shape: Shape) -> str:
    letter = COMPUTE[one.op]
    turn = shape.stages_of(shape.placement[one.stage]).index(one.stage)
    return f"{letter.lower() if turn % 2 else letter}{one.microbatch}"


def draw(rows: Rows, shape: Shape, forecast: Forecast, unit_ms: float = 0.0) -> str:
    """The grid as plain text."""
    grid = cells(rows, shape, forecast, unit_ms)
    width = max(len(text) for line in grid for text, _ in line)

    def padded(text: str) -> str:
        return text.ljust(width, text[-1] if text in (IDLE, GOES_ON) else " ")

    return "\n".join(f"rank {rank}  {' '.join(padded(text) for text, _ in line)}" for rank, line in enumerate(grid))


def coloured(rows: Rows, shape: Shape, forecast: Forecast, unit_ms: float = 0.0) -> Text:
    """The grid in colours, for a terminal; the last column is each rank's share of idle time."""
    whole = Text()
    for rank, line in enumerate(cells(rows, shape, forecast, unit_ms)):
        whole.append(f"rank {rank} ")
        for text, style in line:
            shown = "" if text in (IDLE, GOES_ON) else text[1:]
            whole.append(shown.rjust(3), style if text != IDLE else "")
        whole.append(f" {forecast.bubble[rank]:6.1%} idle\n")
    return whole
