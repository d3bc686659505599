"""Six models in the local runtime: loss, every gradient and every buffer against the unsplit model."""

from __future__ import annotations

from typing import Any

import pytest

import pipecompile
from tests.compiled import Price, case, equal, estimated, files
from tests.models import MODELS
from tests.oracle import Outcome, accumulate, assert_same, unsplit

MICROBATCHES = 4
SHAPES = [
    ("gpipe", 2, 2, equal),
    ("1f1b", 2, 2, estimated),
    ("gpipe", 4, 4, equal),
    ("1f1b", 4, 4, estimated),
    ("interleaved-1f1b", 4, 2, equal),
]


@pytest.mark.parametrize(("schedule", "stages", "ranks", "price"), SHAPES)
@pytest.mark.parametrize("name", MODELS)
def test_one_step(name: str, schedule: str, stages: int, ranks: int, price: Price) -> None:
    build = files(name, stages, ranks, MICROBATCHES, schedule, price)
    model, batch, loss = case(name)
    pipe = pipecompile.Pipe(build, model, loss)
    assert all(p.grad is None for p in model.parameters())
    value = pipe.step(batch)
    assert_same(pipe, Outcome.of(model, value), unsplit(name, MICROBATCHES))
    assert len({fqn for held in pipe.plan.holds for fqn in held}) >= len(list(model.parameters()))


@pytest.mark.parametrize("name", ["gpt2", "cnn"])
def test_gradients_add_up_over_steps(name: str) -> None:
    model, batch, loss = MODELS[name]()
    options: dict[str, Any] = {"stages": 2, "microbatches": MICROBATCHES, "costs": "estimate", "check": False}
    pipe = pipecompile.compile(model, batch, loss=loss, **options)
    twin, _, _ = MODELS[name]()
    for _ in range(2):
        value = pipe.step(batch)
        expected = accumulate(twin, batch, loss, MICROBATCHES)
    assert_same(pipe, Outcome.of(model, value), expected)
