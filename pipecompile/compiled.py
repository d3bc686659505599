"""What compiling takes and gives: the options, and the compiled parts from which plan and build are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipecompile.ir import Forecast, Program, Shape, StageFormulas, Value
from pipecompile.passes.assemble import StageBody, held
from pipecompile.passes.communicate import communicate
from pipecompile.passes.notes import stage_notes
from pipecompile.passes.opening import Split
from pipecompile.passes.partitioners import pose
from pipecompile.passes.partitioners.explain import explain
from pipecompile.passes.schedules import make_timetable
from pipecompile.plan import Plan
from pipecompile.simulate import Link


@dataclass(frozen=True, slots=True)
class Options:
    """What a user may choose; ``memory`` is in bytes for each rank, ``opaque`` are FQN patterns of modules never cut.

    ``recompute`` has a mode for each stage (see recomputing.py); empty: none anywhere.
    """

    stages: int
    ranks: int
    microbatches: int
    schedule: str = "1f1b"
    tolerance: float = 0.05
    memory: int | None = None
    link: Link | None = None
    optimizer_factor: float = 2.0
    opaque: tuple[str, ...] = ()
    recompute: tuple[str, ...] = ()
    gradient_dtype: str = ""


@dataclass(frozen=True, slots=True)
class Compiled:
    """Everything that compiling gives: the split graph, the stages and their sources, the program and its forecast."""

    options: Options
    split: Split
    bodies: tuple[StageBody, ...]
    sources: tuple[str, ...]
    program: Program
    forecast: Forecast

    def plan(self, source: Mapping[str, Any], note: str = "", formulas: tuple[StageFormulas, ...] = ()) -> Plan:
        """The plan; ``source`` says where the model came from, ``note`` is added to the graph's own, ``formulas`` are
        the stages' costs at other sizes.
        """
        graph, partition, link = self.split.graph, self.split.partition, self.options.link
        specs = {value.name: value.spec for node in graph.nodes for value in node.outputs}
        return Plan(
            model=partition.graph,
            schedule=self.options.schedule,
            ranks=self.options.ranks,
            microbatches=self.options.microbatches,
            placement=self.program.shape.placement,
            loss=graph.loss,
            weight=graph.weight,
            inputs=graph.inputs,
            stages=tuple(body.plan for body in self.bodies),
            costs=partition.costs,
            holds=tuple(tuple(held(graph, body.plan)) for body in self.bodies),
            transfers=partition.transfers,
            forecast=self.forecast,
            bound_ms=partition.bound_ms,
            bound_bytes=partition.bound_bytes,
            gradient_dtype=self.options.gradient_dtype,
            frozen=tuple(
                sorted(a.canonical for a in graph.attributes.values() if a.kind == "parameter" and not a.spec.gradient)
            ),
            reported=tuple(Value(name, specs[value]) for name, value in graph.reported.items()),
            random=self.split.random,
            replicated=tuple(node.name for node in graph.nodes if node.name in graph.replicated),
            why=self.why(),
            opened=tuple(key for key in graph.opened if not key.startswith("@")),
            notes=(*graph.notes, *stage_notes(graph, self.bodies), *self.split.gains, *([note] if note else [])),
            source=source,
            link=(link.latency_ms, link.bytes_per_ms) if link else (),
            sizes=graph.sizes,
            fixed=graph.fixed,
            conditions=graph.conditions,
            formulas=formulas,
            shared_bytes={shared.parameter: shared.bytes for shared in partition.shared},
            optimizer_factor=self.options.optimizer_factor,
            program=self.program,
            alike=self.split.alike,
            kernels=self.split.kernels,
        )

    def why(self) -> tuple[str, ...]:
        """Why the cuts are where they are, line by line: what crosses, the next best cut, what sets the time."""
        graph, found = self.split.costed.graph, self.split.partition
        problem = pose(graph, found.stages, tolerance=self.options.tolerance)
        specs = {value.name: value.spec for node in self.split.graph.nodes for value in node.outputs}
        crossing = dict.fromkeys(t.value for t in found.transfers if t.value in specs)
        lines = str(explain(graph, problem, found)).splitlines()
        lines += [f"{name} is {specs[name]}" for name in crossing]
        copies = [v.name for n in self.split.graph.nodes if n.name in self.split.graph.replicated for v in n.outputs]
        return (*lines, *([f"computed by each stage that reads them: {', '.join(copies)}"] if copies else []))

    def single_microbatch(self) -> tuple[Plan, Program]:
        """The same stages with a program for one microbatch, each on a rank of its own."""
        shape = Shape(self.options.stages, self.options.stages, 1)
        program = communicate(make_timetable("gpipe", shape), self.split.partition)
        return replace(
            self.plan({}), gradient_dtype="", microbatches=1, ranks=shape.ranks, placement=shape.placement
        ), program
