"""Runs one rank's row: a loop over (handler, operand), in which nothing is left to decide.

Forward: received values become leaves, the stage runs, its outputs wait for their readers; of the graph only the edges
are kept at which gradients enter, so that an output's storage is freed once it is sent and no operation saved it.
Backward: autograd starts at those edges, and what arrives at the leaves goes back to where they came from.

    received ──▶ leaf ──▶ stage ──▶ output ──▶ detached, for its readers
                  │                   └──────▶ edge
    gradient ◀── leaf.grad ◀── autograd ◀── edge ◀── gradients of its readers, summed
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves

from pipecompile.errors import RuntimeFault
from pipecompile.ir import Instruction
from pipecompile.runtime.places import at
from pipecompile.runtime.split_backward import Known, input_half, weight_half
from pipecompile.runtime.transport import Transport
from pipecompile.runtime.whole_backward import Summed
from pipecompile.runtime.wiring import Backward, Forward, Result, Row, Transmit

Handler = Callable[[Any], None]
Kept = tuple[list[Tensor], list[tuple[GradientEdge | None, tuple[int, ...]]], GradientEdge | None]
"""What a backward needs: its leaves, for each output the edge and the slots of its gradients, the loss's edge."""

unviewed = torch.ops.aten._unsafe_view.default
"""The same tensor, which autograd does not take for a view: stages may change in place what they received."""


@dataclass(frozen=True, slots=True)
class Step:
    """An instruction ready to run: ``handler(operand)``; the rest says where it stands, for errors."""

    handler: Handler
    operand: Any
    rank: int
    position: int
    instruction: Instruction


Ran = tuple[Instruction, float, float]
"""An instruction, and when it began and ended (``time.perf_counter`` seconds)."""


def timed(step: Step, ran: list[Ran]) -> Step:
    """The same step, which writes into ``ran`` when it ran."""

    def handler(operand: Any) -> None:
        began = time.perf_counter()
        step.handler(operand)
        ran.append((step.instruction, began, time.perf_counter()))

    return replace(step, handler=handler)


class Executor:
    """One rank's row with its values.

    ``reduce`` has the handlers of sums; with ``mean`` the loss is divided by the step's microbatches and by ``replicas``.
    With ``splits_all``, backwards that come in halves are split whatever that defers, as on an accelerator.
    """

    def __init__(
        self,
        row: Row,
        transport: Transport,
        reduce: Mapping[str, Handler],
        replicas: int,
        mean: bool,
        splits_all: bool = False,
    ) -> None:
        self._handlers: dict[str, Handler] = {
            "FORWARD": self._forward,
            "BACKWARD": self._backward,
            "BACKWARD_INPUT": self._backward_input,
            "BACKWARD_WEIGHT": self._backward_weight,
            "SEND_F": self._send,
            "SEND_B": self._send,
            "RECV_F": self._receive,
            "RECV_B": self._receive,
            **reduce,
            "UPDATE": no_update,
        }
        self.steps = self.wired(row)
        self.losses: Tensor | None = None
        self.weights: Tensor | None = None
        self.before_forward: Callable[[int], None] | None = None
        self._graphs: defaultdict[int, Known] = defaultdict(lambda: Known(splits_all))
        self._wholes: defaultdict[int, Summed] = defaultdict(Summed)
        self._trains = any(one.op.startswith("BACKWARD") for one in row.instructions)
        self._transport = transport
        self._replicas, self._mean, self._divisor = replicas, mean, 1
        self._empty: list[Any] = [None] * row.slots
        self._slots: list[Any] = []
        self._microbatches: Sequence[Any] = ()
        self._seed: Tensor | None = None
        self._scale: Tensor | None = None
        self._weight_of: dict[int, Tensor] = {}

    def wired(self, row: Row) -> list[Step]:
        """The steps of the row, or of the same one at other sizes: what ``steps`` may be set to."""
        return [
            Step(self._handlers[one.op], operand, row.rank, position, one)
            for position, (one, operand) in enumerate(zip(row.instructions, row.operands))
        ]

    def weigh(self, group: Sequence[int], replicas: int) -> None:
        """The next backward begins with the gradient of the mean over the microbatches of ``group`` of all replicas, by
        their weights if they have some."""
        if self.losses is not None:
            weights = [self._weight_of[m] for m in group] if self._weight_of else []
            self._seed = torch.ones_like(self.losses) / (
                sum(weights[1:], weights[0]) if weights else len(group) * replicas
            )

    def begin(self, microbatches: Sequence[Any], scale: Tensor | None = None) -> None:
        """Forget the last step; ``microbatches`` are the next one's, whose gradients are made ``scale`` times as large.

        There may be fewer than the row has: of the rest nothing is computed, and what their messages carry has no meaning.
        """
        self._slots = self._empty.copy()
        self._scale = scale
        self._microbatches = microbatches
        self._divisor = len(microbatches) * self._replicas if self._mean else 1
        self.losses = self.weights = self._seed = None
        self._weight_of = {}

    def end(self) -> None:
        """Keep nothing alive between steps."""
        self._slots, self._microbatches, self._seed, self._weight_of = [], (), None, {}
        self.losses = self.weights = None

    def _take(self, slot: int) -> Any:
        value = self._slots[slot]
        self._slots[slot] = None
        return value

    def _forward(self, op: Forward) -> None:
        leaves: list[Tensor] = []
        arguments: list[Any] = []
        for slot, shape in op.arguments:
            value = self._take(slot)
            if shape is not None:
                leaves.append(value.requires_grad_())
                value = unviewed(value, shape)
            arguments.append(value)
        if op.microbatch >= len(self._microbatches):
            self._pass_over(op, leaves, arguments)
            return
        if self.before_forward is not None:
            self.before_forward(op.microbatch)
        outputs = op.stage(self._microbatches[op.microbatch], *arguments)
        if not isinstance(outputs, tuple) or len(outputs) != len(op.results):
            raise RuntimeFault(_wrong_results(op, outputs))
        edges: list[tuple[GradientEdge | None, tuple[int, ...]]] = []
        loss_edge = None
        for result, output in zip(op.results, outputs):
            if not isinstance(output, Tensor) or output.dtype != result.dtype or output.shape != result.shape:
                check(op, result, output)
            else:
                for slot in result.slots:
                    self._slots[slot] = output.detach()
                if result.gradients:
                    edges.append((get_gradient_edge(output) if output.requires_grad else None, result.gradients))
                if result.loss:
                    loss_edge = self._add_loss(op, output)
                if result.weight:
                    self._weight_of[op.microbatch] = output.detach()
                    self.weights = output.detach() if self.weights is None else self.weights + output.detach()
        self._slots[op.kept] = (leaves, edges, loss_edge)

    def _pass_over(self, op: Forward, leaves: list[Tensor], arguments: list[Any]) -> None:
        """The forward of a microbatch that this step does not have: its readers wait for something all the same."""
        known = (*op.stage.parameters(), *arguments, *tree_leaves(self._microbatches[0]))
        device = next(found.device for found in known if isinstance(found, Tensor))
        for result in op.results:
            for slot in result.slots:
                blank = None if result.dtype is None else torch.zeros(result.shape, dtype=result.dtype, device=device)
                self._slots[slot] = blank
        self._slots[op.kept] = (leaves, [], None)

    def _add_loss(self, op: Forward, loss: Tensor) -> GradientEdge | None:
        if self._trains and not loss.requires_grad:
            raise RuntimeFault(
                f"the loss of stage {op.index} needs no gradient: no parameter that requires one leads to it, or "
                "gradients are switched off; train at least one parameter, and step outside of torch.no_grad()"
            )
        share = loss.detach() / self._divisor
        self.losses = share if self.losses is None else self.losses + share
        if not self._trains:
            return None
        if self._seed is None:
            self._seed = torch.ones_like(share) if self._scale is None else self._scale.to(share)
            self._seed = self._seed / self._divisor
        return get_gradient_edge(loss)

    def _backward(self, op: Backward) -> None:
        leaves, edges, loss_edge = self._take(op.kept)
        roots, gradients = self._roots(edges, loss_edge)
        if roots:
            self._wholes[op.index].backward(roots, gradients, leaves)
        self._hand_back(op, leaves, [leaf.grad for leaf in leaves])

    def _backward_input(self, op: Backward) -> None:
        leaves, edges, loss_edge = self._take(op.kept)
        roots, gradients = self._roots(edges, loss_edge)
        del edges, loss_edge  # nothing but the roots keeps the graph, so that it goes as soon as they do
        received, self._slots[op.kept] = input_half(roots, gradients, leaves, self._graphs[op.index])
        self._hand_back(op, leaves, received)

    def _backward_weight(self, op: Backward) -> None:
        weight_half(self._take(op.kept))

    def _roots(
        self, edges: list[tuple[GradientEdge | None, tuple[int, ...]]], loss_edge: GradientEdge | None
    ) -> tuple[list[GradientEdge], list[Tensor]]:
        """Where the backward starts, and with which gradients."""
        roots: list[GradientEdge] = []
        gradients: list[Tensor] = []
        for edge, slots in edges:
            total = None
            for slot in slots:
                gradient = self._take(slot)
                if gradient is not None:
                    total = gradient if total is None else total + gradient
            if edge is not None and total is not None:
                roots.append(edge)
                gradients.append(total)
        if loss_edge is not None:
            assert self._seed is not None
            roots.append(loss_edge)
            gradients.append(self._seed)
        return roots, gradients

    def _hand_back(self, op: Backward, leaves: list[Tensor], gradients: list[Tensor | None]) -> None:
        """Put the gradients of what was received where they wait to go back."""
        for leaf, gradient, (slot, may_be_none) in zip(leaves, gradients, op.outgoing):
            if slot >= 0:
                self._slots[slot] = gradient if may_be_none or gradient is not None else torch.zeros_like(leaf)

    def _send(self, op: Transmit) -> None:
        self._transport.send(op.message, [self._take(slot) for slot in op.slots])

    def _receive(self, op: Transmit) -> None:
        for slot, value in zip(op.slots, self._transport.receive(op.message)):
            self._slots[slot] = value


def no_update(operand: Any) -> None:
    raise RuntimeFault("this program updates weights inside a step; run it with Versions")


def fault(step: Step, error: Exception) -> RuntimeFault:
    """The error of an instruction, with its rank, place, microbatch and peer."""
    return RuntimeFault(f"rank {step.rank}, {at(step.position, step.instruction)}: {told(error)}")


def told(error: Exception) -> str:
    """What an error says; errors of others are named by their class too."""
    return str(error) if isinstance(error, RuntimeFault) else f"{type(error).__name__}: {error}"


def check(op: Forward, result: Result, output: Any) -> None:
    """RuntimeFault unless ``output`` is the None that was compiled."""
    if output is None and result.dtype is None:
        return
    wanted = "None" if result.dtype is None else _describe(result.dtype, result.shape)
    got = _describe(output.dtype, output.shape) if isinstance(output, Tensor) else repr(output)[:80]
    remedy = "give batches of the compiled shape and dtype, or compile again for this one"
    if isinstance(output, Tensor) and torch.is_autocast_enabled(output.device.type):
        remedy = "autocast is on around the step: put it into the loss function, or around compile() too"
    raise RuntimeFault(f"stage {op.index} made {result.name!r} as {got}, but was compiled for {wanted}; {remedy}")


def _describe(dtype: torch.dtype, shape: Sequence[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')}[{', '.join(map(str, shape))}]"


def _wrong_results(op: Forward, outputs: Any) -> str:
    got = f"{len(outputs)} values" if isinstance(outputs, tuple) else f"a {type(outputs).__name__}"
    names = ", ".join(repr(result.name) for result in op.results)
    return f"stage {op.index} gave {got}, expected a tuple of {len(op.results)} ({names}); compile the model again"
