from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipecompile.capture import capture
from pipecompile.cost import NodeCost, cost_graph, owned_reads, read_costs
from pipecompile.errors import CostError
from pipecompile.ir import AttributeInfo, Graph, Node, Parameter, Ref, Spec, Value
from pipecompile.passes.lift import lift
from tests.models import MODELS

MATRIX = Spec((4, 4), "float32", gradient=True)


def op(name: str, *reads: str, spec: Spec = MATRIX, **rest: Any) -> Node:
    refs = tuple(Ref(read) for read in reads)
    return Node(name, "op", "aten.add.Tensor", refs, {}, (Value(name, spec),), reads, **rest)


def graph(*nodes: Node, **rest: Any) -> Graph:
    return Graph((Value("x", Spec((4, 4), "float32")),), nodes, rest.pop("attributes", {}), nodes[-1].name, **rest)


def unit_costs(whole: Graph) -> dict[str, NodeCost]:
    return {node.name: NodeCost(1.0, 2.0, 64, 0.5) for node in whole.nodes}


def test_a_chain_keeps_its_order_and_its_tensors() -> None:
    whole = graph(op("a", "x"), op("b", "a"), op("c", "a", "b"))
    costed = cost_graph(whole, unit_costs(whole), "chain")
    assert costed.members == (("a",), ("b",), ("c",))
    assert costed.graph.edges == ((0, 1), (0, 2), (1, 2))
    assert [(t.name, t.source, t.targets, t.bytes, t.gradient_bytes) for t in costed.graph.tensors] == [
        ("a", 0, (1, 2), 64, 64),
        ("b", 1, (2,), 64, 64),
    ]
    assert costed.cost_node == {"a": 0, "b": 1, "c": 2}


def test_a_tensor_that_nobody_differentiates_sends_nothing_back() -> None:
    whole = graph(op("a", "x", spec=Spec((4,), "int64")), op("b", "a"))
    (tensor,) = cost_graph(whole, unit_costs(whole), "").graph.tensors
    assert (tensor.bytes, tensor.gradient_bytes) == (32, 0)


def test_replicated_nodes_vanish_and_their_reads_pass_through() -> None:
    nodes = (op("mask", "x"), op("a", "x"), op("cheap", "a", "mask"), op("b", "cheap"), op("c", "b", "mask"))
    whole = graph(*nodes, replicated=frozenset({"mask", "cheap"}))
    assert owned_reads(whole) == {"a": frozenset(), "b": frozenset({"a"}), "c": frozenset({"b"})}
    costed = cost_graph(whole, unit_costs(whole), "")
    assert costed.members == (("a",), ("b",), ("c",))
    assert [tensor.name for tensor in costed.graph.tensors] == ["a", "b"]


def test_nodes_kept_together_become_one_with_whatever_lies_between() -> None:
    nodes = (op("a", "x"), op("b", "a"), op("c", "b"), op("d", "c"), op("e", "x"))
    whole = graph(*nodes, together=(("a", "c"),))
    costed = cost_graph(whole, unit_costs(whole), "")
    assert costed.members == (("a", "b", "c"), ("d",), ("e",))
    merged = costed.graph.nodes[0]
    assert (merged.name, merged.forward_ms, merged.backward_ms, merged.weight_ms) == ("a", 3.0, 6.0, 1.5)
    assert merged.saved_bytes == 192
    assert [tensor.name for tensor in costed.graph.tensors] == ["c"]


def test_order_pairs_are_edges_without_tensors() -> None:
    whole = graph(op("a", "x"), op("b", "x"), op("c", "a", "b"), order=(("a", "b"),))
    costed = cost_graph(whole, unit_costs(whole), "")
    assert costed.graph.edges == ((0, 1), (0, 2), (1, 2))
    assert costed.graph.tensors[0].targets == (2,)


def test_an_order_pair_against_program_order_reorders() -> None:
    whole = graph(op("a", "x"), op("b", "x"), op("c", "x"), order=(("c", "b"),))
    assert cost_graph(whole, unit_costs(whole), "").members == (("a",), ("c",), ("b",))


def test_a_parameter_counts_once_by_its_canonical_name() -> None:
    spec = Spec((8, 4), "float32", gradient=True)
    attributes = {
        "embed.weight": AttributeInfo("embed.weight", "embed.weight", "parameter", spec),
        "head.weight": AttributeInfo("head.weight", "embed.weight", "parameter", spec),
        "frozen": AttributeInfo("frozen", "frozen", "parameter", Spec((2,), "float32")),
        "mean": AttributeInfo("mean", "mean", "buffer", Spec((4,), "float32")),
    }
    nodes = (
        op("a", "x", parameters=("embed.weight", "frozen"), buffers=("mean", "lifted")),
        op("b", "a", parameters=("head.weight",)),
    )
    whole = graph(*nodes, attributes=attributes, constants={"lifted": None}, together=(("a", "b"),))
    (merged,) = cost_graph(whole, unit_costs(whole), "").graph.nodes
    assert merged.parameters == (
        Parameter("embed.weight", 128, True),
        Parameter("frozen", 8, False),
        Parameter("mean", 16, False),
    )


@given(st.data())
def test_any_graph_gives_every_owned_node_once_in_a_topological_order(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 12))
    names = [f"n{i}" for i in range(count)]
    nodes = [
        op(name, *data.draw(st.lists(st.sampled_from(["x", *names[:i]]), unique=True, max_size=3)))
        for i, name in enumerate(names)
    ]
    subset = st.lists(st.sampled_from(names), unique=True)
    groups = data.draw(st.lists(subset.map(tuple), max_size=2))
    whole = graph(*nodes, replicated=frozenset(data.draw(subset)), together=tuple(groups))
    costed = cost_graph(whole, unit_costs(whole), "random")  # CostGraph itself refuses an edge that goes back
    owned = [name for name in names if name not in whole.replicated]
    assert sorted(name for group in costed.members for name in group) == sorted(owned)
    place = costed.cost_node
    for group in groups:
        assert len({place[name] for name in group if name in place}) <= 1
    for node, values in owned_reads(whole).items():
        for value in values:
            assert place[value] == place[node] or (place[value], place[node]) in costed.graph.edges


def test_a_node_without_a_cost_is_named() -> None:
    whole = graph(op("a", "x"), op("b", "a"))
    with pytest.raises(CostError, match=r"no cost for 1 of 2 nodes, the first is 'b'; give it one in the cost file"):
        cost_graph(whole, {"a": NodeCost(1, 1)}, "")


def test_a_group_of_unknown_nodes_is_refused() -> None:
    whole = graph(op("a", "x"), together=(("a", "ghost"),))
    with pytest.raises(CostError, match="keeps 'ghost' together with others, but has no such node"):
        cost_graph(whole, unit_costs(whole), "")


def test_an_unknown_parameter_is_refused() -> None:
    whole = graph(op("a", "x", parameters=("ghost.weight",)))
    with pytest.raises(CostError, match=r"node 'a' uses 'ghost.weight', which is no parameter or buffer"):
        cost_graph(whole, unit_costs(whole), "")


@pytest.mark.parametrize("cost", [float("nan"), float("inf"), -1.0])
def test_impossible_costs_are_refused(cost: float) -> None:
    with pytest.raises(CostError, match=r"forward_ms is .*, expected a finite number >= 0"):
        NodeCost(cost, 0.0)


CALLS = graph(
    Node("h", "call", "layers.0", (Ref("x"),), {}, (Value("h", MATRIX),), ("x",)),
    Node("h_1", "call", "layers.0", (Ref("h"),), {}, (Value("h_1", MATRIX),), ("h",)),
    op("y", "h_1"),
)


def test_costs_are_read_by_node_and_by_module(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    nodes = {"layers.0": {"fwd": 1000, "bwd": 2000}, "h_1": {"fwd": 1, "bwd": 2, "saved_bytes": 8, "weight": 1}}
    path.write_text(json.dumps({"unit": "us", "nodes": nodes, "default": {"fwd": 0, "bwd": 0}}))
    assert read_costs(path, CALLS) == {
        "h": NodeCost(1.0, 2.0),
        "h_1": NodeCost(0.001, 0.002, 8, 0.001),
        "y": NodeCost(0.0, 0.0),
    }


def write(path: Path, nodes: dict[str, Any], **rest: Any) -> Path:
    path.write_text(json.dumps({"nodes": nodes, **rest}))
    return path


@pytest.fixture(scope="module")
def cnn() -> Graph:
    model, batch, loss = MODELS["cnn"]()
    return capture(model, batch, loss)


NOTHING = {"fwd": 0, "bwd": 0}


def test_a_module_without_an_entry_costs_what_the_modules_inside_of_it_do(cnn: Graph, tmp_path: Path) -> None:
    inner = {"blocks.0.0": {"fwd": 3, "bwd": 5, "saved_bytes": 8}, "blocks.0.1": {"fwd": 1, "bwd": 1, "weight": 1}}
    path = write(tmp_path / "costs.json", inner, default=NOTHING)
    assert read_costs(path, lift(cnn))["blocks.0@0"] == NodeCost(4, 6, 8, 1)
    opened = read_costs(path, lift(cnn, frozenset({"blocks.0@0"})))
    assert (opened["blocks.0.0@0"], opened["blocks.0.1@0"]) == (NodeCost(3, 5, 8), NodeCost(1, 1, 0, 1))
    assert opened["blocks.0.2@0"] == NodeCost(0, 0)


def test_an_opened_module_s_entry_is_divided_over_its_inside(cnn: Graph, tmp_path: Path) -> None:
    entries = {"blocks.0": {"fwd": 10, "bwd": 20, "weight": 5, "saved_bytes": 1000}}
    path = write(tmp_path / "costs.json", entries, default=NOTHING)
    assert read_costs(path, lift(cnn))["blocks.0@0"] == NodeCost(10, 20, 1000, 5)
    opened = read_costs(path, lift(cnn, frozenset({"blocks.0@0"})))
    parts = [opened[f"blocks.0.{i}@0"] for i in range(3)]
    assert all(part.forward_ms > 0 for part in parts)
    assert sum(part.forward_ms for part in parts) == pytest.approx(10)
    assert sum(part.backward_ms for part in parts) == pytest.approx(20)
    assert sum(part.weight_ms for part in parts) == pytest.approx(5)
    assert sum(part.saved_bytes for part in parts) == pytest.approx(1000, abs=2)


def test_entries_inside_of_an_opened_module_come_off_its_own(cnn: Graph, tmp_path: Path) -> None:
    entries = {"blocks.0": {"fwd": 10, "bwd": 20}, "blocks.0.0": {"fwd": 9, "bwd": 25}}
    path = write(tmp_path / "costs.json", entries, default=NOTHING)
    opened = read_costs(path, lift(cnn, frozenset({"blocks.0@0"})))
    assert opened["blocks.0.0@0"] == NodeCost(9, 25)
    rest = [opened[f"blocks.0.{i}@0"] for i in (1, 2)]
    assert sum(part.forward_ms for part in rest) == pytest.approx(1)
    assert sum(part.backward_ms for part in rest) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", 'has no "nodes" object'),
        ('{"nodes": {}, "unit": "h"}', "its unit is 'h', expected one of s, ms, us"),
        (
            '{"nodes": {"h": {"fwd": 1, "bwd": 1}}}',
            r'no cost for 2 of 3 nodes: h_1, y; add them, the modules around them, or a "default"',
        ),
        ('{"nodes": {"z": {"fwd": 1, "bwd": 1}}}', "names z, which the graph does not have; its nodes are h, h_1, y"),
        ('{"nodes": {"h": {"fwd": 1}}}', """node 'h': {'fwd': 1}, expected {"fwd": .., "bwd": ..}"""),
        ('{"nodes": {"h": {"fwd": 1, "bwd": 1, "f": 1}}}', "node 'h': .*'f': 1}, expected"),
        ('{"nodes": {"h": {"fwd": "1", "bwd": 1}}}', "node 'h': fwd is '1', expected a finite number"),
        ('{"nodes": {"h": {"fwd": -1, "bwd": 1}}}', r"node 'h': forward_ms is -1.0, expected a finite number >= 0"),
    ],
)
def test_a_bad_cost_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(CostError, match=message):
        read_costs(path, CALLS)


def test_a_cost_file_that_is_not_there_is_named() -> None:
    with pytest.raises(CostError, match=r"cost file 'nowhere.json' cannot be read"):
        read_costs("nowhere.json", CALLS)
