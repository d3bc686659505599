"""A plan's parts at other sizes of a microbatch: shapes, bytes and costs follow from their formulas."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import sympy

from pipecompile.errors import BatchError, MemoryLimitError
from pipecompile.ir import Condition, Port, Size, Spec, StageCost, StageFormulas, StagePlan, Transfer
from pipecompile.ir.size import evaluate, shape_at
from pipecompile.machine import format_bytes

Sizes = Mapping[str, int]
ENDLESS = 1 << 40
"""So many rows fit where none takes memory."""
Held = tuple[tuple[int, ...], ...]
"""Bytes on each rank: standing, and at each instruction."""


def checked_sizes(
    wanted: Sizes, open_: Sizes, fixed: Mapping[str, str], conditions: tuple[Condition, ...]
) -> dict[str, int]:
    """All open sizes with those that are wanted; BatchError for one that is fixed, unknown, or against a condition."""
    for name, size in wanted.items():
        if name in fixed:
            raise BatchError(f"{name}={size}: {name} is fixed: {fixed[name]}; compile with a batch of that size")
        if name not in open_:
            raise BatchError(f"{name}={size}: the model has no such open size, it has {', '.join(open_) or 'none'}")
        if size < 1:
            raise BatchError(f"{name}={size}: expected at least 1")
    found = {**open_, **wanted}
    for condition in conditions:
        if not evaluate(condition.text, found):
            raise BatchError(f"{condition.where} asks for {condition.text}; compile with a batch of these sizes")
    return found


def holds(sizes: Sizes, conditions: tuple[Condition, ...]) -> bool:
    """Whether sizes meet all conditions."""
    return all(evaluate(condition.text, sizes) for condition in conditions)


def spec_at(spec: Spec, sizes: Sizes) -> Spec:
    return replace(spec, shape=shape_at(spec.shape, sizes))


def stage_at(stage: StagePlan, sizes: Sizes) -> StagePlan:
    def ports(some: tuple[Port, ...]) -> tuple[Port, ...]:
        return tuple(replace(port, spec=spec_at(port.spec, sizes)) for port in some)

    return replace(stage, inputs=ports(stage.inputs), outputs=ports(stage.outputs))


def transfers_at(transfers: tuple[Transfer, ...], stages: tuple[StagePlan, ...]) -> tuple[Transfer, ...]:
    """The transfers with the bytes that the stages' outputs have."""
    sizes = {port.name: port.spec.bytes for stage in stages for port in stage.outputs}
    return tuple(
        replace(t, bytes=sizes[t.value], gradient_bytes=sizes[t.value] if t.gradient_bytes else 0) for t in transfers
    )


def costs_at(
    costs: tuple[StageCost, ...], formulas: tuple[StageFormulas, ...], old: Sizes, new: Sizes
) -> tuple[StageCost, ...]:
    """The costs at new sizes: in the ratio of what the formulas give. BatchError if the plan has none."""
    if dict(old) == dict(new):
        return costs
    if not formulas:
        raise BatchError(
            "the costs of this plan's stages could not be estimated, so it cannot be told for other sizes; compile with a "
            "batch of these sizes"
        )
    return tuple(_cost_at(cost, formula, old, new) for cost, formula in zip(costs, formulas))


def _cost_at(cost: StageCost, formulas: StageFormulas, old: Sizes, new: Sizes) -> StageCost:
    def scaled(value: float, text: str) -> float:
        before, after = float(evaluate(text, old)), float(evaluate(text, new))
        return value * after / before if before else value

    saved = evaluate(formulas.saved_bytes, old), evaluate(formulas.saved_bytes, new)
    backward = scaled(cost.backward_ms, formulas.backward_ms)
    half = scaled(cost.backward_ms - cost.weight_ms, formulas.backward_input_ms)
    return replace(
        cost,
        forward_ms=scaled(cost.forward_ms, formulas.forward_ms),
        backward_ms=backward,
        weight_ms=min(max(0.0, backward - half), backward) if cost.weight_ms else 0.0,
        uses=(),
        saved_bytes=saved[1] if saved[0] in (cost.saved_bytes, 0) else -(-cost.saved_bytes * saved[1] // saved[0]),
    )


def largest(held: Callable[[int], Held], memory: int, allowed: Callable[[int], bool]) -> int:
    """The most rows with which no rank holds more than ``memory`` at any instruction.

    Bytes are taken to be c + d·rows at each instruction and that is solved, at first from two and three rows, then from
    the last two that were looked at, until so many fit and one row more does not.
    """
    rows, above = 0, ENDLESS + 1
    known = {2: held(2), 3: held(3)}
    while above - rows > 1:
        before, last = list(known.items())[-2:]
        guess = min(max(_solved(before, last, memory), rows + 1), above - 1)
        known[guess] = known.pop(guess) if guess in known else held(guess)
        if max(map(max, known[guess])) <= memory:
            rows = guess
        else:
            above = guess
    while rows and not allowed(rows):
        rows -= 1
    if not rows:
        least = max(max(line) for line in held(1))
        raise MemoryLimitError(
            f"not even a microbatch of one row fits into {format_bytes(memory)}: the largest rank needs "
            f"{format_bytes(least)}; use more stages, or allow more memory"
        )
    return rows


def _solved(one: tuple[int, Held], other: tuple[int, Held], limit: int) -> int:
    """The most rows that fit if bytes are linear in them between two counts of rows."""
    least = ENDLESS
    for line, longer in zip(one[1], other[1]):
        for a, b in zip(line, longer):
            slope = (b - a) / (other[0] - one[0])
            if slope > 0:
                least = min(least, math.floor(one[0] + (limit - a) / slope + 1e-9))
            elif max(a, b) > limit:
                return 0
    return least


def expression(text: str, sizes: Sizes) -> Any:
    """A text as a sympy expression in the open sizes."""
    return sympy.expand(evaluate(text, _symbols(sizes)))


def bytes_expression(spec: Spec, sizes: Sizes) -> Any:
    """The bytes of a tensor as a sympy expression in the open sizes."""
    item = replace(spec, shape=()).bytes
    symbols = _symbols(sizes)
    whole: Sequence[Any] = [evaluate(s.text, symbols) if isinstance(s, Size) else int(s) for s in spec.shape]
    return sympy.expand(sympy.Mul(item, *whole))


def _symbols(sizes: Sizes) -> dict[str, Any]:
    return {name: sympy.Symbol(name, integer=True, positive=True) for name in sizes}
