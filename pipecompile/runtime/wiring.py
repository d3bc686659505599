"""Resolves a rank's row into steps: which slot each value lies in, what is detached, who gets which gradient.

Every value that waits on a rank has a slot, a place in one list, known before the first step runs:

    0F0 puts  hidden ──▶ slot 4 ──▶ 0SEND_F0>1          (another rank reads it)
              hidden ──▶ slot 5 ──▶ 2F0                  (a stage of this rank reads it: no message)
    2B0 puts  gradient of hidden ──▶ slot 9 ──▶ 0B0
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from pipecompile.errors import ProgramError
from pipecompile.ir import RECEIVES, SENDS, Instruction, Port, Program, StagePlan
from pipecompile.runtime.messages import Message, Plans, message_of

Key = tuple[str, int, int, int, str]
"""What waits in a slot: (kind, stage that made it, stage that takes it, microbatch, name)."""


@dataclass(frozen=True, slots=True)
class Result:
    """An output of a stage: what it must look like, where it waits for its readers, where its gradients arrive.

    ``gradients`` are the slots of its readers' gradients, the last reader first: that is the order in which autograd
    sums them in the unsplit model.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    slots: tuple[int, ...]
    gradients: tuple[int, ...]
    loss: bool = False
    weight: bool = False


@dataclass(frozen=True, slots=True)
class Forward:
    """Run ``stage``: ``arguments`` are (slot, shape if a gradient flows back); ``kept`` is what the backward needs."""

    stage: nn.Module
    index: int
    microbatch: int
    arguments: tuple[tuple[int, list[int] | None], ...]
    results: tuple[Result, ...]
    kept: int


@dataclass(frozen=True, slots=True)
class Backward:
    """``outgoing`` has, for each argument with a gradient, its slot (-1: nobody wants it) and whether None may stay."""

    index: int
    microbatch: int
    kept: int
    outgoing: tuple[tuple[int, bool], ...]


@dataclass(frozen=True, slots=True)
class Transmit:
    """Send what waits in ``slots``, or receive into them."""

    message: Message
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Reduce:
    """Sum the gradients of the parameters (canonical FQNs) over the ranks of ``ranks``."""

    values: tuple[str, ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Update:
    """Make ``version`` of the stage's own weights, or of the shared parameters in ``values``, which ``ranks`` hold."""

    stage: int
    version: int
    values: tuple[str, ...]
    ranks: tuple[int, ...]


Operand = Forward | Backward | Transmit | Reduce | Update | int
"""The last is the stage of a sum over replicas."""


@dataclass(frozen=True, slots=True)
class Row:
    """A rank's instructions with their operands, and how many slots they need."""

    rank: int
    instructions: tuple[Instruction, ...]
    operands: tuple[Operand, ...]
    slots: int


def wire(
    program: Program,
    rank: int,
    stages: Mapping[int, nn.Module],
    plans: Plans,
    loss: str,
    weight: str = "",
    at: Sequence[Plans] = (),
) -> Row:
    """The steps of ``rank``; ProgramError if one would read what is not there yet.

    ``at`` are the plans at each microbatch's sizes, if these are others than the compiled ones.
    """
    for wanted in program.shape.stages_of(rank):
        if wanted not in stages:
            raise ProgramError(f"rank {rank} runs stage {wanted}, but was given stages {sorted(stages)}; give it all")
    for name in filter(None, (loss, weight)):
        makers = [plan.index for plan in plans.values() if any(port.name == name for port in plan.outputs)]
        if len(makers) != 1:
            raise ProgramError(f"stages {makers} give {name!r}; one stage must, and its plan must list it as an output")
    wiring = _Wiring(program, rank, stages, plans, loss, weight, at)
    row = program.rows[rank]
    return Row(rank, row, tuple(wiring.operand(one) for one in row), len(wiring.slots))


def _gradient_returns(port: Port) -> bool:
    """Whether readers give a gradient back: an empty tensor has none worth a message."""
    return port.spec.gradient and port.spec.bytes > 0


class _Wiring:
    """Gives slots out while it walks the row, and knows which are filled at each point."""

    def __init__(
        self,
        program: Program,
        rank: int,
        stages: Mapping[int, nn.Module],
        plans: Plans,
        loss: str,
        weight: str,
        at: Sequence[Plans],
    ) -> None:
        self.placement = program.shape.placement
        self.rank, self.stages, self.loss, self.weight = rank, stages, loss, weight
        self.plans = at or [plans] * program.shape.microbatches
        self.slots: dict[Key, int] = {}
        self.filled: set[Key] = set()
        self.sent = {
            self._key(one.op[-1], one.stage, one.peer, one.microbatch, value)
            for one in program.rows[rank]
            if one.op in SENDS
            for value in one.values
        }

    def operand(self, one: Instruction) -> Operand:
        if one.op == "FORWARD":
            return self._forward(one)
        if one.op in ("BACKWARD", "BACKWARD_INPUT", "BACKWARD_WEIGHT"):
            return self._backward(one)
        if one.op in (*SENDS, *RECEIVES):
            return self._transmit(one)
        if one.op == "REDUCE_REPLICAS":
            return one.stage
        ranks = tuple(sorted({self.rank, *(self.placement[peer] for peer in one.peers)}))
        if one.op == "UPDATE":
            return Update(one.stage, one.version, one.values, ranks)
        return Reduce(one.values, ranks)

    def _key(self, kind: str, source: int, target: int, microbatch: int, name: str = "") -> Key:
        return kind, source, target, microbatch, name

    def _put(self, key: Key) -> int:
        self.filled.add(key)
        return self.slots.setdefault(key, len(self.slots))

    def _take(self, key: Key, one: Instruction) -> int:
        if key not in self.filled:
            kind, source, target, microbatch, name = key
            what = {"F": f"value {name!r}", "B": f"gradient of {name!r}"}.get(kind, "forward")
            raise ProgramError(
                f"{one} (rank {self.rank}) needs the {what} of stage {source} for stage {target}, microbatch "
                f"{microbatch}, which is not there yet; it must be made or received before"
            )
        self.filled.discard(key)
        return self.slots[key]

    def _local(self, stage: int) -> bool:
        return self.placement[stage] == self.rank

    def _forward(self, one: Instruction) -> Forward:
        s, m = one.stage, one.microbatch
        plan = self.plans[m][s]
        arguments = tuple(
            (
                self._take(self._key("F", port.source, s, m, port.name), one),
                list(map(int, port.spec.shape)) if port.spec.gradient else None,
            )
            for port in plan.inputs
        )
        results = tuple(self._result(port, s, m) for port in plan.outputs)
        return Forward(self.stages[s], s, m, arguments, results, self._put(self._key("kept", s, s, m)))

    def _result(self, port: Port, stage: int, microbatch: int) -> Result:
        readers = [self._key("F", stage, target, microbatch, port.name) for target in port.targets]
        slots = tuple(self._put(key) for key in readers if self._local(key[2]) or key in self.sent)
        gradients = tuple(
            self.slots.setdefault(key, len(self.slots))
            for target in sorted(port.targets, reverse=True)
            if _gradient_returns(port)
            for key in [self._key("B", target, stage, microbatch, port.name)]
        )
        dtype = None if port.spec.dtype == "none" else getattr(torch, port.spec.dtype)
        is_loss, is_weight = port.name == self.loss, bool(self.weight) and port.name == self.weight
        return Result(port.name, tuple(map(int, port.spec.shape)), dtype, slots, gradients, is_loss, is_weight)

    def _backward(self, one: Instruction) -> Backward:
        s, m = one.stage, one.microbatch
        if one.op == "BACKWARD_WEIGHT":
            return Backward(s, m, self._take(self._key("weights", s, s, m), one), ())
        kept = self._take(self._key("kept", s, s, m), one)
        plan = self.plans[m][s]
        for port in plan.outputs:
            for target in port.targets if _gradient_returns(port) else ():
                self._take(self._key("B", target, s, m, port.name), one)
        outgoing = tuple(self._outgoing(port, plan, m) for port in plan.inputs if port.spec.gradient)
        if one.op == "BACKWARD_INPUT":
            self._put(self._key("weights", s, s, m))
            self.slots[self._key("weights", s, s, m)] = kept
        return Backward(s, m, kept, outgoing)

    def _outgoing(self, port: Port, plan: StagePlan, microbatch: int) -> tuple[int, bool]:
        key = self._key("B", plan.index, port.source, microbatch, port.name)
        if self._local(port.source):
            return self._put(key), True
        return (self._put(key), False) if key in self.sent else (-1, True)

    def _transmit(self, one: Instruction) -> Transmit:
        message = message_of(one, self.plans[one.microbatch], self.placement)
        keys = [self._key(one.op[-1], message.source, message.target, message.microbatch, v) for v in message.values]
        if one.op in SENDS:
            return Transmit(message, tuple(self._take(key, one) for key in keys))
        return Transmit(message, tuple(self._put(key) for key in keys))
