"""The straight line from a model to a program: a table of contents, one line a pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from torch import nn

from pipecompile.calibration import Calibration
from pipecompile.capture import Loss, capture
from pipecompile.compiled import Compiled, Options
from pipecompile.cost import NodeCost
from pipecompile.cutting import RECUT_SECONDS, Cutter, with_shorter_step
from pipecompile.ir import Graph, Shape
from pipecompile.limit import within_limit
from pipecompile.masters import with_masters
from pipecompile.passes.assemble import StageBody, assemble
from pipecompile.passes.codegen import codegen
from pipecompile.passes.communicate import communicate
from pipecompile.passes.notes import with_notes
from pipecompile.passes.opening import Split, split
from pipecompile.passes.partitioners.clock import Allowance
from pipecompile.passes.schedules import check_shape
from pipecompile.passes.verify import verify
from pipecompile.recomputing import costing, or_advice, recomputed_calls, with_calls
from pipecompile.simulate import simulate

Price = Callable[[Graph], Mapping[str, NodeCost]]
Weigh = Callable[[Split, tuple[StageBody, ...], Sequence[str]], Split]


def compile_model(
    model: nn.Module, microbatch: Any, loss: Loss | None, price: Price, options: Options, weigh: Weigh | None = None
) -> Compiled:
    """Compile the step ``loss(model, microbatch)``. ``price`` gives the cost of each node of a lifted graph, ``weigh``
    adds what the finished stages take as a whole.

    Every error of the passes comes through as it is.
    """
    shape = Shape(options.stages, options.ranks, options.microbatches)
    check_shape(options.schedule, shape)  # what is impossible is refused before the model is traced
    graph = with_masters(with_notes(capture(model, microbatch, loss, options.opaque)), options.gradient_dtype)
    name = type(model).__name__
    return or_advice(lambda chosen: compile_graph(graph, price, chosen, shape, name, weigh), options)


def compile_graph(
    graph: Graph, price: Price, options: Options, shape: Shape, name: str, weigh: Weigh | None
) -> Compiled:
    """Compile a traced step of the model ``name``."""
    allowance = Allowance(RECUT_SECONDS)

    @cache
    def cutting(calibration: Calibration) -> Cutter:
        if not calibration.besides:
            return Cutter(options, shape)
        return Cutter(options, shape, calibration.besides, allowance=allowance)

    def compiled(memory: int | None, calibration: Calibration) -> Compiled:
        cutter = cutting(calibration).within(memory)
        cost = calibration.over(costing(price, options.recompute, name, whole=True))
        parts = counted = with_shorter_step(split(graph, options.stages, cost, cutter), cutter)
        if "calls" in options.recompute:
            cost = calibration.over(costing(price, options.recompute, name))
            parts = counted = with_calls(parts, graph, cost)
        again = recomputed_calls(parts.graph, price(parts.graph))
        bodies = assemble(parts.graph, parts.stage_of, options.stages, options.recompute, again)
        sources = codegen(parts.graph, bodies, parts.partition.costs)
        if weigh is not None:
            parts = weigh(parts, bodies, sources)

        program = communicate(cutter.last_timetable(parts.partition, counted.partition), parts.partition)
        program = verify(program, parts.partition)
        forecast = simulate(program, parts.partition, options.link, options.optimizer_factor)
        return Compiled(options, parts, bodies, sources, program, forecast)

    return within_limit(compiled, options.memory)
