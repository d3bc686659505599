from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipecompile.cost import estimate, measure
from pipecompile.errors import CostError
from pipecompile.ir import Attribute, AttributeInfo, Graph, Node, Ref, Spec, Value
from pipecompile.machine import Machine, find_machine
from pipecompile.passes.lift import lift
from tests.compiled import case, traced

X = Spec((8, 32), "float32", gradient=True)
# 1 FLOP a ms in float32, 2 in bfloat16; moving and launching are free, so that a time is a number of FLOPs
COUNTER = Machine("flops", {"float32": 1e3, "bfloat16": 2e3}, 1e30, 1, 1e9, 0.0, 0.0, 1.0, 1.0)
# 1 byte a ms; computing and launching are free
MOVER = Machine("bytes", {"float32": 1e30}, 1e3, 1, 1e9, 0.0, 0.0, 1.0, 1.0)
# 1 ms a kernel; all else is free
LAUNCHER = Machine("launches", {"float32": 1e30}, 1e30, 1, 1e9, 0.0, 1e3, 1.0, 1.0)


def op(name: str, target: str, *args: Any, spec: Spec = X, **rest: Any) -> Node:
    reads = tuple(arg.name for arg in args if isinstance(arg, Ref))
    return Node(name, "op", target, args, {}, (Value(name, spec),), reads, **rest)


def graph(
    *nodes: Node, weights: Mapping[str, Spec] | None = None, inputs: Mapping[str, Spec] | None = None, **rest: Any
) -> Graph:
    values = tuple(Value(name, spec) for name, spec in (inputs or {"x": X}).items())
    attributes = {fqn: AttributeInfo(fqn, fqn, "parameter", spec) for fqn, spec in (weights or {}).items()}
    return Graph(values, nodes, attributes, nodes[-1].name, **rest)


WEIGHT = {"w": Spec((64, 32), "float32", gradient=True)}
PRODUCT = op("y", "aten.linear.default", Ref("x"), Attribute("w"), spec=Spec((8, 64), "float32", gradient=True))
FLOPS = 2 * 8 * 32 * 64


def test_a_matrix_product_costs_its_flops_and_twice_as_many_back() -> None:
    (cost,) = estimate(graph(PRODUCT, weights=WEIGHT), COUNTER).values()
    assert astuple(cost) == pytest.approx((FLOPS, 2 * FLOPS, 8 * 32 * 4, FLOPS, 0))


def test_half_precision_runs_at_its_own_peak() -> None:
    half = {"x": replace(X, dtype="bfloat16")}
    weights = {"w": replace(WEIGHT["w"], dtype="bfloat16")}
    (cost,) = estimate(graph(PRODUCT, inputs=half, weights=weights), COUNTER).values()
    assert cost.forward_ms == pytest.approx(FLOPS / 2)


def test_autocast_is_seen_from_the_dtype_of_the_result() -> None:
    result = (Value("y", Spec((8, 64), "bfloat16", gradient=True)),)
    node = replace(PRODUCT, outputs=result, context=("torch.autocast('cuda', dtype=torch.bfloat16)",))
    (cost,) = estimate(graph(node, weights=WEIGHT), COUNTER).values()
    assert (cost.forward_ms, cost.saved_bytes) == (pytest.approx(FLOPS / 2), 8 * 32 * 2 + 64 * 32 * 2)


def test_an_elementwise_operation_costs_its_traffic() -> None:
    (cost,) = estimate(graph(op("y", "aten.tanh.default", Ref("x"))), MOVER).values()
    size = 8 * 32 * 4
    assert astuple(cost) == pytest.approx((2 * size, 3 * size, size, 0.0, 0))


def test_views_are_free_and_every_other_kernel_is_launched() -> None:
    nodes = (
        op("v", "aten.view.default", Ref("x"), [4, 64], spec=Spec((4, 64), "float32", gradient=True)),
        op("t", "aten.tanh.default", Ref("v"), spec=Spec((4, 64), "float32", gradient=True)),
    )
    costs = estimate(graph(*nodes), LAUNCHER)
    assert [(cost.forward_ms, cost.backward_ms) for cost in costs.values()] == [
        (0.0, 0.0),
        pytest.approx((1.0, 1.0)),
    ]


def test_nothing_flows_back_without_gradients() -> None:
    plain = {"x": replace(X, gradient=False)}
    (cost,) = estimate(graph(op("y", "aten.tanh.default", Ref("x"), spec=plain["x"]), inputs=plain), MOVER).values()
    assert (cost.backward_ms, cost.saved_bytes) == (0.0, 0)
    silent = op("y", "aten.tanh.default", Ref("x"), spec=plain["x"], context=("torch.no_grad()",))
    (cost,) = estimate(graph(silent), MOVER).values()
    assert (cost.backward_ms, cost.saved_bytes) == (0.0, 0)


def test_a_call_costs_what_is_inside_of_it() -> None:
    inside = (
        replace(PRODUCT, outputs=(Value("h", Spec((8, 64), "float32", gradient=True)),)),
        op("y", "aten.relu_.default", Ref("h"), spec=Spec((8, 64), "float32", gradient=True), writes=("h",)),
    )
    node = Node("m@0", "call", "m", (Ref("x"),), {}, (inside[1].outputs), ("x",), ("w",), inside=inside)
    (cost,) = estimate(graph(node, weights=WEIGHT), COUNTER).values()
    # the input of the product, and the result of relu_ in the product's own memory
    assert (cost.forward_ms, cost.saved_bytes) == (pytest.approx(FLOPS), 8 * 32 * 4 + 8 * 64 * 4)


def test_attention_is_one_kernel() -> None:
    batch, heads, groups, length, size = 2, 4, 2, 16, 8
    query, key = (Spec((batch, h, length, size), "float32", gradient=True) for h in (heads, groups))
    node = op("y", "aten.scaled_dot_product_attention.default", Ref("q"), Ref("k"), Ref("v"), spec=query)
    whole = graph(node, inputs={"q": query, "k": key, "v": key})
    one = 2 * batch * heads * length * length * size
    cost = estimate(whole, COUNTER)["y"]
    assert (cost.forward_ms, cost.backward_ms) == (pytest.approx(2 * one), pytest.approx(5 * one))
    assert cost.saved_bytes == 2 * (query.bytes + key.bytes), "no length x length matrix is kept"
    cost = estimate(whole, LAUNCHER)["y"]
    assert (cost.forward_ms, cost.backward_ms) == pytest.approx((1.0, 1.0))


@pytest.mark.parametrize("target", ["aten.nonzero.default", "nowhere.at_all.default"])
def test_what_cannot_run_without_contents_is_charged_as_one_kernel(target: str) -> None:
    made = Spec((8, 32), "float32", gradient=True)
    (cost,) = estimate(graph(op("y", target, Ref("x"), spec=made)), LAUNCHER).values()
    assert (cost.forward_ms, cost.backward_ms) == pytest.approx((1.0, 1.0))


def test_factories_make_nothing_on_a_real_device() -> None:
    node = replace(
        op("y", "aten.ones.default", [1 << 40], spec=Spec((1 << 40,), "float32")),
        kwargs={"device": torch.device("cpu")},
    )
    assert estimate(graph(node), LAUNCHER)["y"].forward_ms == pytest.approx(1.0)


def test_equal_nodes_share_one_estimate_and_replicated_ones_have_none() -> None:
    nodes = [op(name, "aten.tanh.default", Ref(read)) for name, read in (("a", "x"), ("b", "a"), ("c", "b"))]
    costs = estimate(graph(*nodes, replicated=frozenset({"c"})), MOVER)
    assert list(costs) == ["a", "b"]
    assert costs["a"] is costs["b"]


def test_a_value_of_an_unknown_node_is_an_error_that_names_its_reader() -> None:
    with pytest.raises(CostError, match=r"node 'y' \(aten.tanh.default\) cannot be estimated: .*; use --costs measure"):
        estimate(graph(op("y", "aten.tanh.default", Ref("ghost"))), MOVER)


@pytest.mark.parametrize("name", ["gpt2", "t5", "unet2d"])
def test_shapes_alone_give_nearly_the_bytes_that_a_run_keeps(name: str, tmp_path: Path) -> None:
    model, batch, _ = case(name)
    part: Any = {key: tensor[:2] for key, tensor in batch.items()}  # type: ignore[union-attr]
    whole = lift(traced(name))
    measured = measure(whole, model, part, tmp_path / "costs.json")
    estimated = estimate(whole, find_machine("h100"))
    assert list(estimated) == list(measured)
    for node, cost in measured.items():
        assert estimated[node].saved_bytes == pytest.approx(cost.saved_bytes, rel=0.25, abs=64)
        assert (estimated[node].backward_ms > 0) <= (cost.backward_ms > 0)
