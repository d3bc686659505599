"""Evaluates the nodes of a graph one by one on real tensors, with the model's own modules, parameters and buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipecompile.errors import CostError
from pipecompile.ir import Attribute, Graph, Node, Path, Ref


def operation(target: str) -> Callable[..., Any]:
    """The torch operator that ``aten.add.Tensor`` names."""
    found: Any = torch.ops
    for part in target.split("."):
        found = getattr(found, part)
    return found  # type: ignore[no-any-return]


def fill(whole: Any, leaf: Callable[[Ref | Attribute], Any]) -> Any:
    """The same structure of tuples, lists, dicts and slices, with ``leaf`` of each Ref and Attribute in its place."""
    if isinstance(whole, Ref | Attribute):
        return leaf(whole)
    if isinstance(whole, tuple | list):
        return type(whole)(fill(part, leaf) for part in whole)
    if isinstance(whole, Mapping):
        return {key: fill(part, leaf) for key, part in whole.items()}
    if isinstance(whole, slice):
        return slice(*(fill(part, leaf) for part in (whole.start, whole.stop, whole.step)))
    return whole


def references(node: Node) -> tuple[str, ...]:
    """The values that the arguments of ``node`` refer to, each once, whether or not it depends on their contents."""
    found: dict[str, None] = {}

    def leaf(at: Ref | Attribute) -> None:
        if isinstance(at, Ref):
            found[at.name] = None

    fill((node.args, dict(node.kwargs)), leaf)
    return tuple(found)


def reach(whole: Any, path: Path) -> Any:
    """The part of ``whole`` at the end of ``path``."""
    for kind, step in path:
        whole = whole[step] if kind == "item" else getattr(whole, step)
    return whole


@contextmanager
def regions(context: tuple[str, ...]) -> Iterator[None]:
    """Enter the regions around a node (``torch.no_grad()``, ``torch.autocast(...)``), outermost first."""
    with ExitStack() as stack:
        for expression in (region for region in context if not region.startswith("checkpoint:")):
            stack.enter_context(eval(expression, {"torch": torch}))
        yield


@dataclass(frozen=True, slots=True)
class Interpreter:
    """Runs single nodes of ``graph``; ``attributes`` are the tensors of the model by every FQN they have."""

    graph: Graph
    model: nn.Module
    attributes: Mapping[str, Tensor]

    @staticmethod
    def of(graph: Graph, model: nn.Module) -> Interpreter:
        attributes: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        attributes |= dict(model.named_buffers(remove_duplicate=False))
        return Interpreter(graph, model, {**graph.constants, **attributes})

    @property
    def device(self) -> torch.device:
        return next((tensor.device for tensor in self.attributes.values()), torch.device("cpu"))

    def inputs(self, batch: Any) -> dict[str, Tensor]:
        """The graph's inputs out of a batch, copied, so that a node that writes on them leaves the batch alone."""
        found = {}
        for value in self.graph.inputs:
            try:
                tensor = reach(batch, value.path)
            except (LookupError, AttributeError, TypeError) as error:
                raise CostError(
                    f"the batch has no {value.name!r} at {value.path}; use the one that was traced"
                ) from error
            if tuple(tensor.shape) != value.spec.shape:
                raise CostError(
                    f"input {value.name!r} has shape {tuple(tensor.shape)}, but was traced with {value.spec.shape}; "
                    f"measure with one microbatch"
                )
            found[value.name] = tensor.detach().clone()
        return found

    def prepare(self, node: Node, values: Mapping[str, Tensor]) -> Callable[[], Any]:
        """What runs the node on the values that it refers to, and gives its raw result."""

        def leaf(at: Ref | Attribute) -> Tensor:
            return values[at.name] if isinstance(at, Ref) else self.attributes[at.fqn]

        function = operation(node.target) if node.kind == "op" else self.model.get_submodule(node.target)
        args, kwargs = fill(node.args, leaf), fill(dict(node.kwargs), leaf)
        if not node.context:
            return lambda: function(*args, **kwargs)

        def inside_regions() -> Any:
            with regions(node.context):
                return function(*args, **kwargs)

        return inside_regions

    def run(self, node: Node, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The node's outputs by name."""
        return outputs(node, self.prepare(node, values)())


def outputs(node: Node, result: Any) -> dict[str, Tensor]:
    """The node's outputs by name, out of its raw result."""
    return {value.name: reach(result, value.path) for value in node.outputs}
