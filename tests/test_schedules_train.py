"""Every schedule trains GPT-2 (tied), T5 and UNet2D in the local runtime: loss and gradients of the unsplit model."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest

import pipecompile
from pipecompile.passes.schedules import find_schedule, schedule_names
from tests.models import MODELS
from tests.oracle import Outcome, accumulate, assert_same

MICROBATCHES = 4
TRAINING = [name for name in schedule_names() if find_schedule(name).flushes]
LOOPED = ("interleaved-1f1b", "looped-bfs")
OWN = """
def mine(shape):
    rows = []
    for rank in range(shape.ranks):
        microbatches = range(shape.microbatches)
        rows.append(" ".join([f"{rank}F{m}" for m in microbatches] + [f"{rank}I{m} {rank}W{m}" for m in microbatches]))
    return rows
"""


@pytest.fixture(autouse=True)
def little_effort(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searching schedules search briefly: exact gradients do not depend on how good the order is."""
    monkeypatch.setattr(sys.modules["pipecompile.passes.schedules.auto"], "EFFORT", 50_000)
    monkeypatch.setattr(sys.modules["pipecompile.passes.schedules.blocks"], "TASKS_TRIED", 10_000)
    monkeypatch.setattr(sys.modules["pipecompile.passes.schedules.blocks"], "DELAYS", range(1, 3))


@functools.cache
def unsplit(name: str) -> Outcome:
    model, batch, loss = MODELS[name]()
    for module in model.modules():
        if hasattr(module, "config"):
            module.config.use_cache = False  # compile does the same, and the plan says so
    return accumulate(model, batch, loss, MICROBATCHES)


def train(name: str, schedule: str, stages: int, ranks: int) -> pipecompile.Pipe:
    """Compile, run one step, compare."""
    model, batch, loss = MODELS[name]()
    pipe = pipecompile.compile(
        model,
        batch,
        stages=stages,
        ranks=ranks,
        microbatches=MICROBATCHES,
        schedule=schedule,
        loss=loss,
        costs="estimate",
        check=False,
    )
    value = pipe.step(batch)
    assert_same(pipe, Outcome.of(model, value), unsplit(name))
    return pipe


@pytest.mark.parametrize("schedule", TRAINING)
@pytest.mark.parametrize("name", ["gpt2", "t5", "unet2d"])
def test_exact_gradients(name: str, schedule: str) -> None:
    each = find_schedule(schedule).per_rank or (2 if schedule in LOOPED else 1)
    pipe = train(name, schedule, stages=4 if each == 2 else 3, ranks=2 if each == 2 else 3)
    assert pipe.program.schedule.startswith(schedule)


def test_a_schedule_of_ones_own_trains(tmp_path: Path) -> None:
    path = tmp_path / "my.py"
    path.write_text(OWN)
    pipe = train("gpt2", f"{path}:mine", stages=2, ranks=2)
    assert "BACKWARD_WEIGHT" in {one.op for row in pipe.program.rows for one in row}
