"""The trace of a forecast: tracks, times in microseconds, an arrow for each message."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from pipecompile.cli import main
from pipecompile.ir import Shape
from pipecompile.passes.communicate import chain, communicate
from pipecompile.passes.schedules import make_timetable
from pipecompile.simulate import Link, simulate
from pipecompile.trace import chrome_trace, run_trace
from tests.runtime.processes import run


def test_events():
    program = communicate(make_timetable("1f1b", Shape(2, 2, 1)), chain(2))
    events = chrome_trace(program, simulate(program, chain(2), Link(0.5)))["traceEvents"]
    names = {(e["pid"], e["args"]["name"]) for e in events if e["name"] == "process_name"}
    assert names == {(0, "rank 0"), (1, "rank 1")}
    whole = {e["name"]: (e["pid"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"}
    assert whole["0F0"] == (0, 0, 1000)
    assert whole["0SEND_F0>1"] == (0, 1000, 500)
    assert whole["1F0"] == (1, 1500, 1000)
    assert whole["1RECV_F0<0"] == (1, 1000, 500)
    starts = {e["id"]: e for e in events if e["ph"] == "s"}
    ends = {e["id"]: e for e in events if e["ph"] == "f"}
    assert set(starts) == set(ends) == {"F0 0>1", "B0 1>0"}
    assert all(starts[key]["ts"] + 500 == ends[key]["ts"] for key in starts)


def test_the_command_writes_it(tmp_path, capsys):
    path = tmp_path / "trace.json"
    assert main(["schedule", "zb-h1", "--stages", "2", "--microbatches", "2", "--trace", str(path)]) == 0
    trace = json.loads(path.read_text())
    assert trace["displayTimeUnit"] == "ms"
    held = [e["args"]["bytes"] for e in trace["traceEvents"] if e["ph"] == "C" and e["pid"] == 0]
    assert held[1] - held[0] == pytest.approx(1_000_000, abs=10)
    assert len(held) == 6
    assert capsys.readouterr().out.startswith("0F0 ")


def test_what_ran_stands_beside_what_was_planned():
    program = communicate(make_timetable("1f1b", Shape(2, 2, 1)), chain(2))
    forward, receive = program.rows[1][1], program.rows[1][0]
    ran = [[(program.rows[0][0], 0.0, 2.0)], [(receive, 0.5, 2.5), (forward, 2.5, 3.0)]]
    events = run_trace(program, simulate(program, chain(2), Link(0.5)), ran)["traceEvents"]
    tracks = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert tracks == {(0, 0): "planned", (0, 1): "ran", (1, 0): "planned", (1, 1): "ran"}
    whole = {(e["pid"], tracks[e["pid"], e["tid"]], e["name"]): (e["ts"], e["dur"]) for e in events if e["ph"] == "X"}
    assert whole == {
        (0, "planned", "0F0"): (0, 1000),
        (1, "planned", "1F0"): (1500, 1000),
        (1, "planned", "1B0"): (2500, 2000),
        (0, "planned", "0B0"): (5000, 2000),
        (0, "ran", "0F0"): (0, 2000),
        (1, "ran", "1RECV_F0<0"): (500, 2000),
        (1, "ran", "1F0"): (2500, 500),
    }


MODEL = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))

def batch():
    return {"input": torch.ones(4, 8)}

def loss(model, batch):
    return model(**batch).square().mean()

def optimizer(parameters):
    return torch.optim.SGD(parameters, lr=0.01)
"""


def on_a_rank(rank, words):
    return main(words)


@pytest.mark.parametrize("where", ["local", "processes"])
def test_a_run_writes_it(where, tmp_path, capfd):
    (tmp_path / "model.py").write_text(MODEL)
    build, path = str(tmp_path / "build"), tmp_path / "trace.json"
    compiled = ["--stages", "2", "--microbatches", "2", "--costs", "estimate", "--out", build]
    assert main([str(tmp_path / "model.py"), *compiled]) == 0
    words = ["run", build, "--steps", "2", "--trace", str(path), "--trace-step", "0"]
    if where == "local":
        assert main([*words, "--local"]) == 0
    else:
        assert run(on_a_rank, 2, words) == [0, 0]
    trace = json.loads(path.read_text())["traceEvents"]
    program = json.loads((tmp_path / "build" / "program.json").read_text())["programs"]
    for rank in (0, 1):
        ran = [e for e in trace if e["ph"] == "X" and e["pid"] == rank and e["tid"] == 1]
        assert [e["args"] for e in ran] == program[rank]
        assert all(before["ts"] + before["dur"] <= after["ts"] for before, after in pairwise(ran))
        planned = [e["args"] for e in trace if e["ph"] == "X" and e["pid"] == rank and e["tid"] == 0]
        assert planned == [one for one in program[rank] if one["op"] in ("FORWARD", "BACKWARD")]
    ends = {(e["pid"], e["name"]): (e["ts"], e["ts"] + e["dur"]) for e in trace if e["ph"] == "X" and e["tid"] == 1}
    slack = 2e5  # microseconds in which processes leave a barrier, on a busy machine too
    assert ends[1, "1RECV_F0<0"][1] >= ends[0, "0SEND_F0>1"][0] - slack, "clocks are aligned"


def test_a_step_that_is_not_taken_cannot_be_traced(tmp_path, capsys):
    (tmp_path / "model.py").write_text(MODEL)
    build = str(tmp_path / "build")
    main([str(tmp_path / "model.py"), "--stages", "2", "--microbatches", "2", "--costs", "estimate", "--out", build])
    assert main(["run", build, "--local", "--steps", "2", "--trace", "t.json", "--trace-step", "2"]) == 1
    assert (
        "--trace-step 2 of 2 steps cannot be traced; expected --trace FILE, and a step from 0 to 1"
        in capsys.readouterr().err
    )
    nowhere = str(tmp_path / "none" / "t.json")
    assert main(["run", build, "--local", "--steps", "1", "--trace", nowhere]) == 1
    assert "cannot be written" in capsys.readouterr().err
