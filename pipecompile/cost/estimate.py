"""Estimated costs: no execution, only shapes, so that a model on the meta device or for another machine can be cut.

The operations of a node are run on meta tensors under the roofline, forward and backward, with autograd deciding which
gradients are made and what is kept for them. Distinct nodes are run once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental import _config
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_map

from pipecompile.cost.graph import NodeCost
from pipecompile.cost.interpreter import fill, operation, reach, references
from pipecompile.cost.key import line, specs
from pipecompile.cost.roofline import Fused, Kernel, Roofline, attention_flops, tensors
from pipecompile.errors import CostError
from pipecompile.ir import Attribute, Graph, Node, Ref, Spec
from pipecompile.machine import Machine

ATTENTION = "aten.scaled_dot_product_attention."


def estimate(graph: Graph, machine: Machine, found: dict[str, NodeCost] | None = None) -> dict[str, NodeCost]:
    """The cost of each node that is not replicated on ``machine``, in milliseconds and bytes for one microbatch.

    ``found`` keeps what was found on this machine from one graph to the next.
    """
    known = specs(graph)
    found = {} if found is None else found
    costs: dict[str, NodeCost] = {}
    for node in graph.nodes:
        if node.name in graph.replicated:
            continue
        parts = node.inside or (node,)
        signature = "\n".join(
            [line(node, graph, known, ""), *(line(part, graph, known, part.target) for part in parts)]
        )
        if signature not in found:
            try:
                found[signature] = _cost(run_node(Shapes(graph, known), node, parts), machine)
            except Exception as error:
                raise CostError(
                    f"node {node.name!r} ({node.target}) cannot be estimated: {error}; use --costs measure or a file"
                ) from error
        costs[node.name] = found[signature]
    return costs


@dataclass(frozen=True, slots=True)
class Work:
    """The kernels of a node: of its forward, of its whole backward, of a backward that makes no weight gradients."""

    forward: tuple[Kernel, ...]
    backward: tuple[Kernel, ...]
    backward_input: tuple[Kernel, ...]
    saved_bytes: int


def _cost(work: Work, machine: Machine) -> NodeCost:
    forward, whole, half = (
        sum(kernel.ms(machine) for kernel in kernels) for kernels in (work.forward, work.backward, work.backward_input)
    )
    return NodeCost(forward, whole, work.saved_bytes, max(0.0, whole - half))


def run_node(shapes: Shapes, node: Node, parts: Sequence[Node]) -> Work:
    """What ``parts``, the operations of ``node``, compute and keep, on meta tensors."""
    given = {name for part in parts for name in references(part)} - {v.name for part in parts for v in part.outputs}
    leaves = {name: shapes.value(name) for name in sorted(given)}
    inputs = [tensor for tensor in leaves.values() if tensor.requires_grad]
    written = any(part.writes for part in parts)  # in place, which autograd does not allow on a leaf
    values = {name: tensor.clone() if written else tensor for name, tensor in leaves.items()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.update([_storage(tensor)])
        return tensor

    counter = Roofline()
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for part in parts:
            values |= shapes.run(part, values, counter)
    forward = tuple(counter.kernels)
    made = [values[value.name] for value in node.outputs if values[value.name].requires_grad]
    weights = [tensor for tensor in shapes.attributes.values() if tensor.requires_grad]
    own = {_storage(tensor)[0] for tensor in shapes.attributes.values()}
    return Work(
        forward,
        _backward(made, [*inputs, *weights], counter),
        _backward(made, inputs, counter),
        sum(size for storage, size in kept.items() if storage not in own) if made else 0,
    )


def _backward(made: Sequence[Tensor], towards: Sequence[Tensor], counter: Roofline) -> tuple[Kernel, ...]:
    if not made or not towards:
        return ()
    gradients = [torch.ones_like(tensor) for tensor in made]
    before = len(counter.kernels)
    everything = _config.patch(meta_nonzero_assume_all_nonzero=True)  # type: ignore[attr-defined]  # at most, of a mask
    with counter, everything:
        torch.autograd.grad(made, towards, gradients, retain_graph=True, allow_unused=True)
    return tuple(counter.kernels[before:])


def _storage(tensor: Tensor) -> tuple[int, int]:
    """A number that stands for the storage (one on meta has no address), and its bytes."""
    storage = tensor.untyped_storage()
    return StorageWeakRef(storage).cdata, storage.nbytes()  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class Shapes:
    """Runs operations on meta tensors; ``attributes`` collects the parameters and buffers that they use."""

    graph: Graph
    known: Mapping[str, Spec]
    attributes: dict[str, Tensor] = field(default_factory=dict)

    def value(self, name: str) -> Tensor:
        return _empty(self.known[name])

    def attribute(self, fqn: str) -> Tensor:
        if fqn in self.graph.constants:
            return self.attributes.setdefault(fqn, torch.empty_like(self.graph.constants[fqn], device="meta"))
        info = self.graph.attributes[fqn]
        return self.attributes.setdefault(info.canonical, _empty(info.spec))

    def run(self, node: Node, values: Mapping[str, Tensor], counter: Roofline) -> dict[str, Tensor]:
        """The outputs of one operation, whose kernels are charged to ``counter``."""
        args, kwargs = self._arguments(node, values)
        with torch.set_grad_enabled(_differentiates(node)):
            if node.kind == "op" and not node.target.startswith(ATTENTION):
                # What has no meta kernel, or depends on the contents of tensors, raises errors of any kind there.
                with suppress(Exception), counter:
                    result = operation(node.target)(*args, **kwargs)
                    return {value.name: reach(result, value.path) for value in node.outputs}
            read = tensors((args, kwargs))
            flops = attention_flops(*read[:3]) if node.target.startswith(ATTENTION) else (0.0, 0.0)
            if node.kind == "call":
                read += [self.attribute(fqn) for fqn in (*node.parameters, *node.buffers)]
            made = Fused.apply(counter, flops, [value.spec for value in node.outputs], *read)  # type: ignore[no-untyped-call]
        return {value.name: tensor for value, tensor in zip(node.outputs, made)}

    def _arguments(self, node: Node, values: Mapping[str, Tensor]) -> tuple[Any, Any]:
        """Meta tensors in place of values and attributes, and the meta device in place of any other.

        Autocast does not know meta, so what it does to an operation is seen from the result: its dtype.
        """
        made = [getattr(torch, value.spec.dtype) for value in node.outputs]
        cast = next((dtype for dtype in made if dtype.is_floating_point), None)
        if not any(region.startswith("torch.autocast") for region in node.context):
            cast = None

        def leaf(at: Ref | Attribute) -> Tensor:
            tensor = values[at.name] if isinstance(at, Ref) else self.attribute(at.fqn)
            return tensor.to(cast) if cast and tensor.is_floating_point() else tensor

        filled = fill((node.args, dict(node.kwargs)), leaf)
        args, kwargs = tree_map(lambda x: torch.device("meta") if isinstance(x, torch.device) else x, filled)
        return args, kwargs


def _empty(spec: Spec) -> Tensor:
    dtype = getattr(torch, spec.dtype)
    differentiable = spec.gradient and (dtype.is_floating_point or dtype.is_complex)
    return torch.empty(spec.shape, dtype=dtype, device="meta", requires_grad=differentiable)


def _differentiates(node: Node) -> bool:
    modes = [region for region in node.context if region in ("torch.no_grad()", "torch.enable_grad()")]
    return not modes or modes[-1] == "torch.enable_grad()"
