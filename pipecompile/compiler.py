"""The straight line from a model to a program: a table of contents, one line a pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from pipecompile.capture import Loss, capture
from pipecompile.compiled import Compiled, Options
from pipecompile.cost import NodeCost
from pipecompile.cutting import Cutter, with_shorter_step
from pipecompile.ir import Graph, Shape
from pipecompile.passes.assemble import assemble
from pipecompile.passes.codegen import codegen
from pipecompile.passes.communicate import communicate
from pipecompile.passes.notes import with_notes
from pipecompile.passes.opening import split
from pipecompile.passes.schedules import check_shape
from pipecompile.passes.verify import verify
from pipecompile.simulate import simulate

Price = Callable[[Graph], Mapping[str, NodeCost]]


def compile_model(model: nn.Module, microbatch: Any, loss: Loss | None, price: Price, options: Options) -> Compiled:
    """Compile the step ``loss(model, microbatch)``. ``price`` gives the cost of each node of a lifted graph.

    Every error of the passes comes through as it is.
    """
    shape = Shape(options.stages, options.ranks, options.microbatches)
    check_shape(options.schedule, shape)  # what is impossible is refused before the model is traced
    graph = with_notes(capture(model, microbatch, loss, options.opaque))

    cutter = Cutter(options, shape)
    parts = split(graph, options.stages, price, cutter, type(model).__name__)
    parts = with_shorter_step(parts, cutter)
    bodies = assemble(parts.graph, parts.stage_of, options.stages)
    sources = codegen(parts.graph, bodies, parts.partition.costs)

    limits = (options.memory,) * options.ranks if options.memory else None
    program = communicate(cutter.timetable(parts.partition), parts.partition)
    program = verify(program, parts.partition, limits, options.optimizer_factor)
    forecast = simulate(program, parts.partition, options.link, options.optimizer_factor)
    return Compiled(options, parts, bodies, sources, program, forecast)
