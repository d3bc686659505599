"""The six models compiled in many ways out of one trace of each: tracing takes most of the time of compiling."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

from pipecompile.build_files import build_files
from pipecompile.capture import capture
from pipecompile.compiled import Compiled, Options
from pipecompile.compiler import compile_graph
from pipecompile.cost import NodeCost, estimate
from pipecompile.ir import Graph, Shape
from pipecompile.machine import MACHINES
from pipecompile.passes.notes import with_notes
from pipecompile.runtime import from_first_rank, split
from pipecompile.simulate import Link
from tests.models import MODELS, SAMPLES, Case

Price = Callable[[Graph], Mapping[str, NodeCost]]
CPU = MACHINES["cpu"]
ROWS = 2
"""Of a microbatch."""


def case(name: str, microbatches: int = SAMPLES // ROWS) -> Case:
    """A shared model as ``compile`` leaves it, without a cache of keys, and a batch with ``ROWS`` for each microbatch."""
    model, batch, loss = MODELS[name]()
    if microbatches * ROWS > SAMPLES:
        times = microbatches * ROWS // SAMPLES
        batch = {key: value.repeat(times, *[1] * (value.dim() - 1)) for key, value in batch.items()}
    for module in model.modules():
        if hasattr(module, "config"):
            module.config.use_cache = False
    return model, batch, loss


@functools.cache
def traced(name: str) -> Graph:
    """One of the six models' step on a microbatch."""
    model, batch, loss = case(name)
    return with_notes(capture(model, split(batch, SAMPLES // ROWS)[0], loss))


def estimated(graph: Graph) -> Mapping[str, NodeCost]:
    return estimate(graph, CPU)


def equal(graph: Graph) -> Mapping[str, NodeCost]:
    """Every node costs the same."""
    return {node.name: NodeCost(1.0, 2.0) for node in graph.nodes if node.name not in graph.replicated}


@functools.cache
def title(name: str) -> str:
    return type(MODELS[name]()[0]).__name__


def compiled(name: str, options: Options, price: Price = estimated) -> Compiled:
    return of_graph(traced(name), title(name), options, price)


def of_graph(graph: Graph, name: str, options: Options, price: Price = estimated) -> Compiled:
    shape = Shape(options.stages, options.ranks, options.microbatches)
    return compile_graph(graph, price, options, shape, name, None)


def files(
    name: str, stages: int, ranks: int, microbatches: int, schedule: str = "1f1b", price: Price = estimated, **more: Any
) -> dict[str, str]:
    """The files of a build; in a process group the first rank compiles."""
    link = Link(CPU.link_latency_us / 1e3, CPU.link_bandwidth / 1e3)
    options = Options(stages, ranks, microbatches, schedule, link=link, **more)
    whole: dict[str, str] = json.loads(from_first_rank(lambda: json.dumps(build_of(compiled(name, options, price)))))
    return whole


def build_of(found: Compiled) -> dict[str, str]:
    return build_files(found.plan({}), found.program, found.sources)
