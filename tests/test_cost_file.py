"""Cost graph files: what is read is what was written, in any numbering; every mistake is named with its place."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipecompile.cli import main
from pipecompile.errors import CostError
from pipecompile.ir import CostGraph, CostNode, CostTensor, Parameter
from pipecompile.ir.cost_file import cost_graph_to_json, parse_cost_graph, read_cost_graph, write_cost_graph


def whole(**changes: Any) -> dict[str, Any]:
    """A diamond: 0 > 1, 0 > 2, 1 > 3, 2 > 3."""
    return {
        "name": "diamond",
        "unit": "ms",
        "nodes": [{"id": k, "name": f"n{k}", "fwd": 1.0, "bwd": 2, "param_bytes": 4 * k} for k in range(4)],
        "edges": [[0, 1], [0, 2], [1, 3], [2, 3]],
        "tensors": [
            {"src": 0, "bytes": 8, "dst": [1, 2], "kind": "F"},
            {"src": 3, "bytes": 5, "dst": [1], "kind": "B"},
        ],
    } | changes


def test_read(tmp_path: Path):
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(whole()))
    found = read_cost_graph(path)
    nodes = tuple(CostNode(f"n{k}", 1.0, 2.0, (Parameter(f"n{k}#{k}", 4 * k),) if k else ()) for k in range(4))
    tensors = (CostTensor("F0", 0, (1, 2), 8), CostTensor("B3", 3, (1,), 5, 0, "B"))
    assert found.graph == CostGraph("diamond", nodes, ((0, 1), (0, 2), (1, 3), (2, 3)), tensors)
    assert found.position == (0, 1, 2, 3)


def test_written_is_read(tmp_path: Path):
    shared, frozen = Parameter("w", 8), Parameter("f", 4, trainable=False)
    nodes = (CostNode("a", 1.5, 2.0, (shared, frozen), 7, 0.5), CostNode("b", 0.0, 0.0, (shared,)))
    graph = CostGraph("g", nodes, ((0, 1),), (CostTensor("t", 0, (1,), 16, 12), CostTensor("g", 1, (0,), 2, 0, "B")))
    write_cost_graph(graph, tmp_path / "g.json")
    assert read_cost_graph(tmp_path / "g.json").graph == graph


def test_any_numbering():
    """Ids that are not a topological order: the stages come back in the file's numbering."""
    backwards = whole(edges=[[3, 2], [3, 1], [2, 0], [1, 0]], tensors=[{"src": 3, "bytes": 8, "dst": [1, 2]}])
    found = parse_cost_graph(backwards)
    assert [node.name for node in found.graph.nodes] == ["n3", "n1", "n2", "n0"]
    assert found.by_id((0, 1, 2, 3)) == [3, 1, 2, 0]
    assert found.graph.tensors[0].source == 0
    assert parse_cost_graph(cost_graph_to_json(found.graph)).graph == found.graph


def bad(key: str, index: int, **changes: Any) -> dict[str, Any]:
    """The diamond with one entry of a list changed; a value None takes the key away."""
    entries = [dict(entry) for entry in whole()[key]]
    entries[index] = {k: v for k, v in (entries[index] | changes).items() if v is not None}
    return whole(**{key: entries})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "the file is list, expected an object with 'nodes'"),
        ({"edges": []}, "the file has no 'nodes'; expected edges and nodes"),
        (
            whole(edges=[[0, 1], [1, 2], [2, 0]], tensors=[]),
            r"has a cycle: n0 \(0\) > n1 \(1\) > n2 \(2\) > n0 \(0\); it must be acyclic",
        ),
        (whole(edges=[[1, 0]]), r"has a cycle: n0 \(0\) > n1 \(1\) > n0 \(0\)"),
        (whole(edges=[[2, 2]]), r"has a cycle: n2 \(2\) > n2 \(2\)"),
        (whole(edges=[[0, 4]]), r"edges\[0\] names node 4, which is not there; ids go from 0 to 3"),
        (whole(edges=[[0, 1], [0]]), r"edges\[1\] is \[0\], expected two node ids"),
        (whole(edges={}), "the file: 'edges' is {}, expected list"),
        (bad("nodes", 2, fwd=-1.0), r"nodes\[2\]: node 'n2': its forward time is -1.0, expected a finite number >= 0"),
        (bad("nodes", 1, bwd=float("nan")), r"nodes\[1\]: node 'n1': its backward time is nan"),
        (bad("nodes", 1, fwd="1"), r"nodes\[1\]: 'fwd' is '1', expected float"),
        (bad("nodes", 1, fwd=None), r"nodes\[1\] has no 'fwd'; expected id/name/bwd/param_bytes and fwd"),
        (bad("nodes", 1, param_bytes=-4), r"nodes\[1\]: 'param_bytes' is -4.0, expected a number of bytes >= 0"),
        (bad("nodes", 1, id=7), r"nodes\[1\]: id 7 of 'n1', expected ids 0 to 3"),
        (bad("nodes", 1, id=2), r"nodes\[1\]: id 2 of 'n1' is also the id of 'n2'"),
        (bad("tensors", 0, bytes=-1), r"tensors\[0\]: 'bytes' is -1.0, expected a number of bytes >= 0"),
        (bad("tensors", 0, dst=[9]), r"tensors\[0\] names node 9, which is not there"),
        (bad("tensors", 0, dst=["a"]), r"tensors\[0\]: 'dst' is \['a'\], expected a list of node ids"),
        (bad("tensors", 1, kind="C"), r"tensors\[1\]: 'kind' is 'C', expected 'F' \(activation\) or 'B' \(gradient\)"),
    ],
)
def test_mistakes(tmp_path: Path, content: Any, message: str):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(content))
    with pytest.raises(CostError, match=r"bad\.json: .*" + message):
        read_cost_graph(path)


def test_not_json(tmp_path: Path):
    path = tmp_path / "bad.json"
    path.write_text('{"nodes": [\n  {"id": 0,, }\n]}')
    with pytest.raises(CostError, match=r"bad.json' cannot be read as JSON: .* at line 2, column 12; mend it"):
        read_cost_graph(path)
    path.write_text("[" * 100_000)
    with pytest.raises(CostError, match="nested too deep"):
        read_cost_graph(path)
    with pytest.raises(CostError, match=r"cost graph '.*none.json' cannot be read: .*No such file"):
        read_cost_graph(tmp_path / "none.json")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(whole(edges=[[3, 2], [3, 1], [2, 0], [1, 0]], tensors=[])))
    assert main(["partition", str(path), "--stages", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() >= {"stage", "bottleneck", "bytes", "bound", "seconds"}
    assert (found["bottleneck"], found["bytes"]) == (6.0, 0)
    assert found["bound"] == {"bottleneck": 6.0, "bytes": 0}
    assert (found["stage"][3], found["stage"][0]) == (0, 1)

    assert main(["partition", str(path), "--stages", "2"]) == 0
    assert "bottleneck 6.000 ms, at least 6.000 ms is needed" in capsys.readouterr().out

    assert main(["partition", str(path), "--stages", "9"]) == 1
    assert capsys.readouterr().err.startswith("pipecompile: 9 stages asked for, but graph 'diamond' has 4 nodes")
    assert main(["partition", str(path), "--stages", "2", "--speeds", "1;2"]) == 1
    assert "--speeds is '1;2', expected numbers with commas between" in capsys.readouterr().err


def test_nothing_but_the_result_on_stdout():
    """What native code writes to the process's stdout goes to its stderr."""
    code = (
        "import os\n"
        "from pipecompile.cli.partition import native_output_on_stderr\n"
        "with native_output_on_stderr():\n"
        "    os.write(1, b'noise')\n"
        "print('result')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("result\n", "noise")
