"""For each kind of operation, where the samples are in its result (see coupling, which follows them through a graph).

Operations are told apart by their aten name. One that is not listed keeps the samples' dimension if the result has it at
the same place with the same size.
"""

from __future__ import annotations

from dataclasses import replace

from pipecompile.ir import Node, Value
from pipecompile.passes.sample_mixes import MIXES, elementwise, loss, over_dim
from pipecompile.passes.sample_moves import MOVES
from pipecompile.passes.sample_states import COUPLED, FREE, Given, Operand, State, merged, operands, same_place

RULES = MOVES | MIXES
LINEAR = {"to", "_to_copy", "type_as", "clone", "contiguous", "alias", "detach", "lift_fresh_copy", "nan_to_num", "dropout",
          "neg", "add", "add_", "sub", "sub_", "rsub", "sum", "mean", "where", "stack", "cat", "squeeze", "unsqueeze",
          "view", "reshape", "expand", "permute", "transpose", "t", "select", "slice", "flatten", "masked_fill"}  # fmt: skip
OVER_DIM = {"softmax", "_softmax", "log_softmax", "_log_softmax", "logsumexp", "cumsum", "cumprod", "logcumsumexp", "sort",
            "topk", "flip", "roll", "max", "min", "amax", "amin", "median", "var", "std", "var_mean", "std_mean", "norm",
            "linalg_vector_norm", "prod", "renorm"}  # fmt: skip
LOSSES = ("_loss", "binary_cross_entropy", "kl_div")


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
        rule = loss
    if rule is None and name in OVER_DIM:
        rule = over_dim
    if rule is None:
        rule = elementwise if _broadcasts(tensors, shape) else same_place
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


def written(node: Node, given: Given) -> State:
    """What an operation in place brings to the memory that it changes."""
    found = FREE
    for one in operands(given):
        if one.state.kind in ("coupled", "samples", "total") and not (one.discrete and found.kind == "samples"):
            found = merged(found, one.state)
    return found
