"""Refuses a batch that a pipeline was not compiled for, before anything runs: what it is, what was expected, and why."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pipecompile.errors import BatchError
from pipecompile.ir import Size, Value
from pipecompile.ir.size import BATCH, evaluate
from pipecompile.plan import Plan


def check_batch(plan: Plan, batch: Any) -> None:
    """BatchError unless ``batch`` has the compiled tensors, in the compiled sizes where these are not open."""
    found: dict[str, tuple[int, str]] = {}
    for value in plan.inputs:
        place = "".join(f"[{step!r}]" if kind == "item" else f".{step}" for kind, step in value.path)
        leaf = _reach(batch, value, place)
        _check_tensor(plan, value, leaf, f"batch{place}")
        for dimension, size in enumerate(value.spec.shape):
            if isinstance(size, Size):
                count = leaf.shape[dimension] // (1 if dimension else plan.microbatches)
                _check_agreement(found, size.text, count, f"dimension {dimension} of batch{place}")
    sizes = {name: count for name, (count, _) in found.items()}
    _check_conditions(plan, sizes)
    if any(rows % plan.microbatches for rows in _rows(plan, batch)):  # the first microbatches have one row more
        _check_conditions(plan, sizes | {BATCH: sizes[BATCH] + 1})


def _rows(plan: Plan, batch: Any) -> list[int]:
    """The rows of the tensors whose number of rows is open."""
    split = [v for v in plan.inputs if v.spec.shape and isinstance(v.spec.shape[0], Size)]
    return [int(_reach(batch, value, "").shape[0]) for value in split]


def _check_conditions(plan: Plan, sizes: dict[str, int]) -> None:
    for condition in plan.conditions if sizes != plan.sizes else ():
        if sizes.get(BATCH) and not evaluate(condition.text, sizes):
            told = ", ".join(f"{name} {count}" for name, count in sizes.items())
            raise BatchError(
                f"a microbatch has {told}, but {condition.where} asks for {condition.text}, and what follows was compiled "
                "for that answer; compile again with such a batch"
            )


def _reach(batch: Any, value: Value, place: str) -> Any:
    try:
        for kind, step in value.path:
            batch = batch[step] if kind == "item" else getattr(batch, step)
    except (KeyError, IndexError, AttributeError, TypeError):
        raise BatchError(f"the batch has no {place}; it was compiled with {value.spec} there") from None
    return batch


def _check_tensor(plan: Plan, value: Value, leaf: Any, name: str) -> None:
    """The compiled dtype, as many dimensions, and the compiled size in each that is not open."""
    shape = value.spec.shape
    expected = [size * plan.microbatches if not d else int(size) for d, size in enumerate(shape)]
    alike = isinstance(leaf, Tensor) and len(leaf.shape) == len(shape) and _dtype(leaf) == value.spec.dtype
    differs = [
        d for d, size in enumerate(shape) if not isinstance(size, Size) and alike and leaf.shape[d] != expected[d]
    ]
    if alike and not differs:
        return
    got = f"{_dtype(leaf)}{list(leaf.shape)}" if isinstance(leaf, Tensor) else type(leaf).__name__
    why = [
        f"; {size} is fixed: {reason}"
        for size, reason in plan.fixed.items()
        if differs and (size == BATCH) != bool(differs[0])
    ]
    raise BatchError(
        f"{name} is {got}, but the pipeline was compiled for {value.spec.dtype}{expected} "
        f"({plan.microbatches} microbatches){''.join(why)}; give it that, or compile again with this batch"
    )


def _check_agreement(found: dict[str, tuple[int, str]], name: str, count: int, place: str) -> None:
    known, before = found.setdefault(name, (count, place))
    if known != count and name != BATCH:
        raise BatchError(
            f"{place} is {count}, but {before} is {known}, and they were equal when the pipeline was compiled; give "
            "them one length, or compile again with a batch in which they differ"
        )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
