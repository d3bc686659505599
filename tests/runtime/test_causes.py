"""From where all processes stand, the waits are followed to the one that has all it needs and goes no further."""

from __future__ import annotations

import itertools

import pytest

from pipecompile.ir import Program
from pipecompile.passes.replicas import for_replicas
from pipecompile.runtime.causes import Search
from pipecompile.runtime.marks import BEGINNING, OUTSIDE, SUMMING
from tests.runtime.handmade import program_of

END = -2
"""Stands for the place behind the last instruction of a row."""
Stand = tuple[int, str | int, int]


def words(program: Program, process: int, stand: Stand) -> tuple[int, int, int]:
    """(round, place, waits) of a process that stands at an instruction, given by its text."""
    round_, at, waits = stand
    row = program.rows[process % program.shape.ranks]
    place = [str(one) for one in row].index(at) if isinstance(at, str) else len(row) if at == END else at
    return round_, place, waits


@pytest.mark.parametrize(
    ("schedule", "ranks", "replicas", "stands", "expected"),
    [
        # 0 waits for 3, 3 for 2, and what 2 is to receive of 1 was sent
        ("gpipe", 4, 1, [(2, "0RECV_B0<3", 0), (2, "1RECV_B0<2", 0), (2, "2RECV_F3<1", 0), (2, "3RECV_F3<2", 0)], 2),
        ("gpipe", 4, 1, [(2, "0RECV_B0<3", 0), (2, "1RECV_B0<2", 0), (2, "2F3", 0), (2, "3RECV_F3<2", 0)], 2),
        # the sums at the end of a step, which 3 has not come to wait for
        ("gpipe", 4, 1, [(2, END, 1), (2, END, 1), (2, END, 1), (2, END, 0)], 3),
        ("gpipe", 4, 1, [(2, END, 1), (2, END, 1), (2, "2RECV_B3<3", 0), (2, END, 1)], 2),
        # a sum between steps: one that has not come to it, one that has not left it
        ("gpipe", 4, 1, [(3, SUMMING, 1), (3, SUMMING, 1), (2, OUTSIDE, 0), (3, SUMMING, 1)], 2),
        ("gpipe", 4, 1, [(4, "0RECV_B0<3", 0), (4, "1RECV_F0<0", 0), (3, SUMMING, 0), (4, "3RECV_F0<2", 0)], 2),
        # the next step begins when its messages of the one before were taken
        ("gpipe", 4, 1, [(3, BEGINNING, 0), (2, OUTSIDE, 0), (2, "2SEND_B3>1", 0), (2, OUTSIDE, 0)], 2),
        # an update of a parameter that ranks share, which 3 has not come to wait for
        ("pipedream", 4, 1, [(2, "0UPDATE0@1(wte.weight)", 1), (2, "1F3@1", 0), (2, "2F2@1", 0), (2, "3UPDATE0@1(wte.weight)", 0)], 3),
        # a stage's own update, for which 0 waits in both replicas and 1, behind it, in none
        ("pipedream", 4, 2, [(2, "0UPDATE0@1", 1), (2, "1UPDATE0@1", 0), *[(2, END, 1)] * 2, (2, "0B0@0", 0), *[(2, END, 1)] * 3], 4),
        # the other replica
        ("zb-v", 2, 2, [(2, END, 1), (2, END, 1), (2, END, 1), (2, "2W3", 0)], 3),
    ],
)  # fmt: skip
def test_the_waits_are_followed(schedule: str, ranks: int, replicas: int, stands: list[Stand], expected: int) -> None:
    program = for_replicas(program_of(schedule, ranks, 4), replicas)
    found = [words(program, process, stand) for process, stand in enumerate(stands)]
    count = itertools.count()

    def beats() -> list[tuple[int, ...]]:
        now = next(count)
        return [(now, *each) for each in found]

    search = Search(program, 0, len(found), {}, beats, lambda: False)
    cause = search.find(found[0], late=True, timeout_s=3)
    assert cause is not None
    assert cause.process == expected
