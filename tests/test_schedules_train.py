"""Every schedule trains GPT-2 (tied), T5 and UNet2D in the local runtime: loss and gradients of the unsplit model."""

from __future__ import annotations

from pathlib import Path

import pytest

import pipecompile
from tests.asynchronous import Version
from tests.oracle import Outcome, assert_same
from tests.scheduled import (
    FLUSHING,
    MICROBATCHES,
    UPDATING,
    case,
    check,
    check_updates,
    little_effort,
    per_rank,
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
    model, batch, loss = case(name)
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
@pytest.mark.parametrize("name", ["gpt2", "t5", "unet2d"])
def test_exact_updates(name: str, schedule: str) -> None:
    check_updates(schedule, name, ranks=4, microbatches=16)


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
    pipe = train("gpt2", schedule, stages=4 if each == 2 else 3, ranks=2 if each == 2 else 3)
    assert pipe.program.schedule.startswith(schedule)


def test_a_schedule_of_ones_own_trains(tmp_path: Path) -> None:
    path = tmp_path / "my.py"
    path.write_text(OWN)
    pipe = train("gpt2", f"{path}:mine", stages=2, ranks=2)
    assert "BACKWARD_WEIGHT" in {one.op for row in pipe.program.rows for one in row}
