"""Pipelines of the shared models under every schedule: a model is compiled once, each schedule orders the same stages.

``python -m torch.distributed.run --nproc-per-node 2 -m tests.scheduled FOLDER gpt2 t5`` is what test_schedules_processes
starts: each process compares all that its rank holds and writes the differences it found.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import pipecompile
from pipecompile.ir import Shape
from pipecompile.passes.communicate import communicate
from pipecompile.passes.schedules import find_schedule, make_timetable, schedule_names
from tests.models import MODELS, Case
from tests.oracle import Outcome, accumulate, assert_same

MICROBATCHES = 4
LOOPED = ("interleaved-1f1b", "looped-bfs")
FLUSHING = tuple(name for name in schedule_names() if find_schedule(name).flushes)


def little_effort() -> Mapping[str, Any]:
    """What makes searching schedules search briefly: exact gradients do not depend on how good the order is."""
    return {"auto.EFFORT": 50_000, "blocks.TASKS_TRIED": 10_000, "blocks.DELAYS": range(1, 3)}


def per_rank(schedule: str) -> int:
    return find_schedule(schedule).per_rank or (2 if schedule in LOOPED else 1)


def case(name: str) -> Case:
    """A shared model as ``compile`` leaves it: without a cache of keys, as the plan says."""
    model, batch, loss = MODELS[name]()
    for module in model.modules():
        if hasattr(module, "config"):
            module.config.use_cache = False
    return model, batch, loss


@functools.cache
def unsplit(name: str) -> Outcome:
    return accumulate(*case(name), MICROBATCHES)


@functools.cache
def compiled(name: str, stages: int, ranks: int) -> pipecompile.Pipe:
    model, batch, loss = case(name)
    return pipecompile.compile(
        model,
        batch,
        stages=stages,
        ranks=ranks,
        microbatches=MICROBATCHES,
        schedule="1f1b" if stages == ranks else "looped-bfs",
        loss=loss,
        costs="estimate",
        check=False,
        progress=False,
    )


def under(schedule: str, name: str, ranks: int) -> tuple[pipecompile.Pipe, Case]:
    """The model's stages in the order of ``schedule``, with a model that nothing has trained."""
    stages = ranks * per_rank(schedule)
    first = compiled(name, stages, ranks)
    partition = first.plan.partition
    timetable = make_timetable(schedule, Shape(stages, ranks, MICROBATCHES), partition=partition)
    program = communicate(timetable, partition)
    model, batch, loss = case(name)
    files = {**first._files, "program.json": json.dumps(program.to_json())}
    return pipecompile.Pipe(files, model, loss), (model, batch, loss)


def check(schedule: str, name: str, ranks: int) -> None:
    """One step; AssertionError where loss, buffers or gradients of this process's stages are not the unsplit model's."""
    pipe, (model, batch, _) = under(schedule, name, ranks)
    value = pipe.step(batch)
    mine = {id(p) for stage in pipe.stages.values() for p in (*stage.parameters(), *stage.buffers())}
    names = {key for key, p in (*model.named_parameters(), *model.named_buffers()) if id(p) in mine}
    assert names, "this rank holds something"
    assert_same(pipe, Outcome.of(model, value).only(names), unsplit(name).only(names))
    strangers = {key for key, p in model.named_parameters() if p.grad is not None} - names
    assert not strangers, f"rank {pipe.rank} has gradients of parameters of other ranks: {sorted(strangers)}"


def main(folder: str, *names: str) -> None:
    from pipecompile.runtime import connect

    torch.set_num_threads(1)
    for place, value in little_effort().items():
        module, attribute = place.split(".")
        setattr(sys.modules[f"pipecompile.passes.schedules.{module}"], attribute, value)
    connect(timeout_s=60)
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found = {}
    for name in names:
        for schedule in FLUSHING:
            try:
                check(schedule, name, ranks)
                found[f"{name} {schedule}"] = ""
            except AssertionError as error:
                found[f"{name} {schedule}"] = str(error)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
