"""PipeDream and 2BW: which version of the weights each microbatch reads, how many are held, what that trains."""

from __future__ import annotations

import pytest

import pipecompile
from pipecompile.errors import ScheduleError
from pipecompile.ir import Instruction, Shape
from pipecompile.passes.schedules import make_timetable
from pipecompile.passes.schedules.versions import newest, one_behind, versions_read
from tests.models import mlp

SIZES = [(p, m) for p in (2, 4, 8, 16) for m in (1, p - 1, p, 2 * p, 3 * p + 1, 4 * p)]


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_pipedream_reads_what_its_statement_says(p, m):
    timetable = make_timetable("pipedream", Shape(p, p, m))
    for stage, row in enumerate(timetable.rows):
        read, held = versions_read(row, 1, newest)
        assert read == tuple(max(0, t - (p - stage) + 1) for t in range(m))
        assert held <= p - stage
        if m >= 2 * p:
            assert held == p - stage


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_2bw_reads_one_version_on_all_stages_and_holds_two(p, m):
    timetable = make_timetable("pipedream-2bw", Shape(p, p, m))
    for row in timetable.rows:
        read, held = versions_read(row, p, one_behind(p))
        assert read == tuple(max(0, t // p - 1) for t in range(m))
        assert held == (1 if m <= p else 2)
        assert _never_ahead(row, p, read)


def _never_ahead(row: tuple[Instruction, ...], every: int, read: tuple[int, ...]) -> bool:
    """Whether every version was made before a forward reads it."""
    done = 0
    for one in row:
        if one.op == "FORWARD" and read[one.microbatch] > done // every:
            return False
        done += one.op == "BACKWARD"
    return True


def test_two_stages_trained_by_hand():
    """loss = (a b x - y)^2 / 2 on two stages: running the rows with stashed weights gives the statement's recurrence."""
    rows = make_timetable("pipedream", Shape(2, 2, 6)).rows
    data, rate = [(1.0, 0.5), (2.0, -1.0), (-1.0, 0.3), (0.5, 2.0), (1.5, 1.0), (-0.7, 0.1)], 0.1
    first, second = (versions_read(row, 1, newest)[0] for row in rows)
    a, b = [0.6], [-0.4]
    for t, (x, y) in enumerate(data):
        seen_a, seen_b = a[max(0, t - 1)], b[t]
        error = seen_a * seen_b * x - y
        a.append(a[t] - rate * error * seen_b * x)
        b.append(b[t] - rate * error * seen_a * x)
    run_a, run_b = _run(rows, data, rate, first, second)
    assert (run_a, run_b) == (a, b)


def _run(rows, data, rate, first, second):
    """Both ranks' rows, in an order that their messages allow, with explicit stashes."""
    a, b, hidden, back = [0.6], [-0.4], {}, {}
    at = [0, 0]
    while at != [len(row) for row in rows]:
        for rank, row in enumerate(rows):
            if at[rank] == len(row):
                continue
            one, t = row[at[rank]], row[at[rank]].microbatch
            if (rank, one.op) == (0, "FORWARD"):
                hidden[t] = a[first[t]] * data[t][0]
            elif (rank, one.op) == (0, "BACKWARD"):
                if t not in back:
                    continue
                a.append(a[-1] - rate * back[t] * data[t][0])
            elif t not in hidden:
                continue
            elif one.op == "BACKWARD":
                seen = b[second[t]]
                error = seen * hidden[t] - data[t][1]
                back[t] = error * seen
                b.append(b[-1] - rate * error * hidden[t])
            at[rank] += 1
    return pytest.approx(a), pytest.approx(b)


@pytest.mark.parametrize("name", ["pipedream", "pipedream-2bw"])
def test_it_is_not_run(name):
    model, batch, loss = mlp()
    words = f"{name} never flushes: .* the runtime keeps one; print it with pipecompile schedule {name}, and train with"
    with pytest.raises(ScheduleError, match=words):
        pipecompile.compile(model, batch, stages=2, microbatches=4, schedule=name, loss=loss, costs="estimate")
