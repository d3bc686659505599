"""The sizes of each microbatch of a step, and what crosses between stages at these sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipecompile.ir import Path, Port, Size, StagePlan, Value
from pipecompile.ir.size import shape_at

MOST = 64
"""Steps are kept wired for so many different sizes."""

StepSizes = tuple[tuple[int, ...], ...]
"""For each microbatch its open sizes, in the order of ``names``."""


class StepSizesOf:
    """Reads the sizes off a step's microbatches; ``inputs`` are the batch's tensors as they were compiled."""

    def __init__(self, inputs: Sequence[Value]) -> None:
        places: dict[str, tuple[Path, int]] = {}
        values: dict[str, int] = {}
        for value in inputs:
            for dimension, size in enumerate(value.spec.shape):
                if isinstance(size, Size) and size.text.isidentifier():
                    places.setdefault(size.text, (value.path, dimension))
                    values.setdefault(size.text, int(size))
        self.names = tuple(places)
        self.compiled = tuple(values.values())
        self._places = tuple(places.values())

    def __call__(self, microbatches: Sequence[Any]) -> StepSizes:
        return tuple(tuple(_size(one, *place) for place in self._places) for one in microbatches)

    def of_all(self, microbatches: Sequence[Any], count: int) -> StepSizes:
        """The sizes of ``count`` microbatches, of which a small batch may lack the last: these are like those before."""
        found = self(microbatches)
        return found + found[-1:] * (count - len(found))


def _size(microbatch: Any, path: Path, dimension: int) -> int:
    for kind, step in path:
        microbatch = microbatch[step] if kind == "item" else getattr(microbatch, step)
    size: int = microbatch.shape[dimension]
    return size


def plans_at(plans: Mapping[int, StagePlan], names: Sequence[str], sizes: StepSizes) -> list[Mapping[int, StagePlan]]:
    """The plans at each microbatch's sizes."""
    known = {one: _at(plans, dict(zip(names, one))) for one in set(sizes)}
    return [known[one] for one in sizes]


def _at(plans: Mapping[int, StagePlan], sizes: Mapping[str, int]) -> Mapping[int, StagePlan]:
    def ports(some: tuple[Port, ...]) -> tuple[Port, ...]:
        return tuple(replace(p, spec=replace(p.spec, shape=shape_at(p.spec.shape, sizes))) for p in some)

    return {s: replace(plan, inputs=ports(plan.inputs), outputs=ports(plan.outputs)) for s, plan in plans.items()}
