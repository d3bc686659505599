"""Reads ``plan.json``, which others may have changed: every part has its type, and the parts agree with each other.

What the runtime takes from a plan is checked here, so that no step fails in a place that does not say why: sizes, stages
and their ports, what crosses between them. What is wrong is named by its place in the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from pipecompile.errors import BuildError, PartitionError, ScheduleError
from pipecompile.ir import Forecast, Program, Shape, Spec
from pipecompile.ir.json_text import LARGEST, Reader, shortened
from pipecompile.ir.size import evaluate, read_size
from pipecompile.plan import NOT_WRITTEN, PLAN_VERSION, Plan

WHERE = "plan.json"
MOST_BYTES = 1 << 50
"""More than any stage takes: sums of such sizes are whole numbers of 64 bits."""
Problem = tuple[str, str]
"""A place in the file, and what is wrong there."""


def read_plan(whole: Any) -> Plan:
    """The plan that ``Plan.to_json`` gave; BuildError if it is of another version, or names what is malformed where."""
    plain = Reader()
    version = plain.object(whole, WHERE).get("version")
    if version != PLAN_VERSION:
        raise BuildError(
            f"plan.json has version {shortened(version)}, this pipecompile reads {PLAN_VERSION}; compile again"
        )
    sizes = plain.as_type(Mapping[str, int], whole.get("sizes", {}), f"{WHERE}: sizes")
    read = Reader(special={Spec: lambda one, where: _spec(plain, one, sizes, where), Forecast: _forecast})
    found = read.fields_of(Plan, whole, WHERE, ignored=("version", *NOT_WRITTEN))
    plan = Plan(**found)
    for place, problem in _problems(plan):
        plain.refuse(f"{WHERE}: {place}", problem)
    return plan


def _forecast(whole: Any, where: str) -> Forecast:
    return Forecast(**Reader().fields_of(Forecast, whole, where, ignored=("bubble", "spans")))


def _spec(read: Reader, whole: Any, sizes: Mapping[str, int], where: str) -> Spec:
    shape = read.list(read.object(whole, where).get("shape"), f"{where}.shape")
    rest = read.fields_of(Spec, whole, where, ignored=("shape",))
    found = []
    for k, size in enumerate(shape):
        try:
            found.append(read_size(size, sizes))
        except BuildError as error:
            raise BuildError(f"{where}.shape[{k}]: {error}") from error
    return Spec(tuple(found), **rest)


def check_together(plan: Plan, program: Program) -> None:
    """BuildError if a build's program is not that of its plan."""
    shape = program.shape
    pairs = {
        "stages": (len(plan.stages), shape.stages),
        "ranks": (plan.ranks, shape.ranks),
        "microbatches": (plan.microbatches, shape.microbatches),
    }
    for what, (planned, unrolled) in pairs.items():
        if planned != unrolled:
            raise BuildError(
                f"plan.json has {what} {shortened(planned)}, program.json {shortened(unrolled)}; they are of two builds, "
                "compile again"
            )


def _problems(plan: Plan) -> Iterator[Problem]:
    count = len(plan.stages)
    for name in ("costs", "holds", "placement", *(name for name in ("formulas", "alike") if getattr(plan, name))):
        if len(getattr(plan, name)) != count:
            yield name, f"has {len(getattr(plan, name))} parts for {count} stages"
    try:
        Shape(count, plan.ranks, plan.microbatches, plan.placement or (-1,))
        plan.partition  # noqa: B018
    except (ScheduleError, PartitionError) as error:
        yield "stages, ranks, placement, transfers", f"do not fit: {error}"
    yield from _numbers(plan)
    for stage, one in enumerate(plan.stages):
        where = f"stages[{stage}]"
        if one.index != stage:
            yield where, f"has the index {one.index}, expected {stage}"
        if one.recompute not in ("none", "stage", "calls"):
            yield where, f"has recompute {shortened(one.recompute)}, expected none, stage or calls"
        for name, port in [*(("inputs", p) for p in one.inputs), *(("outputs", p) for p in one.outputs)]:
            yield from ((f"{where}.{name}: {shortened(port.name)}", problem) for problem in _wrong_spec(port.spec))
    for name, value in [*(("inputs", v) for v in plan.inputs), *(("reported", v) for v in plan.reported)]:
        yield from ((f"{name}: {shortened(value.name)}", problem) for problem in _wrong_spec(value.spec))
        bad = [step for step in value.path if step[0] not in ("item", "attr") or type(step[1]) not in (str, int)]
        yield from (
            (f"{name}: {shortened(value.name)}", f"has the path step {shortened(step)}, expected item or attr")
            for step in bad
        )
    yield from _crossings(plan)
    yield from _texts(plan)


def _numbers(plan: Plan) -> Iterator[Problem]:
    """What is negative, or so large that sums of it would be no numbers."""

    def check(place: str, number: float, least: int, most: int) -> Iterator[Problem]:
        if not least <= number <= most:
            yield place, f"is {number}, expected {least} to {most}"

    for name, size in plan.sizes.items():
        yield from check(f"sizes[{name!r}]", size, 1, LARGEST)
    yield from check("optimizer_factor", plan.optimizer_factor, 0, 100)
    yield from check("bound_ms", plan.bound_ms, 0, LARGEST)
    for stage, cost in enumerate(plan.costs):
        for name in cost.__slots__:
            if name != "uses":
                yield from check(f"costs[{stage}].{name}", getattr(cost, name), 0, MOST_BYTES)
        if cost.weight_ms > cost.backward_ms:
            yield f"costs[{stage}].weight_ms", f"is {cost.weight_ms}, more than the backward's {cost.backward_ms}"
    for index, transfer in enumerate(plan.transfers):
        for name in ("bytes", "gradient_bytes"):
            yield from check(f"transfers[{index}].{name}", getattr(transfer, name), 0, MOST_BYTES)
    if len(plan.link) not in (0, 2):
        yield "link", f"is {plan.link}, expected nothing, or a latency in ms and bytes for each ms"
    for number in plan.link:
        yield from check("link", number, 0, LARGEST)


def _wrong_spec(spec: Spec) -> Iterator[str]:
    if spec.dtype != "none" and not isinstance(getattr(torch, spec.dtype, None), torch.dtype):
        yield f"has the dtype {shortened(spec.dtype)}, which torch does not have"
    if any(size < 0 for size in spec.shape) or spec.bytes >= LARGEST:
        yield f"has the shape {shortened(tuple(map(int, spec.shape)))}, expected sizes from 0 of a tensor that fits"
    if spec.order and sorted(spec.order) != list(range(len(spec.shape))):
        yield f"has the order {spec.order}, expected every dimension once"


def _crossings(plan: Plan) -> Iterator[Problem]:
    """Every value goes from an output to an input of its name, and is a transfer; and there is no other transfer."""
    stages = plan.stages
    made = {(port.name, s.index, target): port for s in stages for port in s.outputs for target in port.targets}
    read = {(port.name, port.source, s.index): port for s in stages for port in s.inputs}
    crossing = {(t.value, t.source, t.target): t for t in plan.transfers}
    for key in {**made, **read, **crossing}:
        value, source, target = key
        place = f"{shortened(value)} from stage {source} to stage {target}"
        lost = ["outputs"] * (key not in made) + ["inputs"] * (key not in read) + ["transfers"] * (key not in crossing)
        if lost:
            yield place, f"is not among the {lost[0]}"
        elif made[key].spec != read[key].spec:
            yield place, f"is {made[key].spec} there, {read[key].spec} here"
        elif (made[key].spec.gradient and made[key].spec.bytes > 0) != (crossing[key].gradient_bytes > 0):
            yield place, "has a gradient in the stages or in the transfers, but not in both"


def _texts(plan: Plan) -> Iterator[Problem]:
    if plan.gradient_dtype not in ("", "float32"):
        yield "gradient_dtype", f"is {shortened(plan.gradient_dtype)}, expected float32 or nothing"
    if plan.source and not all(isinstance(plan.source.get(key), str) for key in ("file", "sha256")):
        yield "source", "has no texts for file and sha256"
    for index, condition in enumerate(plan.conditions):
        yield from _wrong_text(plan, f"conditions[{index}].text", condition.text)


def _wrong_text(plan: Plan, place: str, text: str) -> Iterator[Problem]:
    try:
        value = evaluate(text, plan.sizes)
    except BuildError as error:
        yield place, f"is wrong: {error}"
        return
    if not (isinstance(value, int | float) and 0 <= value < LARGEST**2):
        yield place, f"is {shortened(value)} at the compiled sizes, expected a number from 0"
