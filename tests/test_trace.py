"""The trace of a forecast: tracks, times in microseconds, an arrow for each message."""

from __future__ import annotations

import json

import pytest

from pipecompile.cli import main
from pipecompile.ir import Shape
from pipecompile.passes.communicate import chain, communicate
from pipecompile.passes.schedules import make_timetable
from pipecompile.simulate import Link, simulate
from pipecompile.trace import chrome_trace


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
