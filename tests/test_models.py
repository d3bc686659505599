"""Six models in the local runtime: loss, every gradient and every buffer against the unsplit model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import pipecompile
from tests.models import MODELS
from tests.oracle import Outcome, accumulate, assert_same, unsplit

MICROBATCHES = 4
SHAPES = [
    ("gpipe", 2, 2, "equal"),
    ("1f1b", 2, 2, "estimate"),
    ("gpipe", 4, 4, "equal"),
    ("1f1b", 4, 4, "estimate"),
    ("interleaved-1f1b", 4, 2, "equal"),
]


@pytest.fixture(scope="module")
def equal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cost file in which every node costs the same, so that nothing measured decides where a test cuts."""
    path = tmp_path_factory.mktemp("costs") / "equal.json"
    path.write_text(json.dumps({"nodes": {}, "default": {"fwd": 1, "bwd": 2}}))
    return path


@pytest.mark.parametrize(("schedule", "stages", "ranks", "costs"), SHAPES)
@pytest.mark.parametrize("name", MODELS)
def test_one_step(name: str, schedule: str, stages: int, ranks: int, costs: str, equal: Path) -> None:
    model, batch, loss = MODELS[name]()
    pipe = pipecompile.compile(
        model,
        batch,
        stages=stages,
        microbatches=MICROBATCHES,
        schedule=schedule,
        ranks=ranks,
        loss=loss,
        costs=equal if costs == "equal" else costs,
        check=False,
    )
    assert all(p.grad is None for p in model.parameters())
    value = pipe.step(batch)
    assert_same(pipe, Outcome.of(model, value), unsplit(name, MICROBATCHES))
    assert len({fqn for held in pipe.plan.holds for fqn in held}) >= len(list(model.parameters()))


@pytest.mark.parametrize("name", ["gpt2", "cnn"])
def test_gradients_add_up_over_steps(name: str, equal: Path) -> None:
    model, batch, loss = MODELS[name]()
    pipe = pipecompile.compile(model, batch, stages=2, microbatches=MICROBATCHES, loss=loss, costs=equal, check=False)
    twin, _, _ = MODELS[name]()
    for _ in range(2):
        value = pipe.step(batch)
        expected = accumulate(twin, batch, loss, MICROBATCHES)
    assert_same(pipe, Outcome.of(model, value), expected)
