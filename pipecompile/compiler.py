"""The straight line from a model to a program: a table of contents, one line a pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from pipecompile.capture import Loss, capture
from pipecompile.compiled import Compiled, Options
from pipecompile.cost import NodeCost
from pipecompile.cutting import cutter, with_shorter_step
from pipecompile.errors import MemoryLimitError
from pipecompile.ir import Graph, Shape
from pipecompile.passes.assemble import assemble
from pipecompile.passes.codegen import codegen
from pipecompile.passes.communicate import communicate
from pipecompile.passes.notes import with_notes
from pipecompile.passes.opening import split
from pipecompile.passes.schedules import check_shape, make_timetable
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

    def with_budget(memory: int | None) -> Compiled:
        parts = split(graph, options.stages, price, cutter(options, shape, memory), type(model).__name__)
        parts = with_shorter_step(parts, options, shape, memory)
        bodies = assemble(parts.graph, parts.stage_of, options.stages)
        sources = codegen(parts.graph, bodies, parts.partition.costs)

        limits = (options.memory,) * options.ranks if options.memory else ()
        timetable = make_timetable(
            options.schedule, shape, None, parts.partition, options.link, limits, options.optimizer_factor
        )
        program = communicate(timetable, parts.partition)
        program = verify(program, parts.partition, limits or None, options.optimizer_factor)
        forecast = simulate(program, parts.partition, options.link, options.optimizer_factor)
        return Compiled(options, parts, bodies, sources, program, forecast)

    return within_memory(with_budget, options.memory)


def within_memory(compiled: Callable[[int | None], Compiled], memory: int | None) -> Compiled:
    """The partitioner counts activations, the proof messages too: leave it less until both agree, at most 1/4 less."""
    if memory is None:
        return compiled(None)
    first: MemoryLimitError | None = None
    for part in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75):
        try:
            return compiled(int(part * memory))
        except MemoryLimitError as error:
            first = first or error
    assert first is not None
    raise first
