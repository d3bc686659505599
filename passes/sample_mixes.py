"""Where the samples are after operations that calculate: sums, products, normalisations, losses, and whether they mix."""

from __future__ import annotations

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


def elementwise(name: str, given: Given, shape: tuple[int, ...], count: int) -> State:
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
    one = first(given)
    dims = _reduced(given, one)
    return State("total") if one.state.dim in dims else _without(given, one, dims, shape)


def over_dim(name: str, given: Given, shape: tuple[int, ...], count: int) -> State:
    one = first(given)
    if "other" in given and isinstance(given["other"], Operand):
        return elementwise(name, given, shape, count)
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
                return same_place(name, given, shape, count)
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
        replace(first(given).state, dim=len(shape) + max(places)) if places else same_place(name, given, shape, count)
    )


def _convolution(name: str, given: Given, shape: tuple[int, ...], count: int) -> State:
    if given["weight"].state.kind != "free" and given.get("groups", 1) == 1:
        return COUPLED
    return same_place(name, given, shape, count)


def _norm(name: str, given: Given, shape: tuple[int, ...], count: int) -> State:
    one = first(given)
    begin = len(shape) - len(given["normalized_shape"]) if "normalized_shape" in given else 1
    return COUPLED if one.state.dim >= begin else one.state


def loss(name: str, given: Given, shape: tuple[int, ...], count: int) -> State:
    by_class = name.startswith(("cross_entropy", "nll"))
    if by_class:
        one = next(operands(given))
        classes = 1 if len(one.shape) > 1 else 0
        if one.state.kind == "samples" and one.state.dim == classes:
            return COUPLED
    if not shape:
        return State("total")
    return same_place(name, given, shape, count)


MIXES: dict[str, Rule] = {
    **dict.fromkeys(("sum", "mean", "nansum"), _sum),
    **dict.fromkeys(("mm", "matmul", "bmm", "baddbmm", "addmm", "mv", "dot", "addbmm"), _matmul),
    "linear": _linear,
    "einsum": _einsum,
    **dict.fromkeys(("cdist", "_cdist_forward", "_euclidean_dist"), _distances),
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _convolution),
    **dict.fromkeys(("layer_norm", "rms_norm", "group_norm", "instance_norm"), _norm),
}
