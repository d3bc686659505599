"""The zoo: small random models of many families, each compiled, run for one step, and compared with itself unsplit.

A family is a file in ``families/`` with ``family() -> (model, batch, loss)``; loss None means the model's own. ``OPAQUE``,
where it has it, are patterns of modules that no trace can follow, as the error says that one gets without them. Costs are
a rough count of multiplications, so that a cut is the same on every machine.
"""

from __future__ import annotations

import copy
import importlib
import pkgutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import nn

from pipecompile.build_files import build_files
from pipecompile.capture import Loss
from pipecompile.compare import buffers, differences, gradients, worst
from pipecompile.compiled import Options
from pipecompile.compiler import compile_model
from pipecompile.cost import NodeCost
from pipecompile.ir import Graph
from pipecompile.passes.opening import rough_work
from pipecompile.pipe import Pipe
from pipecompile.runtime import split

Case = tuple[nn.Module, Any, Loss | None]
MICROBATCHES = 4
COUPLED = ("clip", "mixtral")
"""Families whose loss couples samples: a contrastive one, and a router's loss that multiplies means over all tokens."""
SHAPES = ((2, 2, "1f1b"), (4, 4, "1f1b"), (4, 2, "interleaved-1f1b"))
"""(stages, ranks, schedule) that every family is run with."""


@dataclass(frozen=True, slots=True)
class Row:
    """What one family gave: its worst relative error over loss, gradients and buffers, the tensor that has it, and whether
    the plan says that its loss couples samples."""

    family: str
    stages: int
    schedule: str
    opened: int
    bytes: int
    error: float
    worst: str
    ok: bool
    coupled: bool

    def __str__(self) -> str:
        what = "exact" if self.ok else f"WRONG: {self.worst}"
        what += ", couples samples" if self.coupled else ""
        return (
            f"{self.family:22} {self.stages:2}  {self.schedule:16} {self.opened:4} {self.bytes:10,}  "
            f"{self.error:8.1e}  {what}"
        )


HEADER = f"{'family':22} {'S':>2}  {'schedule':16} open      bytes     error"


def families() -> dict[str, Any]:
    """The function ``family`` of each file, by the file's name."""
    package = importlib.import_module("tests.zoo.families")
    names = sorted(found.name for found in pkgutil.iter_modules(package.__path__))
    return {name: importlib.import_module(f"tests.zoo.families.{name}").family for name in names}


def opaque(name: str) -> tuple[str, ...]:
    """The patterns of modules that a family leaves whole."""
    found: tuple[str, ...] = getattr(importlib.import_module(f"tests.zoo.families.{name}"), "OPAQUE", ())
    return found


def price(graph: Graph) -> dict[str, NodeCost]:
    """A rough cost of each node that is not replicated; a backward takes twice its forward."""
    parts = [node.inside or (node,) for node in graph.nodes]
    work = iter(rough_work(replace(graph, nodes=tuple(part for inside in parts for part in inside))))
    total = [sum(next(work) for _ in inside) + 1 for inside in parts]
    return {
        node.name: NodeCost(1e-6 * cost, 2e-6 * cost)
        for node, cost in zip(graph.nodes, total)
        if node.name not in graph.replicated
    }


def compiled(case: Case, stages: int, ranks: int, schedule: str, opaque: tuple[str, ...] = ()) -> Pipe:
    """The pipeline of a case for a local run, split by rough costs."""
    model, batch, loss = case
    options = Options(stages=stages, ranks=ranks, microbatches=MICROBATCHES, schedule=schedule, opaque=opaque)
    found = compile_model(model, split(batch, MICROBATCHES)[0], loss, price, options)
    return Pipe(build_files(found.plan({}), found.program, found.sources), model, loss, local=True)


def run(name: str, case: Case, stages: int, ranks: int, schedule: str, opaque: tuple[str, ...] = ()) -> Row:
    """Compile a copy of the case's model, run one step, and compare with the case's model unsplit."""
    model, batch, loss = case
    ours = copy.deepcopy(model)
    pipe = compiled((ours, batch, loss), stages, ranks, schedule, opaque)
    value = pipe.step(batch)
    twin = copy.deepcopy(model)
    expected = pipe.reference(twin, batch)
    found = [
        *differences({"": value}, {"": expected}, "the loss"),
        *differences(gradients(ours), gradients(twin), "the gradient of"),
        *differences(buffers(ours), buffers(twin), "the buffer"),
    ]
    bad = worst(found)
    plan = pipe.plan
    ok, coupled = all(d.ok for d in found), any("the loss couples samples" in note for note in plan.notes)
    return Row(name, stages, schedule, len(plan.opened), plan.bytes, bad.error, bad.name.strip(), ok, coupled)


def rows(chosen: dict[str, Any]) -> Iterator[Row]:
    """Every shape of every family."""
    for name, family in chosen.items():
        for stages, ranks, schedule in SHAPES:
            yield run(name, family(), stages, ranks, schedule, opaque(name))


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    known = families()
    results = []
    print(HEADER)
    for row in rows({name: known[name] for name in sys.argv[1:] or known}):
        results.append(row)
        print(row, flush=True)
    print(f"{sum(row.ok for row in results)} of {len(results)} exact")
    told = all(row.coupled == (row.family in COUPLED) for row in results)
    print("" if told else "a loss that couples samples was missed, or one that does not was named")
    sys.exit(not (told and all(row.ok for row in results)))
