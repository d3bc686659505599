"""Why a partition is what it is: golden numbers on a graph small enough to check by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipecompile.cli import main
from pipecompile.ir import CostGraph, CostNode, CostTensor, Parameter
from pipecompile.ir.cost_file import write_cost_graph
from pipecompile.passes.partitioners import evaluate_answer, pose, solve
from pipecompile.passes.partitioners.explain import explain

#   a ─10─ b ─4─ c ─6─ d        c and a share a parameter; a's result is also read by d (2 bytes, not on the chain)
WEIGHT = Parameter("tied.weight", 100)
GRAPH = CostGraph(
    "chain",
    (CostNode("a", 2, 2, (WEIGHT,)), CostNode("b", 2, 2), CostNode("c", 2, 2, (WEIGHT,)), CostNode("d", 1, 2)),
    ((0, 1), (1, 2), (2, 3)),
    (
        CostTensor("ab", 0, (1,), 5, 5),
        CostTensor("bc", 1, (2,), 2, 2),
        CostTensor("cd", 2, (3,), 6),
        CostTensor("skip", 0, (3,), 2),
    ),
)


def test_text():
    problem = pose(GRAPH, 2, tolerance=0.6)
    why = explain(GRAPH, problem, evaluate_answer(GRAPH, problem, solve(problem)))
    assert str(why).splitlines() == [
        "cut 0 | 1: 6 bytes",
        "    bc: stage 0 > 1, 2 bytes, gradient 2",
        "    skip: stage 0 > 1, 2 bytes",
        "    next best: c on the other side, +2 bytes, slowest stage 12.000 ms",
        "slowest: stage 0; largest node: a, 4 ms, is not the bottleneck by itself",
        "in several stages: tied.weight",
        "time: at the proved bound; bytes: at the proved bound",
    ]


def test_tight():
    """At no tolerance no other cut is possible; a node that fills the slowest stage is the bottleneck."""
    problem = pose(GRAPH, 4, tolerance=0.0)
    why = explain(GRAPH, problem, evaluate_answer(GRAPH, problem, solve(problem)))
    assert why.largest_is_bottleneck
    assert [cut.next_best for cut in why.cuts] == [None, None, None]
    assert "no other cut here is within the limits" in str(why)
    assert why.cuts[1].crossing == (("bc", 1, 2, 2, 2), ("skip", 0, 3, 2, 0))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "graph.json"
    write_cost_graph(GRAPH, path)
    arguments = ["partition", str(path), "--stages", "2", "--tolerance", "0.6", "--explain"]
    assert main([*arguments, "--json", "--bandwidths", "2", "--memory", "1KiB"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["explain"]["cuts"][0]["next_best"]["more_bytes"] == 2
    assert (found["traffic"], found["bound_traffic"]) == (6, 6)
    assert main(arguments) == 0
    assert "next best: c on the other side" in capsys.readouterr().out
