"""For each kind of operation, where the samples are in its result (see coupling, which follows them through a graph).

Operations are told apart by their aten name. One that is not listed keeps the samples' dimension if the result has it at
the same place with the same size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from pipecompile.ir import Node, Value
from pipecompile.passes.sample_states import COUPLED, FREE, Operand, State, merged, operands, samples

Given = Mapping[str, Any]
CAST = {
    "to",
    "_to_copy",
    "type_as",
    "clone",
    "contiguous",
    "alias",
    "detach",
    "lift_fresh_copy",
    "nan_to_num",
    "dropout",
}
LINEAR = CAST | {"neg", "add", "add_", "sub", "sub_", "rsub", "sum", "mean", "where", "stack", "cat", "squeeze", "unsqueeze",
                 "view", "reshape", "expand", "permute", "transpose", "t", "select", "slice", "flatten", "masked_fill"}  # fmt: skip
OVER_DIM = {"softmax", "_softmax", "log_softmax", "_log_softmax", "logsumexp", "cumsum", "cumprod", "logcumsumexp", "sort",
            "topk", "flip", "roll", "max", "min", "amax", "amin", "median", "var", "std", "var_mean", "std_mean", "norm",
            "linalg_vector_norm", "prod", "glu_over", "renorm"}  # fmt: skip
LOSSES = ("_loss", "binary_cross_entropy", "kl_div", "mse_loss", "cosine_embedding_loss")


def state(node: Node, value: Value, given: Given, count: int) -> State:
    """The state of one result of ``node``; ``count`` is the number of samples."""
    shape = tuple(map(int, value.spec.shape))
    found = _state(node, value, shape, given, count)
    if Operand(found, shape, value.spec.dtype).discrete and found.kind != "samples":
        return FREE
    learned = any(one.state.learned for one in operands(given)) or bool(node.parameters)
    if found.kind == "total" and not learned:
        return FREE  # a number about the batch, such as how many tokens it has
    return found if found.kind == "coupled" or found.learned == learned else replace(found, learned=learned)


def _state(node: Node, value: Value, shape: tuple[int, ...], given: Given, count: int) -> State:
    name = node.target.split(".")[1] if node.target.count(".") > 1 else node.target
    if name.endswith("_as"):
        given = {"self": given["self"]}  # of the other only type or shape
    tensors = list(operands(given))
    kinds = {one.state.kind for one in tensors}
    if "coupled" in kinds:
        return COUPLED
    if not kinds & {"samples", "total"} or name.startswith("new_") or name.endswith("_like"):
        return FREE  # also what takes no more than a shape from samples
    if "samples" not in kinds:
        return _of_totals(name, tensors)
    rule = RULES.get(name.removesuffix("_") if name not in RULES else name)
    if rule is None and any(name.startswith(part) or name.endswith(part) for part in LOSSES):
        rule = _loss
    if rule is None and name in OVER_DIM:
        rule = _over_dim
    if rule is None:
        rule = _elementwise if _broadcasts(tensors, shape) else _same_place
    return rule(name, given, shape, count)


def _of_totals(name: str, tensors: list[Operand]) -> State:
    totals = sum(one.state.kind == "total" for one in tensors)
    free = [one for one in tensors if one.state.kind == "free"]
    if name in LINEAR or (name in ("mul", "mul_") and totals == 1) or (name in ("linear", "matmul") and totals == 1):
        return State("total")
    divides = name in ("div", "div_") and totals == 1 and (not free or tensors[0].state.kind == "total")
    return State("total") if divides else COUPLED


def _broadcasts(tensors: list[Operand], shape: tuple[int, ...]) -> bool:
    """Whether ``shape`` is what the tensors' shapes broadcast to."""
    rank = max(len(one.shape) for one in tensors)
    aligned = [(1,) * (rank - len(one.shape)) + one.shape for one in tensors]
    return tuple(map(max, zip(*aligned))) == shape and all(
        size in (1, whole) for one in aligned for size, whole in zip(one, shape)
    )


def _first(given: Given) -> Operand:
    """The first tensor that holds samples."""
    return next(one for one in operands(given) if one.state.kind == "samples")


def _elementwise(name: str, given: Given, shape: tuple[int, ...], count: int) -> State:
    found = FREE
    loss_like = name in ("add", "sub", "rsub") and len(shape) <= 1
    for one in operands(given):
        here = one.state
        if here.kind == "total" and loss_like:
            continue
        if here.kind == "samples":
            here = replace(here, dim=here.dim + len(shape) - len(one.shape))
            if one.discrete and found.kind == "samples":
                continue
        found = merged(found, here) if found is not FREE else here
    return found


def _same_place(name: str, given: Given, shape: tuple[int, ...], count: int) -> State:
    one = _first(given)
    dim = one.state.dim
    if dim < len(shape) and shape[dim] == one.shape[dim]:
        return one.state
    if not shape:
        return State("total")
    place = next((d for d, size in enumerate(shape) if size % count == 0), None)
    return State("total") if place is None else samples(place, max(shape[place] // count, 1))


def _reshape(name: str, given: Given, shape: tuple[int, ...], count: int) -> State:
    one = _first(given)
    apart = one.state.inner * math.prod(one.shape[one.state.dim + 1 :])  # elements from one sample to the next
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    if count == 1:
        exact = [d for d, size in enumerate(shape) if size == 1 and strides[d] == apart]
        inside = [d for d, size in enumerate(shape) if strides[d] <= apart <= strides[d] * size]
        merging = len(shape) < len(one.shape)  # [T, 1, D] to [T, D] or to [T, heads, D / heads]
        place = next(iter(exact or (inside if merging else inside[::-1])), None)
    else:
        place = next((d for d, size in enumerate(shape) if strides[d] <= apart < strides[d] * size), None)
    return _same_place(name, given, shape, count) if place is None else samples(place, max(apart // strides[place], 1))


def _moved(order: Callable[[Given, int], list[int]]) -> Callable[..., State]:
    def rule(name: str, given: Given, shape: tuple[int, ...], count: int) -> State:
        one = _first(given)
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
    one = _first(given)
    return replace(one.state, dim=one.state.dim + (given["dim"] % len(shape) <= one.state.dim))


def _squeeze(name: str, given: Given, shape: tuple[int, ...], count: int) -> State:
    one = _first(given)
    rank = len(one.shape)
    dims = given.get("dim", list(range(rank)))
    gone = {d % rank for d in (dims if isinstance(dims, list) else [dims]) if one.shape[d] == 1}
    if one.state.dim in gone:
        return FREE if count == 1 else one.state
    return replace(one.state, dim=one.state.dim - sum(d < one.state.dim for d in gone))


def _reduced(given: Given, one: Operand) -> set[int]:
    """The dimensions that a reduction is over."""
    rank = max(len(one.shape), 1)
    dims = given.get("dim", given.get("dims"))
    if dims is None or dims == []:
        return set(range(rank))
    return {d % rank for d in (dims if isinstance(dims, list) else [dims])}


def _without(given: Given, one: Operand, dims: set[int], shape: tuple[int, ...]) -> State:
    if len(shape) == len(one.shape):
        return one.state
    return replace(one.state, dim=one.state.dim - sum(d < one.state.dim for d in dims))


def _sum(name: str, given: Given, shape: tuple[int, ...], count: int) -> State:
    one = _first(given)
    dims = _reduced(given, one)
    return State("total") if one.state.dim in dims else _without(given, one, dims, shape)


def _over_dim(name: str, given: Given, shape: tuple[int, ...], count: int) -> State:
    one = _first(given)
    if "other" in given and isinstance(given["other"], Operand):
        return _elementwise(name, given, shape, count)
    default = {"sort": -1, "topk": -1, "median": None}.get(name)
    dims = _reduced({"dim": given.get("dim", given.get("dims", default))}, one)
    if one.state.dim in dims:
        return COUPLED
    return _without(given, one, dims, shape)


def _product(a: Operand, b: Operand, left: int, right: int, shape: tuple[int, ...]) -> State:
    """A matrix product of operands of rank ``left`` and ``right``: where each one's samples end up."""
    places: list[int | None] = []
    for one, rank, contracted, kept in ((a, left, left - 1, -2), (b, right, max(right - 2, 0), -1)):
        if one.state.kind != "samples":
            continue
        if one.state.dim == contracted:
            places.append(None)
        elif one.state.dim >= rank - 2:
            places.append(len(shape) + (kept if min(left, right) > 1 else -1))
        else:
            places.append(one.state.dim + len(shape) - rank)
    if any(one.state.kind == "total" for one in (a, b)) or len(set(places)) > 1:
        return COUPLED
    if places[0] is None:
        return State("total")
    return samples(places[0], (a if a.state.kind == "samples" else b).state.inner)


def _matmul(name: str, given: Given, shape: tuple[int, ...], count: int) -> State:
    found = [one for one in operands(given) if one.shape]
    a, b = found[-2:]
    return _product(a, b, len(a.shape), len(b.shape), shape)


def _linear(name: str, given: Given, shape: tuple[int, ...], count: int) -> State:
    a, b = given["input"], given["weight"]
    weight = b.state if b.state.kind != "samples" else replace(b.state, dim=1 - b.state.dim)
    return _product(a, replace(b, state=weight), len(a.shape), 2, shape)


def _einsum(name: str, given: Given, shape: tuple[int, ...], count: int) -> State:
    equation = given["equation"].replace(" ", "")
    left, _, right = equation.partition("->")
    letters: set[str] = set()
    inner = 1
    for term, one in zip(left.split(","), operands(given)):
        if one.state.kind == "total":
            return COUPLED
        if one.state.kind == "samples":
            if "." in term:
                return _same_place(name, given, shape, count)
            letters.add(term[one.state.dim])
            inner = one.state.inner
    if len(letters) > 1:
        return COUPLED
    (letter,) = letters
    return samples(right.index(letter), inner) if letter in right else State("total")


def _distances(name: str, given: Given, shape: tuple[int, ...], count: int) -> State:
    """cdist: every row of one with every row of the other."""
    a, b = list(operands(given))[:2]
    turned = replace(b.state, dim={len(b.shape) - 2: len(b.shape) - 1}.get(b.state.dim, b.state.dim))
    return _product(a, replace(b, state=turned), len(a.shape), len(b.shape), shape)


def _attention(name: str, given: Given, shape: tuple[int, ...], count: int) -> State:
    found = [one for one in operands(given) if not one.discrete]
    places = {one.state.dim - len(one.shape) for one in found if one.state.kind == "samples"}
    if len(places) > 1 or any(place >= -2 for place in places) or any(one.state.kind == "total" for one in found):
        return COUPLED
    return (
        replace(_first(given).state, dim=len(shape) + max(places)) if places else _same_place(name, given, shape, count)
    )


def _convolution(name: str, given: Given, shape: tuple[int, ...], count: int) -> State:
    if given["weight"].state.kind != "free" and given.get("groups", 1) == 1:
        return COUPLED
    return _same_place(name, given, shape, count)


def _norm(name: str, given: Given, shape: tuple[int, ...], count: int) -> State:
    one = _first(given)
    first = len(shape) - len(given["normalized_shape"]) if "normalized_shape" in given else 1
    return COUPLED if one.state.dim >= first else one.state


def _loss(name: str, given: Given, shape: tuple[int, ...], count: int) -> State:
    by_class = name.startswith(("cross_entropy", "nll"))
    if by_class:
        one = next(operands(given))
        classes = 1 if len(one.shape) > 1 else 0
        if one.state.kind == "samples" and one.state.dim == classes:
            return COUPLED
    if not shape:
        return State("total")
    return _same_place(name, given, shape, count)


def _cat(name: str, given: Given, shape: tuple[int, ...], count: int) -> State:
    found = FREE
    for one in operands(given):
        here = one.state if one.state.kind != "total" else COUPLED
        found = merged(found, here)
    if name == "stack" and found.kind == "samples":
        return replace(found, dim=found.dim + (given.get("dim", 0) % len(shape) <= found.dim))
    return found


def _expand(name: str, given: Given, shape: tuple[int, ...], count: int) -> State:
    one = _first(given)
    return replace(one.state, dim=one.state.dim + len(shape) - len(one.shape))


def _interleave(name: str, given: Given, shape: tuple[int, ...], count: int) -> State:
    one = _first(given)
    if one.state.dim >= len(shape):
        return _same_place(name, given, shape, count)
    grown = shape[one.state.dim] // max(one.shape[one.state.dim], 1)
    return replace(one.state, inner=one.state.inner * max(grown, 1))


def _select(name: str, given: Given, shape: tuple[int, ...], count: int) -> State:
    one = _first(given)
    dim = given.get("dim", 0) % len(one.shape)
    if dim == one.state.dim:
        return FREE
    return replace(one.state, dim=one.state.dim - (dim < one.state.dim))


def _slice(name: str, given: Given, shape: tuple[int, ...], count: int) -> State:
    """Also chunk and split: a part of the samples is set beside another part of them."""
    one = _first(given)
    dim = one.state.dim
    if given.get("dim", 0) % len(one.shape) != dim or one.discrete or shape[dim] % count == 0:
        return one.state
    return COUPLED if one.state.inner == 1 and one.state.learned else one.state


def _lookup(name: str, given: Given, shape: tuple[int, ...], count: int) -> State:
    """embedding(weight, indices): one row for each index."""
    indices = given.get("indices", given.get("input"))
    if given["weight"].state.kind != "free":
        return _same_place(name, given, shape, count)
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
        return _same_place(name, given, shape, count)
    if one.state.dim not in at:
        before = sum(d < one.state.dim for d in at)
        moved = one.state.dim - before + (block if not adjacent or one.state.dim > at[0] else 0)
        return replace(one.state, dim=moved) if moved < len(shape) else _same_place(name, given, shape, count)
    places = [d for d in range(start, min(start + block, len(shape))) if shape[d] % count == 0]
    return samples(places[0], max(shape[places[0]] // count, 1)) if places else FREE


def _scatter(name: str, given: Given, shape: tuple[int, ...], count: int) -> State:
    one: Operand = given["self"]
    if one.state.kind == "samples":
        return one.state
    return _same_place(name, given, shape, count)


def written(node: Node, given: Given) -> State:
    """What an operation in place brings to the memory that it changes."""
    found = FREE
    for one in operands(given):
        if one.state.kind in ("coupled", "samples", "total") and not (one.discrete and found.kind == "samples"):
            found = merged(found, one.state)
    return found


RULES: dict[str, Callable[..., State]] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten"), _reshape),
    "permute": _moved(_permutation),
    **dict.fromkeys(("transpose", "t", "swapaxes", "numpy_T"), _moved(_swap)),
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    **dict.fromkeys(("sum", "mean", "nansum"), _sum),
    **dict.fromkeys(("mm", "matmul", "bmm", "baddbmm", "addmm", "mv", "dot", "addbmm"), _matmul),
    "linear": _linear,
    "einsum": _einsum,
    **dict.fromkeys(("cdist", "_cdist_forward", "_euclidean_dist"), _distances),
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _convolution),
    **dict.fromkeys(("layer_norm", "rms_norm", "group_norm", "instance_norm"), _norm),
    **dict.fromkeys(("cat", "stack", "concat"), _cat),
    **dict.fromkeys(("expand", "repeat", "expand_as", "tile"), _expand),
    "repeat_interleave": _interleave,
    "select": _select,
    **dict.fromkeys(("slice", "chunk", "split", "split_with_sizes", "narrow"), _slice),
    "unbind": _select,
    "embedding": _lookup,
    "index": _index,
    **dict.fromkeys(("index_put", "scatter", "index_add", "scatter_add", "index_copy", "masked_scatter"), _scatter),
}
