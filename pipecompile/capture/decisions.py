"""What to do where the model's code depends on a tensor's value: compile the answer in, leave the module whole, or refuse.

the value comes from            the code asks for
the batch alone                 a truth or a whole number: compiled in, every step checks it; a fraction: as below
parameters                      whether it is finite: compiled in and checked; otherwise the module that asks is
                                left whole and runs as it is, which the plan says; the model's own forward is refused
random numbers                  a truth that every draw gives: compiled in; otherwise as above
anything                        whether to raise an error and nothing else: compiled in and checked
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from pipecompile.capture.questions import Questions
from pipecompile.capture.structure import leaves
from pipecompile.errors import CaptureError
from pipecompile.expect import EXPECT_TARGET
from pipecompile.ir import Attribute, Graph, Node, Ref

DRAWS = 200
"""How often a random decision is tried."""
FINITE = ("isfinite", "isnan", "isinf", "isneginf", "isposinf")
LOGIC = (
    "any",
    "all",
    "logical_not",
    "bitwise_not",
    "logical_or",
    "logical_and",
    "bitwise_or",
    "bitwise_and",
    "to",
    "__or__",
)


@dataclass(frozen=True, slots=True)
class Decisions:
    """``whole`` are FQNs of modules to leave whole, ``notes`` say why."""

    whole: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


def decisions(graph: Graph, questions: Questions) -> Decisions:
    """Look at every question of a traced graph. CaptureError for what cannot be."""
    places = questions.places
    asked = [n for n in graph.nodes if n.target == EXPECT_TARGET and n.args[2] not in questions.harmless]
    if not asked:
        return Decisions()
    behind = _Behind.of(graph)
    found: dict[str, list[str]] = {}
    for node in asked:
        value, answer, where = node.args
        why = _why(value, answer, list(behind.cone(value)), behind)
        place = places.get(where, where)
        if why and not node.module:
            raise CaptureError(_refusal(why, place))
        if why:
            found.setdefault(f"because of a value that {why} ({place})", []).append(node.module)
    return Decisions(
        frozenset(fqn for fqns in found.values() for fqn in fqns), tuple(map(_note, found.values(), found))
    )


def _why(value: Any, answer: Any, cone: list[Node], behind: _Behind) -> str:
    """Why the answer cannot be compiled in, empty if it can."""
    if any(map(behind.learned, cone)) or behind.changes(value):
        return "" if _about_finiteness(value, behind) else "parameters have a part in"
    if any(part.random for part in cone):
        return "" if _always(cone, value, answer) else "is drawn at random"
    if isinstance(answer, float) and any(behind.reads_batch(part) for part in cone):
        return "changes with every batch"
    return ""


def _note(fqns: list[str], reason: str) -> str:
    names = list(dict.fromkeys(fqns))
    several = f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if names[3:] else ''}"
    return f"left whole, never cut, and run as they are, {reason}: {several}"


def _refusal(why: str, place: str) -> str:
    return (
        f"the model's own forward or the loss decides by a value that {why} ({place}), and what follows would be compiled for "
        "one answer. Keep it a tensor (torch.where instead of if, no .item()), turn it off (layer dropout: layerdrop=0.0 in a "
        "transformers configuration), or move these lines into a module of their own, which is then left whole and runs as it is"
    )


@dataclass(slots=True)
class _Behind:
    """Finds what values are made of."""

    producer: Mapping[str, Node]
    inputs: frozenset[str]
    changed: frozenset[str]
    learnable: frozenset[str]
    cones: dict[str, list[Node]] = field(default_factory=dict)

    @staticmethod
    def of(graph: Graph) -> _Behind:
        producer = {value.name: node for node in graph.nodes for value in node.outputs}
        changed = frozenset(name for node in graph.nodes for name in node.written_buffers)
        learnable = frozenset(fqn for fqn, info in graph.attributes.items() if info.kind == "parameter")
        return _Behind(producer, frozenset(value.name for value in graph.inputs), changed, learnable)

    def cone(self, value: Any) -> Iterator[Node]:
        """The operations behind a value, in program order."""
        todo, found = [value.name] if isinstance(value, Ref) else [], {}
        while todo:
            node = self.producer.get(todo.pop())
            if node is not None and node.name not in found:
                found[node.name] = node
                todo += node.reads
        yield from sorted(found.values(), key=lambda node: node.position)

    def learned(self, node: Node) -> bool:
        return bool(node.parameters) or "opaque" in node.target or any(name in self.changed for name in node.buffers)

    def changes(self, value: Any) -> bool:
        """Whether it is a parameter, or a buffer that the step changes."""
        return isinstance(value, Attribute) and (value.fqn in self.learnable or value.fqn in self.changed)

    def reads_batch(self, node: Node) -> bool:
        return any(name in self.inputs for name in node.reads)


def _about_finiteness(value: Any, behind: _Behind) -> bool:
    """Whether the question is if numbers are finite, as code asks that would stop if they were not."""
    node = behind.producer.get(value.name) if isinstance(value, Ref) else None
    while node is not None:
        name = node.target.split(".")[1]
        if name in FINITE:
            return True
        if name == "ne" and len(set(node.reads)) == 1 and len(node.args) == 2 and node.args[0] == node.args[1]:
            return True  # what isnan is made of
        if name not in LOGIC or not node.reads:
            return False
        node = behind.producer.get(node.reads[0])
    return False


def _always(cone: list[Node], value: Ref, answer: Any) -> bool:
    """Whether the answer stays the same when numbers are drawn again."""
    with torch.random.fork_rng(devices=[]):
        for seed in range(DRAWS):
            torch.manual_seed(seed)
            if _evaluate(cone, value) != answer:
                return False
    return True


def _evaluate(cone: list[Node], value: Ref) -> Any:
    made: dict[str, Any] = {}

    def real(whole: Any) -> Any:
        if isinstance(whole, Ref):
            return made[whole.name]
        if isinstance(whole, tuple | list):
            return type(whole)(map(real, whole))
        return torch.device("cpu") if isinstance(whole, torch.device) else whole

    for node in cone:
        if any(isinstance(leaf, Attribute) for _, leaf in leaves((node.args, dict(node.kwargs)))):
            return None
        function: Any = torch.ops
        for part in node.target.split("."):
            function = getattr(function, part)
        result = function(*real(node.args), **{key: real(part) for key, part in node.kwargs.items()})
        made |= dict(
            zip((output.name for output in node.outputs), result if isinstance(result, tuple | list) else [result])
        )
    return made[value.name].item()
