"""Every schedule: its golden text, its closed forms at equal costs, and what it refuses."""

from __future__ import annotations

import json
import sys
import textwrap

import pytest

from pipecompile.cli import main
from pipecompile.errors import ScheduleError
from pipecompile.ir import Instruction, Program, Routes, Shape, StageCost, Timetable
from pipecompile.passes.communicate import chain, communicate
from pipecompile.passes.schedules import check_shape, find_schedule, make_timetable, schedule_names
from pipecompile.passes.verify import verify
from pipecompile.simulate import Link, compute_spans, needs, simulate
from pipecompile.timeline import computations, draw

PER_RANK = {"interleaved-1f1b": 2, "looped-bfs": 2, "zb-v": 2, "v-half": 2, "v-min": 2, "dualpipe-v": 2}
LEAST = {"dualpipe-v": 2}  # microbatches for each rank
DRAWN = {
    "gpipe": Shape(3, 3, 4),
    "1f1b": Shape(3, 3, 4),
    "eager-1f1b": Shape(3, 3, 6),
    "interleaved-1f1b": Shape(4, 2, 4),
    "looped-bfs": Shape(4, 2, 3),
    "zb-h1": Shape(3, 3, 6),
    "zb-h2": Shape(3, 3, 6),
    "zb-v": Shape(4, 2, 5),
    "v-half": Shape(8, 4, 4),
    "v-min": Shape(8, 4, 4),
    "dualpipe-v": Shape(4, 2, 5),
    "pipedream": Shape(3, 3, 6),
    "pipedream-2bw": Shape(3, 3, 6),
}
RANKS = (2, 4, 8, 16)
SIZES = [(p, m) for p in RANKS for m in range(1, 4 * p + 1) if p < 16 or m in (1, 7, 15, 16, 17, 31, 32, 33, 50, 64)]


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


def gap(timetable: Timetable, forward_ms: float, input_ms: float, weight_ms: float) -> float:
    """Idle time between a rank's first and last computation, of the rank that idles most; costs as for ``idle``."""
    shape = timetable.shape
    each = shape.stages // shape.ranks
    cost = StageCost(forward_ms / each, (input_ms + weight_ms) / each, weight_ms / each)
    spans = compute_spans(timetable.rows, Routes.of(chain(shape.stages)), (cost,) * shape.stages)
    busy = (forward_ms + input_ms + weight_ms) * shape.microbatches
    return max(max(spans[one][1] for one in row) - spans[row[0]][0] - busy for row in timetable.rows)


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
def test_only_what_says_so_adapts_to_costs(name: str) -> None:
    shape = shape_for(name, 4, 8)
    costs = [StageCost(1 + s % 3, 3 - s % 2, 0.5 + s % 2) for s in range(shape.stages)]
    assert (make_timetable(name, shape, costs).rows != make_timetable(name, shape).rows) == find_schedule(name).adapts


@pytest.mark.parametrize("name", [name for name in schedule_names() if name != "auto"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_shape_is_safe(name, ranks):
    for microbatches in range(LEAST.get(name, 0) * ranks + 1, 2 * ranks + 3):
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


def test_eager_1f1b_closed_forms():
    for p, m in SIZES:
        timetable = make_timetable("eager-1f1b", Shape(p, p, m))
        assert idle(timetable, 1, 2, 2) == [(p - 1) * 5] * p
        assert [peak_activations(row) for row in timetable.rows] == [min(m, 2 * (p - r) - 1) for r in range(p)]


def test_eager_1f1b_hides_messages():
    late = {
        name: simulate(communicate(make_timetable(name, Shape(4, 4, 32)), chain(4)), chain(4), Link(1.0)).step_ms
        for name in ("1f1b", "eager-1f1b")
    }
    assert late["eager-1f1b"] == 3 * 32 + 3 * 3 + 3 * 2
    assert late["1f1b"] > late["eager-1f1b"] + 10


@pytest.mark.parametrize("v", [1, 2, 3])
def test_looped_bfs_closed_forms(v):
    for p, m in SIZES:
        timetable = make_timetable("looped-bfs", Shape(p * v, p, m))
        assert gap(timetable, v, v, v) == 3 * (v * max(0, p - m) + min(m, p) - 1)
        if m >= p:
            assert idle(timetable, v, v, v) == [(p - 1) * 3] * p
        assert [peak_activations(row) for row in timetable.rows] == [m * v] * p


@pytest.mark.parametrize(("forward", "inputs", "weights"), [(1, 1, 1), (3, 4, 2), (4, 3, 3)])
def test_zero_bubble_closed_forms(forward, inputs, weights):
    for p, m in SIZES:
        for name, k in (("zb-h1", min(m, p)), ("zb-h2", min(m, 2 * p - 1))):
            timetable = make_timetable(name, Shape(p, p, m))
            bubble = (p - 1) * (forward + inputs) - (k - 1) * weights
            assert gap(timetable, forward, inputs, weights) == max(0, bubble)
            assert max(peak_activations(row) for row in timetable.rows) == k
            if name == "zb-h1" and m >= p:
                assert bubble == (p - 1) * (forward + inputs - weights)


def test_zb_v_closed_forms():
    for p, m in SIZES:
        timetable = make_timetable("zb-v", Shape(2 * p, p, m))
        few = max(4 * p - 1 - 4 * m, 2 * p - 1 - min(m, p))
        assert gap(timetable, 2, 2, 2) == (0 if m >= 2 * p - 1 else few)
        assert max(peak_activations(row) for row in timetable.rows) == 2 * min(m, p)
        if m >= 2 * p - 1:
            assert max(idle(timetable, 2, 2, 2)) == p - 1
            assert {peak_activations(row) for row in timetable.rows} == {2 * p}


@pytest.mark.parametrize(
    ("p", "m"),
    [(p, m) for p in (2, 4, 8) for m in range(1, 4 * p + 1)]
    + [(16, m) for m in (1, 8, 15, 16, 17, 33, 64)]
    + [(p, m) for p in (3, 5, 6, 7) for m in (p, 2 * p + 1)],
)
def test_v_half_and_v_min_closed_forms(p, m):
    """Activations exactly as the paper says; idle time exactly, and at most the paper's 1/2 and 2/3 of 1F1B's."""
    half = {2: 1, 3: 3, 4: 5, 5: 9}.get(p, 3 * p - 5)
    least = {2: 1, 3: 5, 4: 11, 5: 11}.get(p, 4 * p - 5)
    for name, held, share, wait in (("v-half", p + 2, 1 / 2, half), ("v-min", 2 * ((p + 4) // 3), 2 / 3, least)):
        timetable = make_timetable(name, Shape(2 * p, p, m))
        assert max(peak_activations(row) for row in timetable.rows) == min(held, 2 * m)
        if m >= p:
            assert max(idle(timetable, 2, 2, 2)) == wait <= share * (p - 1) * 6
        else:
            assert wait <= max(idle(timetable, 2, 2, 2)) <= 4 * p - 5


def test_zb_v_with_few_microbatches_beats_the_drawn_order():
    timetable = make_timetable("zb-v", Shape(8, 4, 4))
    assert max(idle(timetable, 2, 2, 2)) == 3
    assert max(peak_activations(row) for row in timetable.rows) <= 8


@pytest.mark.parametrize("name", ["zb-v", "v-half", "v-min"])
def test_v_schedules_adapt_to_costs(name):
    """Stages of unequal cost: never slower than the order made for equal ones."""
    costs = [StageCost(1 + s % 3 / 4, 1.9 + s % 2 / 3, 0.8) for s in range(8)]
    shape = Shape(8, 4, 12)
    adapted, blind = make_timetable(name, shape, costs), make_timetable(name, shape)
    times = [compute_spans(t.rows, Routes.of(chain(8)), costs) for t in (adapted, blind)]
    ends = [max(end for _, end in spans.values()) for spans in times]
    assert ends[0] <= ends[1] if name == "v-min" else ends[0] < ends[1]
    held = {"zb-v": 8, "v-half": 6, "v-min": 4}[name]
    assert max(peak_activations(row) for row in adapted.rows) <= held


def test_dualpipe_v_closed_forms():
    for p, m in SIZES:
        if m >= 2 * p:
            timetable = make_timetable("dualpipe-v", Shape(2 * p, p, m))
            assert {peak_activations(row) for row in timetable.rows} == {2 * p + 1}
            for f, i, w in ((2, 2, 2), (6, 6, 4)):
                assert gap(timetable, f, i, w) == (p - 1) * (f + i - w) / 2


def fused_gap(timetable: Timetable, forward: int, inputs: int, weights: int) -> float:
    """``gap`` with costs for each stage, where a forward and the whole backward behind it of the other stage are one."""
    times = {"FORWARD": forward, "BACKWARD": inputs + weights, "BACKWARD_INPUT": inputs, "BACKWARD_WEIGHT": weights}
    routes = Routes.of(chain(timetable.shape.stages))
    rows = []
    for row in timetable.rows:
        units: list[tuple[Instruction, ...]] = []
        for one in row:
            pair = one.op == "BACKWARD" and units[-1][-1].op == "FORWARD" and units[-1][-1].stage != one.stage
            units = [*units[:-1], (*units[-1], one)] if pair else [*units, (one,)]
        rows.append(units)
    ends: dict[tuple[str, int, int], float] = {}
    at, clock, busy, begin = ([0] * len(rows) for _ in range(4))
    while any(at[r] < len(row) for r, row in enumerate(rows)):
        for r, row in enumerate(rows):
            while at[r] < len(row):
                wanted = [key for one in row[at[r]] for key, _ in needs(one, routes)]
                if any(key not in ends for key in wanted):
                    break
                start = max([clock[r], *(ends[key] for key in wanted)])
                begin[r] = start if at[r] == 0 else begin[r]
                work = sum(times[one.op] for one in row[at[r]])
                clock[r], busy[r], at[r] = start + work, busy[r] + work, at[r] + 1
                for one in row[at[r] - 1]:
                    if one.op != "BACKWARD_WEIGHT":
                        ends["F" if one.op == "FORWARD" else "B", one.stage, one.microbatch] = clock[r]
    return max(end - first - work for end, first, work in zip(clock, begin, busy))


@pytest.mark.parametrize(("f", "i", "w"), [(1, 1, 1), (3, 3, 2)])
def test_dualpipe_v_with_pairs_as_one_operation(f, i, w):
    """DeepSeek's closed form: (PP/2-1)(F&B + B - 3W), where F&B = F + B."""
    for p, m in ((2, 4), (2, 7), (4, 8), (4, 16), (8, 16)):
        timetable = make_timetable("dualpipe-v", Shape(2 * p, p, m))
        assert fused_gap(timetable, f, i, w) == (p - 1) * (f + (i + w) + (i + w) - 3 * w)


PAPER = [  # ranks, microbatches, F, I, W, message in ms; bubble rates of 1F1B, ZB-H1, ZB-H2 (arXiv 2401.10241)
    (8, 24, 18.522, 18.086, 9.337, 0.601, 0.2431, 0.1585, 0.1083),
    (8, 64, 18.546, 18.097, 9.321, 0.762, 0.1240, 0.0674, 0.0444),
    (16, 48, 11.347, 11.248, 8.132, 0.377, 0.2552, 0.1397, 0.0672),
    (32, 96, 10.419, 10.207, 7.715, 0.408, 0.2646, 0.1421, 0.0641),
]


@pytest.mark.parametrize(("p", "m", "f", "i", "w", "latency", "plain", "h1", "h2"), PAPER)
def test_bubble_rates_of_the_zero_bubble_paper(p, m, f, i, w, latency, plain, h1, h2):
    partition = chain(p, [StageCost(f, i + w, w)] * p)
    for name, rate in (("1f1b", plain), ("zb-h1", h1), ("zb-h2", h2)):
        program = communicate(make_timetable(name, Shape(p, p, m)), partition)
        lines = computations(program.rows, simulate(program, partition, Link(latency)))
        longest = max(line[-1][1].end_ms - line[0][1].start_ms for line in lines)
        assert 1 - m * (f + i + w) / longest == pytest.approx(rate, abs=1e-3), name


@pytest.mark.parametrize("name", DRAWN)
def test_the_timeline_in_the_docstring_is_true(name):
    timetable = make_timetable(name, DRAWN[name])
    partition = chain(timetable.shape.stages)
    program = communicate(timetable, partition)
    order = find_schedule(name).order
    picture = draw(program.rows, program.shape, simulate(program, partition))
    assert textwrap.indent(picture, "    ") in sys.modules[order.__module__].__doc__


@pytest.mark.parametrize("v", [2, 3])
def test_interleaved_closed_forms(v):
    for p, m in SIZES:
        if p * v > 32:
            continue
        timetable = make_timetable("interleaved-1f1b", Shape(p * v, p, m))
        assert gap(timetable, v, v, v) == 3 * (v * max(0, p - m) + min(m, p) - 1)
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
    for ask in (make_timetable, check_shape):
        with pytest.raises(ScheduleError, match=words):
            ask(name, shape)


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


def test_the_command_draws_a_timeline(capsys):
    assert main(["schedule", "1f1b", "--stages", "2", "--microbatches", "2", "--timeline"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["rank", "0", "0", "1", "0", "1", "33.3%", "idle"]
    assert lines[1] == ["rank", "1", "0", "0", "1", "1", "33.3%", "idle"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--stages", "2"], "no schedule named; choose one of 1f1b, "),
        (["1f1b"], "--stages is missing; say how many stages the model has"),
        (["1f1b", "--stages", "2", "--costs", "1,2"], "costs '1,2'; expected three numbers F,I,W"),
        (["1f1b", "--stages", "2", "--costs=-1,2,1"], "costs '-1,2,1' are not all positive, up to 1e+09; give F,I,W"),
        (["zb-v", "--stages", "4", "--costs", "nan,1,1"], "costs 'nan,1,1' are not all positive"),
        (["zb-v", "--stages", "4", "--costs", "inf,1,1"], "costs 'inf,1,1' are not all positive"),
        (["1f1b", "--stages", "2", "--latency", "-1"], "--latency -1.0; expected milliseconds from 0 to 1e+09"),
        (["1f1b", "--stages", "2", "--latency", "nan", "--timeline"], "--latency nan; expected milliseconds"),
        (["1f1b", "--stages", "2", "--trace", "/none/x.json"], "'/none/x.json' cannot be written: No such file"),
        (["1f1b", "--stages", "2", "--torch-csv", "/none/x.csv"], "'/none/x.csv' cannot be written: No such file"),
        (["1f1b", "--schedule", "gpipe", "--stages", "2"], "'1f1b' and 'gpipe' are two schedules; name one of them"),
        (["1f1b", "--from-csv", "x.csv", "--symbolic"], "'1f1b' and 'x.csv' are two schedules; name one of them"),
        (["--from-csv", "x.csv", "--stages", "9"], "--from-csv says the order, stages, ranks and microbatches itself"),
        (
            ["1f1b", "--stages", "2", "--microbatches", "1000000000"],
            "more than 10,000,000 forwards, the largest program",
        ),
        (["1f1b", "--stages", "2", "--microbatches", "0"], "microbatches is 0, expected at least 1"),
        (["auto", "--stages", "3", "--microbatches", "3", "--activations", "1"], ""),
    ],
)
def test_what_the_command_refuses(arguments, words, capsys):
    assert main(["schedule", *arguments]) == (1 if words else 0)
    assert words in capsys.readouterr().err
