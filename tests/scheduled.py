"""Pipelines of the shared models under every schedule: a model is compiled once, each schedule orders the same stages."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import pipecompile
from pipecompile.ir import Partition, Shape
from pipecompile.passes.communicate import communicate
from pipecompile.passes.schedules import find_schedule, make_timetable, schedule_names
from pipecompile.plan_file import read_plan
from tests.asynchronous import RULES, Version, train
from tests.compiled import case, files
from tests.models import Case
from tests.oracle import Outcome, accumulate, assert_same

MICROBATCHES = 4
RATE = 0.05
WEIGHTS = 2e-6
"""The relative difference that a weight may show after the updates of two steps: shared gradients are summed in another
order than the unsplit model's."""
LOOPED = ("interleaved-1f1b", "looped-bfs")
UPDATING = tuple(RULES)
FLUSHING = tuple(name for name in schedule_names() if find_schedule(name).flushes)


def little_effort() -> Mapping[str, Any]:
    """What makes searching schedules search briefly: exact gradients do not depend on how good the order is."""
    return {"auto.EFFORT": 50_000, "blocks.TASKS_TRIED": 10_000, "blocks.DELAYS": range(1, 3)}


def per_rank(schedule: str) -> int:
    return find_schedule(schedule).per_rank or (2 if schedule in LOOPED else 1)


@functools.cache
def unsplit(name: str, steps: int = 1) -> Outcome:
    """What so many steps in a row leave behind, the loss being the last one's."""
    whole = case(name)
    for _ in range(steps):
        outcome = accumulate(*whole, MICROBATCHES)
    return outcome


@functools.cache
def compiled(name: str, stages: int, ranks: int, microbatches: int) -> tuple[dict[str, str], Partition]:
    """The files of a build, and what its programs are made for."""
    build = files(name, stages, ranks, microbatches, "1f1b" if stages == ranks else "looped-bfs")
    return build, read_plan(json.loads(build["plan.json"])).partition


def under(schedule: str, name: str, ranks: int, microbatches: int = MICROBATCHES) -> tuple[pipecompile.Pipe, Case]:
    """The model's stages in the order of ``schedule``, with a model that nothing has trained."""
    stages = ranks * per_rank(schedule)
    build, partition = compiled(name, stages, ranks, microbatches)
    timetable = make_timetable(schedule, Shape(stages, ranks, microbatches), partition=partition)
    program = communicate(timetable, partition)
    model, batch, loss = case(name, microbatches)
    build = {**build, "program.json": json.dumps(program.to_json())}
    return pipecompile.Pipe(build, model, loss), (model, batch, loss)


def check(schedule: str, name: str, ranks: int, steps: int = 1) -> list[str]:
    """The names of what this process's stages hold; AssertionError where loss, buffers or gradients are not the unsplit
    model's."""
    pipe, (model, batch, _) = under(schedule, name, ranks)
    for _ in range(steps):
        value = pipe.step(batch)
    mine = {id(p) for stage in pipe.stages.values() for p in (*stage.parameters(), *stage.buffers())}
    names = {key for key, p in (*model.named_parameters(), *model.named_buffers()) if id(p) in mine}
    assert names, "this rank holds something"
    assert_same(pipe, Outcome.of(model, value).only(names), unsplit(name, steps).only(names))
    strangers = {key for key, p in model.named_parameters() if p.grad is not None} - names
    assert not strangers, f"rank {pipe.rank} has gradients of parameters of other ranks: {sorted(strangers)}"
    return sorted(names)


def check_updates(schedule: str, name: str, ranks: int, microbatches: int, rule: Version | None = None) -> None:
    """Two steps of a schedule that never flushes, beside the oracle (under another ``rule`` if one is given);
    AssertionError where the loss of a microbatch, or a weight of this process's stages, differs."""
    version, grouped = RULES[schedule]
    pipe, (model, batch, loss) = under(schedule, name, ranks, microbatches)
    tensors = dict(model.named_parameters(remove_duplicate=False))
    stage_of: dict[int, int] = {}
    for stage in reversed(range(ranks)):
        stage_of |= {id(tensors[key]): stage for key in pipe.plan.holds[stage] if key in tensors}
        stage_of |= {id(tensors[key]): stage for key in pipe.plan.stages[stage].shared.values()}
    firsts = {key: stage_of[id(p)] for key, p in model.named_parameters()}
    told: list[torch.Tensor] = []
    if ranks - 1 in pipe.stages:
        place = [port.name for port in pipe.plan.stages[-1].outputs].index(pipe.plan.loss)
        pipe.stage(ranks - 1).register_forward_hook(lambda module, given, made: told.append(made[place].detach()))
    mine = {id(p) for p in pipe.parameters()}
    names = [key for key, p in model.named_parameters() if id(p) in mine]
    optimizer = torch.optim.SGD(pipe.parameters(), lr=RATE, momentum=0.9)
    for p in pipe.parameters():
        p.grad = torch.ones_like(p)  # of an earlier step: it stays apart
    means = [pipe.step(batch, optimizer) for _ in range(2)]
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in pipe.parameters())
    unsplit, batch, loss = case(name, microbatches)
    steps = torch.optim.SGD(unsplit.parameters(), lr=RATE, momentum=0.9)
    version, group = rule or version, ranks if grouped else 1
    losses = [train(unsplit, batch, loss, steps, microbatches, firsts, ranks, version, group) for _ in range(2)]
    expected = [value for step in losses for value in step]
    assert not told or len(told) == len(expected)
    for m, (got, value) in enumerate(zip(told, expected)):
        assert torch.allclose(got, value, rtol=1e-5), f"microbatch {m}: loss {got} instead of {value}"
    for mean, step in zip(means, losses):
        assert torch.allclose(mean, torch.stack(step).mean(), rtol=1e-5)
    others = dict(unsplit.named_parameters())
    for key in names:
        got, value = tensors[key].detach(), others[key].detach()
        error = float((got - value).norm() / value.norm())
        assert error <= WEIGHTS, f"{key} differs by {error:.1e}"


def checked(rank: int, ranks: int, cases: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    """What this rank holds for each (model, schedule); what is wrong instead, as one text that begins with WRONG."""
    from pipecompile.runtime import connect

    for place, value in little_effort().items():
        module, attribute = place.split(".")
        setattr(sys.modules[f"pipecompile.passes.schedules.{module}"], attribute, value)
    connect(timeout_s=60)
    found = {}
    for name, schedule in cases:
        try:
            if schedule in FLUSHING:
                found[f"{name} {schedule}"] = check(schedule, name, ranks, steps=2)
            else:
                check_updates(schedule, name, ranks, 8)
                found[f"{name} {schedule}"] = []
        except AssertionError as error:
            found[f"{name} {schedule}"] = [f"WRONG: {error}"]
    return found
