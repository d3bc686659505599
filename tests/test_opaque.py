"""Opaque modules: what cannot be traced runs as it is in its stage, exact and never cut."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import pipecompile
from pipecompile.compare import gradients
from pipecompile.errors import BatchError, CaptureError


class Experts(nn.Module):
    """Routes each token to its best expert: how many tokens an expert gets depends on the data."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        weight, choice = self.router(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows = (choice == index).nonzero().flatten()
            if rows.numel():
                out = out.index_add(0, rows, expert(x[rows]) * weight[rows, None])
        return x + out


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"dense": nn.Linear(8, 8), "moe": Experts(8, 3)}) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer["moe"](torch.tanh(layer["dense"](x)))
        return x.square().mean()


def test_data_dependent_routing_is_refused_with_the_remedy() -> None:
    torch.manual_seed(0)
    with pytest.raises(CaptureError, match=r"layers\.0\.moe.* cannot be traced .*test_opaque\.py, line .*opaque="):
        pipecompile.compile(Model(), (torch.randn(16, 8),), stages=2, microbatches=2, costs="estimate")


@pytest.mark.parametrize(("stages", "ranks", "schedule"), [(2, 2, "1f1b"), (4, 4, "1f1b"), (4, 2, "interleaved-1f1b")])
@pytest.mark.parametrize("costs", ["measure", "estimate"])
def test_data_dependent_routing_is_exact_when_opaque(stages: int, ranks: int, schedule: str, costs: str) -> None:
    torch.manual_seed(0)
    model, batch = Model(), (torch.randn(16, 8),)
    pipe = pipecompile.compile(
        model,
        batch,
        stages=stages,
        ranks=ranks,
        microbatches=4,
        schedule=schedule,
        costs=costs,
        opaque=("layers.*.moe",),
    )
    unsplit = copy.deepcopy(model)
    for _ in range(2):
        batch = (torch.randn(16, 8),)
        assert torch.equal(pipe.step(batch), pipe.reference(unsplit, batch))
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, gradients(unsplit)[name], rtol=1e-6, atol=1e-8)
    assert sum(pipe.source(index).count(".moe(") for index in range(stages)) == 4


class AtItsSize(nn.Module):
    """Code that depends on the number of rows, where no trace could follow it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear, self.kind = nn.Linear(8, 8), kind

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        x = self.linear(x)
        if self.kind == "rows and one":
            return torch.cat([x, x[:1]]), 1
        if self.kind == "asserts":
            assert x.shape[0] == 4
        return x, x.shape[0] if self.kind == "number" else 1


class Around(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layers, self.odd = nn.ModuleList(nn.Linear(8, 8) for _ in range(6)), AtItsSize(kind)

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = torch.tanh(layer(x))
            if index == 3:
                x, scale = self.odd(x)
                x = x * scale
        return x.square().mean()


@pytest.mark.parametrize(("kind", "why"), [
    ("rows and one", "odd gives results of sizes that are no multiples"),
    ("asserts", "eager mode does not run with batch 5"),
    ("number", "odd gives other numbers, or other results, at other sizes"),
])  # fmt: skip
def test_what_depends_on_a_size_runs_at_the_compiled_one(kind: str, why: str) -> None:
    torch.manual_seed(0)
    model, batch = Around(kind), (torch.randn(16, 8),)
    unsplit = copy.deepcopy(model)
    pipe = pipecompile.compile(
        model, batch, stages=4, microbatches=4, costs="estimate", opaque=("odd",), progress=False
    )
    assert why in pipe.plan.fixed["batch"]
    assert torch.equal(pipe.step(batch), pipe.reference(unsplit, batch))
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, gradients(unsplit)[name], rtol=1e-6, atol=1e-8)
    with pytest.raises(BatchError, match="batch is fixed"):
        pipe.step((torch.randn(12, 8),))
