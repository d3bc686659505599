from __future__ import annotations

import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipecompile.cost import NodeCost, measure
from pipecompile.cost.cache import add_to_cache, default_cache, read_cache
from pipecompile.cost.trial import Times, Trial
from pipecompile.errors import CostError
from pipecompile.ir import Attribute, AttributeInfo, Graph, Node, Ref, Spec, Value

BATCH = {"x": torch.randn(4, 16)}
HIDDEN = Spec((4, 16), "float32", gradient=True)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept does not depend on the load of the machine that runs the tests."""
    monkeypatch.setattr(sys.modules["pipecompile.cost.measure"], "TOO_NOISY", math.inf)


class Twice(nn.Module):
    """Gives a dict with its input twice as large, and counts its calls in a buffer and in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.calls = 0
        self.log: list[int] = []

    def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
        self.calls += 1
        self.count += 1
        self.log.append(self.calls)
        return {"out": [x * 2 + torch.rand(()) * 0]}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.twice = Twice()
        self.scale = nn.Parameter(torch.ones(16))


def attributes(model: nn.Module) -> dict[str, AttributeInfo]:
    found = {}
    for kind, named in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for fqn, tensor in named:
            spec = Spec(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), tensor.requires_grad)
            found[fqn] = AttributeInfo(fqn, fqn, kind, spec)
    return found


def call(name: str, module: str, read: str, spec: Spec = HIDDEN, path: Any = (), **rest: Any) -> Node:
    return Node(name, "call", module, (Ref(read),), {}, (Value(name, spec, path),), (read,), **rest)


def op(name: str, target: str, *args: Any, spec: Spec = HIDDEN, **rest: Any) -> Node:
    reads = tuple(arg.name for arg in args if isinstance(arg, Ref))
    return Node(name, "op", target, args, {}, (Value(name, spec),), reads, **rest)


def linear(name: str, module: str, read: str, spec: Spec = HIDDEN) -> Node:
    return call(name, module, read, spec, parameters=(f"{module}.weight", f"{module}.bias"))


NODES = (
    linear("a", "first", "x"),
    linear("b", "second", "a"),
    call("c", "twice", "b", path=(("item", "out"), ("item", 0)), written_buffers=("twice.count",), random=True),
    op("d", "aten.mul.Tensor", Ref("c"), Attribute("scale"), parameters=("scale",)),
    op("e", "aten.relu_.default", Ref("d"), writes=("d",)),
    linear("f", "last", "e", Spec((4, 4), "float32", gradient=True)),
    op("loss", "aten.mean.default", Ref("f"), spec=Spec((), "float32", gradient=True)),
)


def graph(model: nn.Module, nodes: tuple[Node, ...] = NODES, **rest: Any) -> Graph:
    inputs = (Value("x", Spec((4, 16), "float32"), (("item", "x"),)),)
    return Graph(inputs, nodes, attributes(model), nodes[-1].name, **rest)


def test_every_node_gets_its_times_and_saved_bytes(tmp_path: Path) -> None:
    model = Model()
    costs = measure(graph(model), model, BATCH, tmp_path / "costs.json")
    assert list(costs) == ["a", "b", "c", "d", "e", "f", "loss"]
    assert all(cost.forward_ms > 0 for cost in costs.values())
    assert costs["b"].backward_ms > 0
    assert costs["a"].weight_ms == costs["a"].backward_ms, "its input needs no gradient"
    assert 0 < costs["b"].weight_ms < costs["b"].backward_ms
    assert costs["loss"].weight_ms == 0
    # a linear keeps its input (4 x 16 float32), relu_ its result, the mean nothing; parameters do not count
    assert {name: costs[name].saved_bytes for name in ("a", "b", "e", "f", "loss")} == {
        "a": 256,
        "b": 256,
        "e": 256,
        "f": 256,
        "loss": 0,
    }


def test_the_model_and_the_batch_are_as_before(tmp_path: Path) -> None:
    model = Model()
    model.first.weight.grad = torch.full((16, 16), 3.0)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seed, count, x = torch.get_rng_state(), model.twice.count, BATCH["x"].clone()
    measure(graph(model), model, BATCH, tmp_path / "costs.json")
    assert len(model.twice.log) > 5
    assert model.twice.calls == 0
    assert model.twice.count is count
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), seed)
    assert torch.equal(BATCH["x"], x)
    assert torch.equal(model.first.weight.grad, torch.full((16, 16), 3.0))
    assert model.last.weight.grad is None


def test_a_second_measurement_runs_nothing(tmp_path: Path) -> None:
    model = Model()
    costs = measure(graph(model), model, BATCH, tmp_path / "costs.json")
    calls = len(model.twice.log)
    assert measure(graph(model), model, BATCH, tmp_path / "costs.json") == costs
    assert len(model.twice.log) == calls


def test_equal_nodes_are_measured_once(tmp_path: Path) -> None:
    model = Model()
    nodes = (linear("a", "first", "x"), linear("b", "second", "a"), linear("c", "first", "b"))
    costs = measure(graph(model, nodes), model, BATCH, tmp_path / "costs.json")
    assert costs["b"] is costs["c"]
    assert costs["a"] is not costs["b"], "one sends a gradient back, the other does not"
    assert len(json.loads((tmp_path / "costs.json").read_text())["costs"]) == 2


CHANGES: list[Callable[[Model], object]] = [
    lambda model: model.eval(),
    lambda model: setattr(model, "second", nn.Linear(16, 16, bias=False)),
    lambda model: setattr(model, "second", nn.Sequential(nn.Linear(16, 16))),
    lambda model: setattr(model.second, "gradient_checkpointing", True),
    lambda model: model.second.weight.requires_grad_(False),
]


@pytest.mark.parametrize("change", CHANGES)
def test_another_configuration_is_measured_anew(tmp_path: Path, change: Callable[[Model], object]) -> None:
    model = Model()
    nodes = (linear("a", "first", "x"), call("b", "second", "a"))
    measure(graph(model, nodes), model, BATCH, tmp_path / "costs.json")
    before = read_cache(tmp_path / "costs.json").keys()
    change(model)
    measure(graph(model, nodes), model, BATCH, tmp_path / "costs.json")
    assert len(read_cache(tmp_path / "costs.json").keys() - before) in (1, 2)


def test_what_a_module_traced_to_is_part_of_its_key(tmp_path: Path) -> None:
    model = Model()
    inside = (op("inner", "aten.tanh.default", Ref("x")),)
    for nodes in ((linear("a", "first", "x"),), (replace(linear("a", "first", "x"), inside=inside),)):
        measure(graph(model, nodes), model, BATCH, tmp_path / "costs.json")
    assert len(read_cache(tmp_path / "costs.json")) == 2


def test_position_in_the_model_is_no_part_of_the_key(tmp_path: Path) -> None:
    model = Model()
    model.first.layer_idx, model.second.layer_idx = 0, 1  # type: ignore[assignment]
    nodes = (linear("a", "first", "x"), linear("b", "second", "x"))
    costs = measure(graph(model, nodes), model, BATCH, tmp_path / "costs.json")
    assert costs["a"] is costs["b"]


def test_regions_are_entered(tmp_path: Path) -> None:
    model = Model()
    half = Spec((4, 16), "bfloat16", gradient=True)
    nodes = (
        replace(linear("a", "first", "x"), context=("torch.no_grad()",)),
        replace(linear("b", "second", "x", half), context=("torch.autocast('cpu', dtype=torch.bfloat16)",)),
        op("c", "aten.mm.default", Ref("b"), Ref("b_t"), spec=half),
    )
    turned = op("b_t", "aten.t.default", Ref("b"), spec=Spec((16, 4), "bfloat16", gradient=True))
    costs = measure(graph(model, (*nodes[:2], turned, nodes[2])), model, BATCH, tmp_path / "costs.json")
    assert (costs["a"].backward_ms, costs["a"].saved_bytes) == (0.0, 0)
    assert costs["c"].saved_bytes == 128, "the bfloat16 result of the region, once"


def test_a_checkpointed_module_keeps_its_input(tmp_path: Path) -> None:
    class Block(nn.Module):
        gradient_checkpointing = True

        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.body, x, use_reentrant=False)

    model = Model()
    model.second = Block()  # type: ignore[assignment]
    nodes = (linear("a", "first", "x"), call("b", "second", "a"))
    assert measure(graph(model, nodes), model, BATCH, tmp_path / "costs.json")["b"].saved_bytes == 256


@pytest.mark.parametrize(("variable", "expected"), [(None, 1), ("2", 2)])
def test_a_node_has_the_threads_that_torchrun_gives_a_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None, expected: int
) -> None:
    seen = set()

    class Look(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.add(torch.get_num_threads())
            return x + 1

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    model, before = Model(), torch.get_num_threads()
    model.second = Look()  # type: ignore[assignment]
    try:
        torch.set_num_threads(2)
        measure(graph(model, (call("a", "second", "x"),)), model, BATCH, tmp_path / "costs.json")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == {expected}


def test_a_slow_node_is_slower(tmp_path: Path) -> None:
    class Sleeper(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            time.sleep(0.02)
            return x + 1

    model = Model()
    model.second = Sleeper()  # type: ignore[assignment]
    nodes = (linear("a", "first", "x"), call("b", "second", "a"))
    assert 20 <= measure(graph(model, nodes), model, BATCH, tmp_path / "costs.json")["b"].forward_ms < 60


def test_replicated_nodes_run_but_are_not_measured(tmp_path: Path) -> None:
    model = Model()
    nodes = (op("r", "aten.add.Tensor", Ref("x"), 1.0, spec=Spec((4, 16), "float32")), linear("a", "first", "r"))
    whole = graph(model, nodes, replicated=frozenset({"r"}))
    assert list(measure(whole, model, BATCH, tmp_path / "costs.json")) == ["a"]


def test_constants_of_the_graph_are_read_and_restored(tmp_path: Path) -> None:
    model, constant = Model(), torch.ones(16)
    nodes = (
        op("k", "aten.add_.Tensor", Attribute("lifted"), 1.0, spec=Spec((16,), "float32"), written_buffers=("lifted",)),
        op("a", "aten.mul.Tensor", Ref("x"), Ref("k")),
    )
    assert measure(graph(model, nodes, constants={"lifted": constant}), model, BATCH, tmp_path / "costs.json")
    assert torch.equal(constant, torch.ones(16))


def test_a_node_that_fails_is_named(tmp_path: Path) -> None:
    model = Model()
    nodes = (linear("a", "first", "x"), op("b", "aten.mm.default", Ref("a"), Ref("a")))
    with pytest.raises(CostError, match=r"node 'b' \(aten.mm.default\) cannot be measured: .*--costs estimate"):
        measure(graph(model, nodes), model, BATCH, tmp_path / "costs.json")


def test_a_model_without_storage_cannot_be_measured(tmp_path: Path) -> None:
    model = Model().to("meta")
    with pytest.raises(CostError, match="on the meta device, which cannot be run; use --costs estimate"):
        measure(graph(model), model, BATCH, tmp_path / "costs.json")


def test_another_batch_is_refused(tmp_path: Path) -> None:
    model = Model()
    with pytest.raises(CostError, match=r"the batch has no 'x' at .*; use the one that was traced"):
        measure(graph(model), model, {"y": BATCH["x"]}, tmp_path / "costs.json")
    with pytest.raises(
        CostError, match=r"'x' has shape \(2, 16\), but was traced with \(4, 16\); measure with one micro"
    ):
        measure(graph(model), model, {"x": BATCH["x"][:2]}, tmp_path / "costs.json")


def test_the_cache_is_kept_where_the_platform_keeps_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "pipecompile" / "costs.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache" / "pipecompile" / "costs.json"
    monkeypatch.setattr("sys.platform", "darwin")
    assert default_cache() == Path.home() / "Library" / "Caches" / "pipecompile" / "costs.json"


def test_costs_are_added_to_the_cache(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "costs.json"
    add_to_cache(path, {"k": NodeCost(1, 2, 3, 0.5)})
    add_to_cache(path, {"l": NodeCost(4, 5)})
    assert read_cache(path) == {"k": NodeCost(1, 2, 3, 0.5), "l": NodeCost(4, 5)}
    assert os.listdir(path.parent) == ["costs.json"]


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 1, "costs": {"k": {"x": 1}}}', '{"version": 1, "costs": []}'])
def test_a_damaged_cache_is_a_warning(tmp_path: Path, text: str) -> None:
    path = tmp_path / "costs.json"
    path.write_text(text)
    with pytest.warns(UserWarning, match=r"cost cache '.*costs.json' is damaged and is written anew"):
        assert read_cache(path) == {}
    add_to_cache(path, {"k": NodeCost(1, 2)})
    assert read_cache(path) == {"k": NodeCost(1, 2)}


def test_a_cache_of_another_version_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text('{"version": 0, "costs": 3}')
    assert read_cache(path) == {}


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="measured costs cannot be kept in .*costs.json"):
        add_to_cache(tmp_path / "file" / "costs.json", {"k": NodeCost(1, 2)})


def test_times_that_scatter_are_used_and_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every third run takes its normal time, as on a machine that others use."""
    model = Model()
    monkeypatch.setattr(sys.modules["pipecompile.cost.measure"], "TOO_NOISY", 3.0)
    durations = itertools.cycle([1.0, 9.0, 9.0])
    monkeypatch.setattr(Trial, "times", lambda trial: Times(next(durations), 0.0, 0.0))
    with pytest.warns(UserWarning, match=r"the machine is busy: the times of (\d+) of \1 parts scatter by more than 3"):
        costs = measure(graph(model), model, BATCH, tmp_path / "costs.json")
    assert all(cost.forward_ms > 8 for cost in costs.values())
    assert read_cache(tmp_path / "costs.json") == {}
    durations = itertools.cycle([1.0, 2.0, 2.0])
    measure(graph(model), model, BATCH, tmp_path / "costs.json")
    assert read_cache(tmp_path / "costs.json")
