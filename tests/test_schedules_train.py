"""Every schedule trains GPT-2 (tied), T5 and UNet2D in the local runtime: loss and gradients of the unsplit model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import pipecompile
from pipecompile.memory import most_in_flight
from pipecompile.passes.schedules import find_schedule, vee
from pipecompile.passes.symbols import SYMBOLS, closed_forms
from pipecompile.runtime.executor import Executor, Step
from pipecompile.runtime.microbatches import split
from pipecompile.runtime.wiring import Forward
from tests.asynchronous import Version
from tests.models import MODELS
from tests.oracle import Outcome, assert_same
from tests.scheduled import (
    FLUSHING,
    MICROBATCHES,
    UPDATING,
    check,
    check_updates,
    little_effort,
    per_rank,
    under,
    unsplit,
)

OWN = """
def mine(shape):
    rows = []
    for rank in range(shape.ranks):
        microbatches = range(shape.microbatches)
        rows.append(" ".join([f"{rank}F{m}" for m in microbatches] + [f"{rank}I{m} {rank}W{m}" for m in microbatches]))
    return rows
"""


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    for place, value in little_effort().items():
        monkeypatch.setattr(f"pipecompile.passes.schedules.{place}", value)


def train(name: str, schedule: str, stages: int, ranks: int) -> pipecompile.Pipe:
    """Compile with the schedule, run one step, compare."""
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


@pytest.mark.parametrize("schedule", FLUSHING)
@pytest.mark.parametrize("name", ["gpt2", "t5", "unet2d"])
def test_exact_gradients(name: str, schedule: str) -> None:
    check(schedule, name, ranks=2 if per_rank(schedule) == 2 else 3)


@pytest.mark.parametrize("schedule", UPDATING)
@pytest.mark.parametrize(("name", "microbatches"), [("gpt2", 16), ("t5", 8), ("unet2d", 8)])
def test_exact_updates(name: str, microbatches: int, schedule: str) -> None:
    check_updates(schedule, name, ranks=4, microbatches=microbatches)


@pytest.mark.parametrize(
    ("schedule", "rule"),
    [
        ("pipedream", lambda p, s, t: max(0, t - (p - s))),
        ("pipedream", lambda p, s, t: max(0, t - p + 1)),
        ("pipedream-2bw", lambda p, s, t: max(0, t // p - 2)),
    ],
)
def test_the_oracle_tells_other_delays_apart(schedule: str, rule: Version) -> None:
    with pytest.raises(AssertionError, match=r"instead of|differs by"):
        check_updates(schedule, "gpt2", ranks=2, microbatches=8, rule=rule)


@pytest.mark.parametrize("schedule", FLUSHING)
def test_compiled_with_the_schedule(schedule: str) -> None:
    each = per_rank(schedule)
    pipe = train("mlp", schedule, stages=4 if each == 2 else 3, ranks=2 if each == 2 else 3)
    assert pipe.program.schedule.startswith(schedule)


def test_a_schedule_of_ones_own_trains(tmp_path: Path) -> None:
    path = tmp_path / "my.py"
    path.write_text(OWN)
    pipe = train("mlp", f"{path}:mine", stages=2, ranks=2)
    assert "BACKWARD_WEIGHT" in {one.op for row in pipe.program.rows for one in row}


def kept_at_most(pipe: pipecompile.Pipe, batch: Any) -> dict[int, int]:
    """By rank: the most microbatches, of all its stages, whose graph or rest of a graph the executor held in a step."""
    runtime = pipe._runtime(trains=True)
    held = dict.fromkeys(range(pipe.program.shape.ranks), 0)
    slots = {rank: kept_slots(executor) for rank, executor in enumerate(runtime._ranks)}

    @contextmanager
    def look(step: Step) -> Iterator[None]:
        yield
        executor = runtime._ranks[step.rank]
        held[step.rank] = max(held[step.rank], sum(executor._slots[slot] is not None for slot in slots[step.rank]))

    optimizer = torch.optim.SGD(pipe.parameters(), lr=0.0) if pipe.updates else None
    runtime.run(split(batch, pipe.program.shape.microbatches), look, optimizer)
    return held


def kept_slots(executor: Executor) -> set[int]:
    return {step.operand.kept for step in executor.steps if isinstance(step.operand, Forward)}


@pytest.mark.parametrize("schedule", [*FLUSHING, *UPDATING])
def test_the_runtime_keeps_as_many_graphs_as_the_closed_form(schedule: str) -> None:
    """Activations in flight, counted in a running executor after each instruction."""
    each = per_rank(schedule)
    ranks, microbatches = (2, 8) if each == 2 else (4, 8)
    pipe, (_, batch, _) = under(schedule, "gpt2", ranks, microbatches)
    held = kept_at_most(pipe, batch)
    found = find_schedule(schedule)
    if found.forms is None:  # auto: its order depends on costs, so the rows are what counts
        assert held == {rank: most_in_flight(row) for rank, row in enumerate(pipe.program.rows)}
        return
    given = {"p": ranks, "v": each, "m": microbatches, "F": 1, "I": 1, "W": 1}
    form = closed_forms(found)["activations"].subs({SYMBOLS[name]: value for name, value in given.items()})
    expected = {rank: form.subs(SYMBOLS["r"], rank) for rank in held}
    if found.placement is vee:  # the form is that of the rank that holds most
        assert max(held.values()) == max(expected.values())
    else:
        assert held == expected
