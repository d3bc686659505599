"""Closed forms: the text, the answers, and that every form is what the simulation gives."""

from __future__ import annotations

import pytest

from pipecompile.cli import main
from pipecompile.errors import ScheduleError
from pipecompile.ir import Program, Shape, StageCost
from pipecompile.ir.versions import updates
from pipecompile.passes.communicate import chain, communicate
from pipecompile.passes.schedules import find_schedule, make_timetable, schedule_names
from pipecompile.passes.symbols import QUANTITIES, SYMBOLS, closed_forms, describe, holds, solve
from pipecompile.simulate import simulate
from pipecompile.timeline import computations
from tests.test_pipedream import most_held

WITH_FORMS = [name for name in schedule_names() if find_schedule(name).forms]
ACTIVATION, GRADIENT = 7, 5  # bytes


def measured(program: Program, times: tuple[int, int, int]) -> dict[str, float]:
    """Every quantity, counted in a program and its simulation at equal costs, activations for each rank apart."""
    shape = program.shape
    each = shape.stages // shape.ranks
    forward, inputs, weights = (time / each for time in times)
    partition = chain(shape.stages, [StageCost(forward, inputs + weights, weights)] * shape.stages)
    lines = computations(program.rows, simulate(program, partition))
    work = shape.microbatches * sum(times)
    longest = max(line[-1][1].end_ms - line[0][1].start_ms for line in lines)
    sent = [one for row in program.rows for one in row if one.op.startswith("SEND")]
    found = {
        "idle": longest - work,
        "bubble": 1 - work / longest,
        "messages": len(sent),
        "bytes": sum(ACTIVATION if one.op == "SEND_F" else GRADIENT for one in sent),
    }
    for rank, row in enumerate(program.rows):
        held = peak = 0
        split = {(one.stage, one.microbatch) for one in row if one.op == "BACKWARD_WEIGHT"}
        for one in row:
            held += one.op == "FORWARD"
            peak = max(peak, held)
            whole = one.op == "BACKWARD" and (one.stage, one.microbatch) not in split
            held -= one.op == "BACKWARD_WEIGHT" or whole
        found[f"activations {rank}"] = peak
        found[f"versions {rank}"] = max(most_held(program.rows, rank)) if updates(program.rows) else 1
    return found


@pytest.mark.parametrize("name", WITH_FORMS)
def test_forms_are_what_the_simulation_gives(name):
    found = find_schedule(name)
    forms = closed_forms(found)
    conditions = {quantity: holds(found, quantity) for quantity in QUANTITIES}
    checked = dict.fromkeys(QUANTITIES, 0)
    for p, each, times in [
        (2, 2, (6, 6, 6)),
        (4, 3, (6, 6, 6)),
        (4, 2, (12, 12, 6)),
        (3, 2, (6, 12, 6)),
        (1, 2, (6, 6, 6)),
    ]:
        v = found.per_rank or each
        for m in (1, p - 1, p, p + 1, 2 * p, 3 * p + 1, 4 * p):
            try:
                timetable = make_timetable(name, Shape(p * v, p, m))
            except ScheduleError:
                continue
            result = measured(communicate(timetable, chain(p * v)), times)
            given = dict(zip("pvmFIWag", (p, v, m, *times, ACTIVATION, GRADIENT)))
            for rank in range(p):
                values = {SYMBOLS[key]: value for key, value in {**given, "r": rank}.items()}
                for quantity in QUANTITIES:
                    if not conditions[quantity].subs(values):
                        continue
                    checked[quantity] += 1
                    formula = float(forms[quantity].subs(values))
                    counted = result[f"{quantity} {rank}" if quantity in ("activations", "versions") else quantity]
                    if quantity == "activations" and name in ("v-half", "v-min", "zb-v"):
                        counted = max(result[f"activations {r}"] for r in range(p))
                    assert counted == pytest.approx(formula), (p, v, m, times, rank, quantity)
    assert min(checked.values()) > 0


def test_symbolic_text(golden):
    golden("schedules/symbolic.txt", "\n\n".join(describe(find_schedule(name)) for name in WITH_FORMS))


def test_solve():
    assert solve(find_schedule("1f1b"), "bubble <= 0.1", 8, 1) == (63, None)
    assert solve(find_schedule("interleaved-1f1b"), "bubble<0.1", 4, 2) == (14, None)
    assert solve(find_schedule("gpipe"), "activations <= 4", 8, 1) == (1, 4)
    assert solve(find_schedule("zb-v"), "bubble <= 0", 4, 2) == (7, None)
    assert solve(find_schedule("zb-h2"), "idle <= 0", 8, 1) == (15, None)
    assert solve(find_schedule("1f1b"), "messages > 100", 2, 1) == (51, None)
    assert solve(find_schedule("1f1b"), "bubble <= 1e-1", 8, 1) == (63, None)


@pytest.mark.parametrize(
    ("name", "wish", "words"),
    [
        ("1f1b", "bubble ~ 0.1", "cannot solve 'bubble ~ 0.1'; expected a quantity"),
        ("1f1b", "bubble <= 0.1e", "and a number, for example 'bubble <= 0.1'"),
        ("1f1b", "bubble < 0", "no number of microbatches below 100,000 gives bubble < 0 with 1f1b on 8 ranks"),
        ("auto", "bubble <= 0.1", "auto has no closed form, its order depends on costs; print it with --timeline"),
    ],
)
def test_what_cannot_be_solved(name, wish, words):
    with pytest.raises(ScheduleError, match=words):
        solve(find_schedule(name), wish, 8, 1)


def test_the_command(capsys):
    assert main(["schedule", "1f1b", "--symbolic"]) == 0
    assert "bubble      =  (p - 1)/(m + p - 1)" in capsys.readouterr().out
    assert main(["schedule", "1f1b", "--solve", "bubble <= 0.1", "--stages", "8"]) == 0
    assert capsys.readouterr().out == "bubble <= 0.1: at least 63 microbatches (1f1b, 8 stages, F = I = W)\n"
    assert main(["schedule", "gpipe", "--solve", "activations <= 4", "--stages", "2"]) == 0
    assert "at least 1 and at most 4 microbatches" in capsys.readouterr().out
