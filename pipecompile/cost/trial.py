"""One node run on its own, as often as wanted: what its forward and backward take, and what it keeps between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipecompile.cost.interpreter import Interpreter, outputs, references
from pipecompile.cost.stopwatch import Stopwatch
from pipecompile.ir import Node, Spec


@dataclass(frozen=True, slots=True)
class Times:
    """Milliseconds of a forward, of the whole backward, and of the backward towards the inputs alone."""

    forward: float
    backward: float
    inputs_only: float


@dataclass(frozen=True, slots=True)
class Clock:
    """Times forwards and backwards on a device."""

    device: torch.device
    watch: Stopwatch

    @staticmethod
    def of(device: torch.device) -> Clock:
        return Clock(device, Stopwatch.of(device))

    def time(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """Milliseconds, and the result. On a device other than the CPU the call is run twice and the second run counts."""
        return self.watch.time(call, call)

    def backward(
        self, made: Sequence[Tensor], gradients: Sequence[Tensor], towards: Sequence[Tensor], keep: bool = False
    ) -> tuple[float, Any]:
        def run(keep: bool) -> Any:
            return torch.autograd.grad(made, towards, gradients, retain_graph=keep, allow_unused=True)

        return self.watch.time(lambda: run(keep), lambda: run(True))

    def overhead(self, runs: int) -> Times:
        """The least that a run of nothing (a view) took: asking the clock and entering autograd, which a stage pays once."""
        leaf = torch.zeros(1, device=self.device, requires_grad=True)
        forward = min(self.time(lambda: None)[0] for _ in range(runs))
        backward = min(self.backward([leaf.view_as(leaf)], [torch.ones_like(leaf)], [leaf])[0] for _ in range(runs))
        return Times(forward, backward, backward)


@dataclass(frozen=True, slots=True)
class Trial:
    """A node and the values that it refers to; running it changes neither these nor any ``.grad``."""

    interpreter: Interpreter
    node: Node
    values: Mapping[str, Tensor]
    specs: Mapping[str, Spec]

    def saved_bytes(self) -> int:
        """Bytes that the forward keeps for the backward, besides parameters and buffers; each storage once.

        Checkpointed modules keep their inputs out of autograd's sight, so those are added.
        """
        own = {_storage(tensor)[0] for tensor in self.interpreter.attributes.values()}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept.update([_storage(tensor)])
            return tensor

        leaves = self._leaves()
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            made = self._differentiable(self.interpreter.prepare(self.node, leaves)())
        if made and self._is_checkpointed():
            kept.update(map(_storage, leaves.values()))
        return sum(size for storage, size in kept.items() if storage not in own)

    def times(self) -> Times:
        """One run."""
        leaves, clock = self._leaves(), Clock.of(self.interpreter.device)
        run = self.interpreter.prepare(self.node, leaves)
        with torch.enable_grad():
            forward, result = clock.time(run)
        made = self._differentiable(result)
        inputs = [tensor for tensor in leaves.values() if tensor.requires_grad]
        weights = self._weights()
        if not made or not (inputs or weights):
            return Times(forward, 0.0, 0.0)
        gradients = [torch.ones_like(tensor) for tensor in made]
        both = bool(inputs and weights)
        backward, _ = clock.backward(made, gradients, [*inputs, *weights], both)
        inputs_only, _ = clock.backward(made, gradients, inputs) if both else (backward if inputs else 0.0, None)
        return Times(forward, backward, inputs_only)

    def _differentiable(self, result: Any) -> list[Tensor]:
        return [tensor for tensor in outputs(self.node, result).values() if tensor.requires_grad]

    def _leaves(self) -> dict[str, Tensor]:
        """The inputs, cut off from what made them; copies if the node writes in place, which no leaf allows."""
        leaves = {}
        for name in references(self.node):
            tensor = self.values[name].detach()
            if self.specs[name].gradient and (tensor.is_floating_point() or tensor.is_complex()):
                tensor.requires_grad_()
            leaves[name] = tensor.clone() if self.node.writes else tensor
        return leaves

    def _weights(self) -> list[Tensor]:
        own = {id(tensor): tensor for tensor in map(self.interpreter.attributes.__getitem__, self.node.parameters)}
        return [tensor for tensor in own.values() if tensor.requires_grad]

    def _is_checkpointed(self) -> bool:
        if self.node.kind != "call":
            return False
        modules = self.interpreter.model.get_submodule(self.node.target).modules()
        return any(getattr(module, "gradient_checkpointing", False) is True for module in modules)


def _storage(tensor: Tensor) -> tuple[int, int]:
    """A number that stands for the storage, and its bytes."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()
