"""The straight line from a model to a program: a table of contents, one line a pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from pipecompile.capture import Loss, capture
from pipecompile.cost import NodeCost
from pipecompile.ir import Forecast, Graph, Program, Shape
from pipecompile.passes.assemble import StageBody, assemble
from pipecompile.passes.codegen import codegen
from pipecompile.passes.communicate import communicate
from pipecompile.passes.opening import Split, split
from pipecompile.passes.partitioners import partition
from pipecompile.passes.schedules import make_timetable
from pipecompile.passes.verify import verify
from pipecompile.simulate import Link, simulate

Price = Callable[[Graph], Mapping[str, NodeCost]]


@dataclass(frozen=True, slots=True)
class Options:
    """What a user may choose; ``memory`` is in bytes for each rank."""

    stages: int
    ranks: int
    microbatches: int
    schedule: str = "1f1b"
    tolerance: float = 0.05
    memory: int | None = None
    link: Link | None = None
    optimizer_factor: float = 2.0


@dataclass(frozen=True, slots=True)
class Compiled:
    """Everything that compiling gives: the split graph, the stages and their sources, the program and its forecast."""

    options: Options
    split: Split
    bodies: tuple[StageBody, ...]
    sources: tuple[str, ...]
    program: Program
    forecast: Forecast


def compile_model(model: nn.Module, microbatch: Any, loss: Loss | None, price: Price, options: Options) -> Compiled:
    """Compile the step ``loss(model, microbatch)``; every error of the passes comes through as it is."""
    shape = Shape(options.stages, options.ranks, options.microbatches)
    timetable = make_timetable(options.schedule, shape)

    graph = capture(model, microbatch, loss)
    cut = lambda costs: partition(costs, options.stages, tolerance=options.tolerance)  # noqa: E731
    parts = split(graph, options.stages, price, cut, type(model).__name__)

    bodies = assemble(parts.graph, parts.stage_of, options.stages)
    sources = codegen(parts.graph, bodies, parts.partition.costs)

    timetable = make_timetable(options.schedule, shape, parts.partition.costs)
    program = communicate(timetable, parts.partition)
    limits = (options.memory,) * options.ranks if options.memory else None
    program = verify(program, parts.partition, limits, options.optimizer_factor)
    forecast = simulate(program, parts.partition, options.link, options.optimizer_factor)
    return Compiled(options, parts, bodies, sources, program, forecast)
