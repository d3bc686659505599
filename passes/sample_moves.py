"""Where the samples are after operations that move elements and calculate nothing: views, permutations, indexing, joins."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from pipecompile.passes.sample_states import (
    COUPLED,
    FREE,
    Given,
    Operand,
    Rule,
    State,
    first,
    merged,
    operands,
    same_place,
    samples,
)


def _reshape(name: str, given: Given, shape: tuple[int, ...], count: int) -> State:
    one = first(given)
    apart = one.state.inner * math.prod(one.shape[one.state.dim + 1 :])  # elements from one sample to the next
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    if count == 1:
        exact = [d for d, size in enumerate(shape) if size == 1 and strides[d] == apart]
        inside = [d for d, size in enumerate(shape) if strides[d] <= apart <= strides[d] * size]
        merging = len(shape) < len(one.shape)  # [T, 1, D] to [T, D] or to [T, heads, D / heads]
        place = next(iter(exact or (inside if merging else inside[::-1])), None)
    else:
        place = next((d for d, size in enumerate(shape) if strides[d] <= apart < strides[d] * size), None)
    return same_place(name, given, shape, count) if place is None else samples(place, max(apart // strides[place], 1))


def _moved(order: Callable[[Given, int], list[int]]) -> Callable[..., State]:
    def rule(name: str, given: Given, shape: tuple[int, ...], count: int) -> State:
        one = first(given)
        return replace(one.state, dim=order(given, len(shape)).index(one.state.dim))

    return rule


def _permutation(given: Given, rank: int) -> list[int]:
    return [d % rank for d in given["dims"]]


def _swap(given: Given, rank: int) -> list[int]:
    order = list(range(rank))
    a, b = (given.get("dim0", 0), given.get("dim1", 1 % rank))
    order[a], order[b] = order[b], order[a]
    return order


def _unsqueeze(name: str, given: Given, shape: tuple[int, ...], count: int) -> State:
    one = first(given)
    return replace(one.state, dim=one.state.dim + (given["dim"] % len(shape) <= one.state.dim))


def _squeeze(name: str, given: Given, shape: tuple[int, ...], count: int) -> State:
    one = first(given)
    rank = len(one.shape)
    dims = given.get("dim", list(range(rank)))
    gone = {d % rank for d in (dims if isinstance(dims, list) else [dims]) if one.shape[d] == 1}
    if one.state.dim in gone:
        return FREE if count == 1 else one.state
    return replace(one.state, dim=one.state.dim - sum(d < one.state.dim for d in gone))


def _cat(name: str, given: Given, shape: tuple[int, ...], count: int) -> State:
    found = FREE
    for one in operands(given):
        here = one.state if one.state.kind != "total" else COUPLED
        found = merged(found, here)
    if name == "stack" and found.kind == "samples":
        return replace(found, dim=found.dim + (given.get("dim", 0) % len(shape) <= found.dim))
    return found


def _expand(name: str, given: Given, shape: tuple[int, ...], count: int) -> State:
    one = first(given)
    return replace(one.state, dim=one.state.dim + len(shape) - len(one.shape))


def _interleave(name: str, given: Given, shape: tuple[int, ...], count: int) -> State:
    one = first(given)
    if one.state.dim >= len(shape):
        return same_place(name, given, shape, count)
    grown = shape[one.state.dim] // max(one.shape[one.state.dim], 1)
    return replace(one.state, inner=one.state.inner * max(grown, 1))


def _select(name: str, given: Given, shape: tuple[int, ...], count: int) -> State:
    one = first(given)
    dim = given.get("dim", 0) % len(one.shape)
    if dim == one.state.dim:
        return FREE
    return replace(one.state, dim=one.state.dim - (dim < one.state.dim))


def _slice(name: str, given: Given, shape: tuple[int, ...], count: int) -> State:
    """Also chunk and split: a part of the samples is set beside another part of them."""
    one = first(given)
    dim = one.state.dim
    if given.get("dim", 0) % len(one.shape) != dim or one.discrete or shape[dim] % count == 0:
        return one.state
    return COUPLED if one.state.inner == 1 and one.state.learned else one.state


def _lookup(name: str, given: Given, shape: tuple[int, ...], count: int) -> State:
    """embedding(weight, indices): one row for each index."""
    indices = given.get("indices", given.get("input"))
    if given["weight"].state.kind != "free":
        return same_place(name, given, shape, count)
    return indices.state if isinstance(indices, Operand) else FREE


def _index(name: str, given: Given, shape: tuple[int, ...], count: int) -> State:
    one: Operand = given["self"]
    chosen = given["indices"]
    at = [d for d, index in enumerate(chosen) if index is not None]
    block = max((len(index.shape) for index in chosen if index is not None), default=0)
    adjacent = at == list(range(at[0], at[0] + len(at)))
    start = at[0] if adjacent else 0
    for index in (index for index in chosen if index is not None and index.state.kind == "samples"):
        if index.dtype != "bool" and not (one.state.kind == "samples" and one.state.dim not in at):
            return samples(start + block - len(index.shape) + index.state.dim, index.state.inner)
    if one.state.kind != "samples":
        return same_place(name, given, shape, count)
    if one.state.dim not in at:
        before = sum(d < one.state.dim for d in at)
        moved = one.state.dim - before + (block if not adjacent or one.state.dim > at[0] else 0)
        return replace(one.state, dim=moved) if moved < len(shape) else same_place(name, given, shape, count)
    places = [d for d in range(start, min(start + block, len(shape))) if shape[d] % count == 0]
    return samples(places[0], max(shape[places[0]] // count, 1)) if places else FREE


def _scatter(name: str, given: Given, shape: tuple[int, ...], count: int) -> State:
    one: Operand = given["self"]
    if one.state.kind == "samples":
        return one.state
    return same_place(name, given, shape, count)


MOVES: dict[str, Rule] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten"), _reshape),
    "permute": _moved(_permutation),
    **dict.fromkeys(("transpose", "t", "swapaxes", "numpy_T"), _moved(_swap)),
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    **dict.fromkeys(("cat", "stack", "concat"), _cat),
    **dict.fromkeys(("expand", "repeat", "expand_as", "tile"), _expand),
    "repeat_interleave": _interleave,
    **dict.fromkeys(("select", "unbind"), _select),
    **dict.fromkeys(("slice", "chunk", "split", "split_with_sizes", "narrow"), _slice),
    "embedding": _lookup,
    "index": _index,
    **dict.fromkeys(("index_put", "scatter", "index_add", "scatter_add", "index_copy", "masked_scatter"), _scatter),
}
