"""Names that the model's own code suggests: the argument that a value is passed as, or the module that makes it."""

from __future__ import annotations

import builtins
import inspect
import keyword
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from pipecompile.ir import Call, Node, Ref, Value

MEANINGLESS = {"input", "inputs", "x", "args", "kwargs", "tensor", "self", "hidden", "output", "y", "a", "b"}
ABSENT = object()
SIZES = {"batch_size", "sequence_length", *(f"sequence_length_{k}" for k in range(2, 10))}
"""What stages call the sizes of a microbatch."""
RESERVED = SIZES | set(keyword.kwlist) | set(dir(builtins)) | {"batch", "torch", "nn", "self", "math", "inf", "nan"}


def rename_values(
    inputs: tuple[Value, ...],
    nodes: tuple[Node, ...],
    calls: tuple[Call, ...],
    model: nn.Module,
    loss: str,
    weight: str,
) -> dict[str, str]:
    """A new, unique name for each value: from the first call that takes it, else from the outermost call that makes it."""
    wanted: dict[str, str] = {}
    for value in inputs:
        words = [str(step) for _, step in value.path]
        wanted[value.name] = words[-1] if words and not words[-1].isdigit() else f"input_{words[-1] if words else 0}"
    wanted |= {name: word for name, word in ((loss, "loss"), (weight, "weight")) if name}
    for call in calls:
        for argument, name in _arguments(call, model):
            if argument not in MEANINGLESS:
                wanted.setdefault(name, argument)
    for call in calls:
        tail = [part for part in call.fqn.split(".") if part and not part.isdigit()]
        for _, name in call.results:
            if tail:
                wanted.setdefault(name, tail[-1])
    for node in nodes:
        for value in node.outputs:
            wanted.setdefault(value.name, node.target.split(".")[1] if node.target.count(".") > 1 else node.target)
    return unique_names(wanted, [value.name for value in inputs] + [v.name for node in nodes for v in node.outputs])


def _arguments(call: Call, model: nn.Module) -> list[tuple[str, str]]:
    """(parameter name, value name) of the tensors that a call is given directly."""
    try:
        names = list(inspect.signature(model.get_submodule(call.fqn).forward).parameters)
    except (TypeError, ValueError):
        names = []
    found = [(name, arg.name) for name, arg in zip(names, call.args) if isinstance(arg, Ref)]
    return found + [(name, arg.name) for name, arg in call.kwargs.items() if isinstance(arg, Ref)]


def without_defaults(call: Call, model: nn.Module) -> Call:
    """The call without arguments that say what the module assumes anyway: ``h(x, None, use_cache=False)`` is ``h(x)``.

    Only None, True and False are left out, and nothing where hooks see the arguments too.
    """
    module = model.get_submodule(call.fqn)
    if module._forward_pre_hooks or module._forward_hooks:
        return call
    try:
        known = inspect.signature(module.forward).parameters
    except (TypeError, ValueError):
        return call
    named = [p for p in known.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    default = {p.name: p.default for p in named if any(p.default is value for value in (None, True, False))}
    positions = [p.name for p in named if p.kind is p.POSITIONAL_OR_KEYWORD]
    args = list(call.args)
    while args and len(args) <= len(positions) and args[-1] is default.get(positions[len(args) - 1], ABSENT):
        args.pop()
    kwargs = {name: value for name, value in call.kwargs.items() if value is not default.get(name, ABSENT)}
    return replace(call, args=tuple(args), kwargs=kwargs)


def identifier(word: str) -> str:
    """A Python identifier that resembles the word and shadows nothing."""
    name = re.sub(r"\W+", "_", word, flags=re.ASCII).strip("_") or "value"
    name = name if not name[0].isdigit() else f"value_{name}"
    return f"{name}_" if name in RESERVED else name


def unique_names(wanted: Mapping[str, str], order: list[str]) -> dict[str, str]:
    totals = Counter(identifier(wanted[old]) for old in order)
    counts: Counter[str] = Counter()
    taken: set[str] = set()
    names: dict[str, str] = {}
    for old in order:
        base = identifier(wanted[old])
        name = base
        while name in taken or (name == base and totals[base] > 1 and counts[base]):
            counts[base] += 1
            name = f"{base}_{counts[base]}"
        counts[base] += not counts[base]
        taken.add(name)
        names[old] = name
    return names


def apply_names(whole: Any, names: Mapping[str, str]) -> Any:
    """The arguments with every Ref renamed."""
    if isinstance(whole, Ref):
        return Ref(names[whole.name])
    if isinstance(whole, tuple | list):
        return type(whole)(apply_names(part, names) for part in whole)
    if isinstance(whole, dict):
        return {key: apply_names(part, names) for key, part in whole.items()}
    return whole


def rename_value(value: Value, names: Mapping[str, str]) -> Value:
    storage = value.storage if value.storage.startswith("attribute:") else names.get(value.storage, "")
    return replace(value, name=names[value.name], storage=storage)


def rename_node(node: Node, names: Mapping[str, str]) -> Node:
    return replace(
        node,
        args=apply_names(node.args, names),
        kwargs=apply_names(node.kwargs, names),
        outputs=tuple(rename_value(value, names) for value in node.outputs),
        reads=tuple(names[name] for name in node.reads),
        writes=tuple(names[name] for name in node.writes),
    )


def rename_call(call: Call, names: Mapping[str, str]) -> Call:
    return replace(
        call,
        args=apply_names(call.args, names),
        kwargs=apply_names(call.kwargs, names),
        passed=tuple(names[name] for name in call.passed),
        results=tuple((path, names[name]) for path, name in call.results),
    )
