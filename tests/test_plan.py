"""The plan: what it prints, and that it survives JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from pipecompile.errors import BuildError
from pipecompile.ir import Forecast, Port, Spec, StageCost, StagePlan, Transfer, Value
from pipecompile.plan import Plan
from pipecompile.plan_file import read_plan

HIDDEN = Spec((2, 8), "float32", True, (1, 0))
PLAN = Plan(
    model="Net",
    schedule="1f1b",
    ranks=2,
    microbatches=4,
    placement=(0, 1),
    loss="loss",
    weight="",
    inputs=(Value("x", Spec((2, 8), "float32"), (("item", "x"),)),),
    stages=(
        StagePlan(0, (), (Port("hidden", HIDDEN, targets=(1,)),), ("first",), shared={"first.weight": "first.weight"}),
        StagePlan(
            1,
            (Port("hidden", HIDDEN, source=0),),
            (Port("loss", Spec((), "float32", True)),),
            ("last",),
            shared={"first.weight": "last.weight"},
        ),
    ),
    costs=(StageCost(1.0, 2.0, 0.5, 1024, 1024, 64), StageCost(2.0, 3.0, 1.0, 2048, 2048, 32)),
    holds=(("first.weight",), ("last.weight",)),
    transfers=(Transfer("hidden", 0, 1, 64, 64),),
    forecast=Forecast(30.0, (12.0, 20.0), (4096, 8192)),
    bound_ms=4.5,
    bound_bytes=128,
    replicated=("mask",),
    opened=("body@0",),
    notes=("use_cache was turned off",),
    source={"file": "net.py", "sha256": "0" * 64},
)
TEXT = """\
Net: 2 stages on 2 ranks, 4 microbatches, 1f1b

stage  rank  forward ms  backward ms  parameters  receives
    0     0       1.000        2.000     1.0 KiB  the batch
    1     1       2.000        3.000     2.0 KiB  hidden float32[2, 8] from 0

slowest stage 5.000 ms, 25.0% over equal shares, proved bound 4.500 ms
128 B cross between stages for each microbatch, there and back
forecast: 30.000 ms a step, idle 60%, 33% of each rank's time, peak memory 4.0 KiB, 8.0 KiB
shared by several stages, gradients summed: first.weight
opened: body@0
note: use_cache was turned off"""


def test_text() -> None:
    assert str(PLAN) == TEXT
    plain = str(replace(PLAN, bound_ms=0.0, opened=(), notes=()))
    assert "proved" not in plain
    assert "opened" not in plain


def test_json_gives_the_same_plan() -> None:
    again = read_plan(json.loads(json.dumps(PLAN.to_json())))
    assert again == PLAN
    assert again.stages[1].inputs[0].spec.order == (1, 0)


def test_another_version() -> None:
    whole = PLAN.to_json() | {"version": 99}
    with pytest.raises(BuildError, match=r"plan\.json has version 99, this pipecompile reads \d+; compile again"):
        read_plan(whole)


@pytest.mark.parametrize("field", ["model", "stages", "costs", "forecast", "inputs", "notes"])
def test_a_lost_field(field: str) -> None:
    whole = PLAN.to_json()
    del whole[field]
    with pytest.raises(BuildError, match=rf"plan\.json has no '{field}', expected .*; compile again"):
        read_plan(whole)
