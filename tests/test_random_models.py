"""Random models with skips, values read by several stages, tied weights and buffers: exact however they are cut."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pipecompile
from tests.oracle import Outcome, accumulate, assert_same

WIDTH = 6
SCHEDULES = {1: ("gpipe", "1f1b"), 2: ("interleaved-1f1b", "looped-bfs")}


@dataclass(frozen=True)
class Line:
    """One line of a forward: what it does, to which earlier values, with which of the layers."""

    what: str
    first: int
    second: int
    layer: int


class Random(nn.Module):
    """Runs its lines in order; each makes a value. The result is the mean of the last and a drawn one."""

    def __init__(self, lines: list[Line], last: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.lines, self.last = lines, last
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in lines)

    def forward(self, x: Tensor) -> Tensor:
        values = [self.layers[0](x)]
        for line, norm in zip(self.lines, self.norms):
            first, second = values[line.first % len(values)], values[line.second % len(values)]
            if line.what == "layer":
                values.append(torch.tanh(self.layers[line.layer](first)))
            elif line.what == "norm":
                values.append(norm(first))
            elif line.what == "add":
                values.append(first + second)
            else:
                values.append(torch.cat([first, second], 1)[:, 1 : WIDTH + 1] * (second > 0))
        return (values[-1] + values[self.last % len(values)]) / 2


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.mse_loss(model(batch["x"]), batch["y"])


lines = st.builds(
    Line, st.sampled_from(["layer", "norm", "add", "mix"]), st.integers(0, 9), st.integers(0, 9), st.integers(0, 2)
)
models = st.builds(Random, st.lists(lines, min_size=3, max_size=8), st.integers(0, 9), st.integers(0, 99))


@pytest.fixture(scope="module")
def costs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("costs") / "equal.json"
    path.write_text(json.dumps({"nodes": {}, "default": {"fwd": 1, "bwd": 2}}))
    return path


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_random_model_in_a_random_shape(data: st.DataObject, costs: Path) -> None:
    model = data.draw(models)
    each = data.draw(st.sampled_from(sorted(SCHEDULES)), "stages of a rank")
    ranks = data.draw(st.integers(1 if each == 1 else 2, 4 // each), "ranks")
    microbatches = ranks * data.draw(st.integers(1, 2), "microbatches for each rank")
    batch = {"x": torch.randn(4 * microbatches, WIDTH), "y": torch.randn(4 * microbatches, WIDTH)}
    twin = copy.deepcopy(model)
    pipe = pipecompile.compile(
        model,
        batch,
        stages=each * ranks,
        ranks=ranks,
        microbatches=microbatches,
        schedule=data.draw(st.sampled_from(SCHEDULES[each]), "schedule"),
        loss=loss,
        costs=costs,
    )
    for _ in range(2):
        value = pipe.step(batch)
        expected = accumulate(twin, batch, loss, microbatches)
    assert_same(pipe, Outcome.of(model, value), expected)
