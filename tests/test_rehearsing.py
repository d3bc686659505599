"""What stages would take without contents, against what they are seen to take when they run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipecompile
from pipecompile import weighing
from pipecompile.compiled import Options
from pipecompile.compiler import compile_model
from pipecompile.cost import estimate
from pipecompile.cost.kernels import Kernels, workspace_bytes
from pipecompile.cost.meter import TensorMeter
from pipecompile.errors import ScheduleError
from pipecompile.ir import COMPUTE, Shape, Use
from pipecompile.machine import MACHINES, find_machine
from pipecompile.passes.assemble import StageBody
from pipecompile.passes.opening import Split
from pipecompile.passes.schedules import make_timetable
from pipecompile.rehearsing import WHOLE, Rehearsal
from pipecompile.runtime import split
from tests.models import gpt2, llama
from tests.zoo.families import regions

aten = torch.ops.aten


def taken(uses: Sequence[Use]) -> dict[tuple[str, bool, int], tuple[int, int]]:
    """Bytes afterwards and at most, of all but receives: a copy is made where it is sent or where it arrives."""
    return {(u.op, u.first, u.peer): (u.after, u.peak) for u in uses if not u.op.startswith("RECV")}


def both(case: tuple[nn.Module, Any, Any], stages: int, **options: Any) -> tuple[list[Any], list[Any], Rehearsal]:
    """What each stage would take, what it was seen to take, and who knows."""
    model, batch, loss = case
    microbatch = split(batch, 4)[0]
    rehearsal = Rehearsal(model, find_machine("cpu"), options.get("gradient_dtype", ""))
    seen: list[Any] = []

    def weigh(parts: Split, bodies: tuple[StageBody, ...], sources: Sequence[str]) -> Split:
        plans = [body.plan for body in bodies]
        weighed = weighing.weigh(
            model,
            microbatch,
            parts.partition,
            plans,
            sources,
            parts.graph.inputs,
            parts.graph.loss,
            parts.graph.weight,
            0.0,
            rehearsal.gradient_dtype,
        )
        seen.extend(taken(cost.uses) for cost in weighed.costs)
        return rehearsal(parts, bodies, sources)

    chosen = Options(stages, stages, 4, **options)
    made = compile_model(model, microbatch, loss, lambda graph: estimate(graph, MACHINES["cpu"]), chosen, weigh)
    assert not [note for note in made.split.graph.notes if "peak memory" in note]
    return [taken(cost.uses) for cost in made.split.partition.costs], seen, rehearsal


def test_a_rehearsal_finds_what_weighing_sees_of_shared_weights_and_autocast() -> None:
    would, seen, _ = both(gpt2(), 3)
    assert would == seen
    would, seen, _ = both(regions.family(), 4)
    assert would == seen


def test_narrow_gradients_go_into_their_masters_in_a_rehearsal_too() -> None:
    model = Layers([8] * 4).bfloat16()
    would, seen, _ = both((model, (torch.randn(8, 16, dtype=torch.bfloat16),), None), 2, gradient_dtype="float32")
    assert would == seen
    made = {kind: after for kind, (after, _) in would[0].items() if kind[0] == "BACKWARD" and kind[1]}
    assert min(made.values()) > 0, "main gradients stay"
    assert all(p.grad is None and "main_grad" not in vars(p) for p in model.parameters())


@dataclasses.dataclass
class Pair:
    left: Tensor
    right: Tensor


torch.export.register_dataclass(Pair)


@pytest.mark.parametrize(
    "batch",
    [
        torch.randn(8, 16),
        {"rows": [torch.randn(8, 16)]},
        Pair(torch.randn(8, 16), torch.randn(8, 16)),
        (torch.randn(8, 16), 2),
    ],
    ids=["tensor", "nested", "dataclass", "number"],
)
def test_a_batch_of_any_structure_is_rehearsed(batch: Any) -> None:
    """Nothing is made up of the batch but its tensors."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if isinstance(batch, dict):
            return model(batch["rows"][0])
        if isinstance(batch, Pair):
            return model(batch.left - batch.right)
        return model(batch[0] * batch[1]) if isinstance(batch, tuple) else model(batch)

    would, seen, _ = both((Layers([8] * 2), batch, loss), 2)
    assert would == seen


def test_what_is_recomputed_keeps_its_buffers_in_a_rehearsal() -> None:
    would, seen, _ = both(llama(), 2, recompute=("stage", "calls"))
    for one, other in zip(would, seen):
        assert one.keys() == other.keys()
        buffers = 64  # whether they change is not known without values
        assert all(abs(a - b) <= buffers for kind in one for a, b in zip(one[kind], other[kind]))


class Layers(nn.Module):
    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, width) for width in widths)
        self.back = nn.ModuleList(nn.Linear(width, 16) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        for into, back in zip(self.layers, self.back):
            x = x + back(into(x).tanh())
        return x.square().sum()


def test_equal_stages_are_rehearsed_once() -> None:
    batch = (torch.randn(8, 16),)
    would, seen, rehearsal = both((Layers([8] * 6), batch, None), 6)
    assert would == seen
    assert len(rehearsal.known) == 3, "the first, the last, those between"
    would, seen, rehearsal = both((Layers([8, 8, 9, 8, 8, 8]), batch, None), 6)
    assert would == seen
    assert len(rehearsal.known) > 3


def test_the_plan_of_estimated_costs_forecasts_what_measured_ones_do() -> None:
    model, batch = Layers([8] * 4), (torch.randn(8, 16),)
    peaks = {}
    for costs in ("estimate", "measure"):
        pipe = pipecompile.compile(
            model, batch, stages=2, microbatches=4, costs=costs, check=False, progress=False, schedule="zb-h1"
        )
        peaks[costs] = {pipe.plan.stages[s].modules: pipe.forecast.peak_bytes[s] for s in range(2)}
        assert all(use.ms is None for cost in pipe.plan.costs for use in cost.uses) == (costs == "estimate")
        assert all(cost.uses for cost in pipe.plan.costs)
        assert all(busy > 0 for busy in pipe.forecast.busy_ms)
    same = set(peaks["estimate"]) & set(peaks["measure"])
    assert all(peaks["estimate"][modules] == peaks["measure"][modules] for modules in same)


class Chooses(nn.Module):
    """Keeps the rows whose first value is positive: how many there are depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x)[x[:, 0] > 0]).sum()


def test_a_stage_that_needs_values_is_counted_from_its_parts_and_the_plan_says_so() -> None:
    pipe = pipecompile.compile(
        Chooses(), (torch.ones(8, 4),), stages=2, microbatches=2, costs="estimate", check=False, progress=False
    )
    assert not any(cost.uses for cost in pipe.plan.costs)
    (note,) = [note for note in pipe.plan.notes if "peak memory" in note]
    assert "only a sum over the parts of the stages, which cannot be run without values" in note


def held(device: str, forward: Callable[[], Tensor]) -> int:
    """Bytes that are held for a backward."""
    meter = TensorMeter()
    with Kernels(device), meter:
        kept = forward()
        assert kept.requires_grad
        return meter.live


@pytest.mark.parametrize(("device", "lengths"), [("cpu", 1), ("cuda", 1), ("cuda", 0)], ids=["cpu", "flash", "mask"])
def test_attention_keeps_what_its_kernel_keeps(device: str, lengths: int) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q, k, v = (torch.empty(2, 4, 256, 32, dtype=dtype, device="meta", requires_grad=True) for _ in range(3))
    mask = None if lengths else torch.empty(256, 256, dtype=torch.bool, device="meta")
    kept = held(device, lambda: nn.functional.scaled_dot_product_attention(q, k, v, mask))
    result, numbers, scores = q.nbytes, 2 * 4 * 256 * 4, 2 * 4 * 256 * 256 * dtype.itemsize
    assert result + numbers <= kept <= result + numbers + (0 if lengths else 256 * 256 * 2) + 64 < scores


def test_attention_inside_of_torchs_own_layer_is_the_kernels_too() -> None:
    layer = nn.MultiheadAttention(32, 4, batch_first=True, device="meta")
    x = torch.empty(2, 256, 32, device="meta")
    scores = 2 * 4 * 256 * 256 * 4
    assert held("cpu", lambda: layer(x, x, x, need_weights=False)[0]) < scores / 2


def test_dropout_on_a_gpu_keeps_a_byte_for_each_element() -> None:
    x = torch.empty(1000, device="meta", requires_grad=True)
    assert held("cpu", lambda: nn.functional.dropout(x)) == 4000 + 4000
    assert held("cuda", lambda: nn.functional.dropout(x)) == 4000 + 1000


def test_the_backward_of_flash_attention_takes_a_sum_in_float32_on_a_gpu() -> None:
    q = torch.empty(2, 4, 130, 40, dtype=torch.bfloat16, device="meta", requires_grad=True)
    k, v = (torch.empty(2, 2, 130, 40, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(2))
    meter = TensorMeter(512, workspace_bytes)
    with Kernels("cuda"), meter:
        made = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        gradient = torch.ones_like(made)
        meter.begin()
        before = meter.live
        torch.autograd.grad(made, (q, k, v), gradient)
    rounded, one = 2 * 4 * 256 * 64 * 4 + 2 * 4 * 256 * 4, 2 * 2 * 4 * 130 * 40 * 2
    results = 2 * 4 * 130 * 40 * 2 + 2 * (2 * 2 * 130 * 40 * 2)
    assert rounded + one <= meter.peak - before <= rounded + one + results + 3 * 512


def test_a_machine_says_which_kernels_it_runs() -> None:
    model, batch = Layers([8] * 4), (torch.randn(8, 16),)
    held = {}
    for name in ("cpu", "h100"):
        pipe = pipecompile.compile(
            model, batch, stages=2, microbatches=4, costs="estimate", machine=name, check=False, progress=False
        )
        held[name] = pipe.forecast.peak_bytes[0]
    assert held["cpu"] < 1 << 16
    assert held["h100"] >= 2 * (32 << 20)


def test_halves_are_rehearsed_only_for_schedules_that_split() -> None:
    for name in WHOLE:
        for shape in (Shape(4, 4, 3), Shape(4, 4, 8), Shape(4, 2, 8)):
            with suppress(ScheduleError):
                assert "BACKWARD_INPUT" not in {one.op for row in make_timetable(name, shape).rows for one in row}
    model, batch, loss = llama()
    options: dict[str, Any] = {"loss": loss, "stages": 2, "microbatches": 4, "costs": "estimate", "check": False}
    for schedule, ops in (("1f1b", {"BACKWARD"}), ("zb-h1", {"BACKWARD", "BACKWARD_INPUT", "BACKWARD_WEIGHT"})):
        pipe = pipecompile.compile(model, batch, schedule=schedule, **options)
        for cost in pipe.plan.partition.costs:
            assert {use.op for use in cost.uses if use.op in COMPUTE} == {"FORWARD", *ops}
        assert max(pipe.plan.at(batch=8).forecast.peak_bytes) > max(pipe.forecast.peak_bytes)
