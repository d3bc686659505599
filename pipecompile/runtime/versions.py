"""Keeps versions of the weights where a program updates them inside a step, and updates them.

A forward and the backward of its microbatch run with stand-ins for the stage's parameters, which have the memory of the
version that both read. An update steps the optimizer on the parameters themselves; if somebody still reads the version
before, they move to new memory first and the stand-ins keep the old.

    parameter     version 0 ─ UPDATE ─▶ version 1 ─ UPDATE ─▶ version 2          what the optimizer and the user see
    stand-ins 0   F0 ········· B0                                               gradient ──▶ group 0 ──▶ version 1
    stand-ins 1                          F2 ·········· B2                       gradient ──▶ group 2 ──▶ version 3
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pipecompile.errors import BatchError, RuntimeFault
from pipecompile.ir import Program
from pipecompile.ir.versions import LAST, group_ends, group_of, members, versions_read
from pipecompile.runtime.executor import Executor, Step
from pipecompile.runtime.messages import Plans
from pipecompile.runtime.split_backward import hooked
from pipecompile.runtime.wiring import Backward, Forward, Update

SumOverRanks = Callable[[Tensor, Tensor | None, tuple[int, ...]], Tensor | None]
"""From a parameter, and this rank's gradient of it: the sum of those of some ranks, None if none has one."""
Whole = Callable[[Tensor, Tensor | None], Tensor | None]
"""The same for the ranks that share the parameter."""
SumOverReplicas = Callable[[Sequence[Tensor]], None]
"""Adds what the replicas of this rank have to the gradients of some parameters."""
Place = tuple[dict[str, Any], str, int]
"""Where a module keeps a parameter: the module's table, the name in it, the parameter's place in its line."""


class Line:
    """Parameters that are updated together: a stage's own, or the copies of a shared one, which get one gradient.

    ``reads`` counts the readers of each version.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], reads: Counter[int], shared: bool) -> None:
        self.parameters = list(parameters)
        self._shared = shared
        self.newest = 0
        self._reads = reads
        self._left: Counter[int] = Counter()
        self._kept: dict[int, list[nn.Parameter]] = {}
        self._gradients: dict[int, list[Tensor | None]] = {}

    def begin(self) -> None:
        """Version 0 is what the parameters are now."""
        self.newest = 0
        self._left = self._reads.copy()
        self._kept, self._gradients = {}, {}

    def version(self, version: int) -> list[nn.Parameter]:
        """The stand-ins for a version; it is the newest, or one that is kept."""
        if version not in self._kept:
            assert version == self.newest, "verify has proved that a version that is read was kept"
            self._kept[version] = [nn.Parameter(p.data) for p in self.parameters]
        return self._kept[version]

    def open(self, version: int, group: int) -> None:
        """The stand-ins' gradients go on where the group's are."""
        for stand_in, gradient in zip(self.version(version), self._gradients.get(group, [None] * len(self.parameters))):
            stand_in.grad = gradient

    def close(self, version: int, group: int, last: bool) -> None:
        """Take the stand-ins' gradients; ``last``: this microbatch reads the version no more."""
        stand_ins = self.version(version)
        self._gradients[group] = [stand_in.grad for stand_in in stand_ins]
        for stand_in in stand_ins:
            stand_in.grad = None
        if last:
            self._left[version] -= 1
            if not self._left[version]:
                del self._kept[version]

    def update(
        self,
        optimizer: torch.optim.Optimizer,
        add: Whole | None,
        over_replicas: SumOverReplicas | None,
    ) -> None:
        """The next version, by the gradients of the next group; ``add`` adds those of other ranks, and of their replicas,
        ``over_replicas`` those of this rank's."""
        gradients = self._gradients.pop(self.newest, [None] * len(self.parameters))
        if self._shared:
            gradients = self._whole(gradients, add)
        if self._left[self.newest]:
            self.version(self.newest)  # it keeps the memory that the parameters leave
            for p in self.parameters:
                p.data = p.data.clone()
        for p, gradient in zip(self.parameters, gradients):
            p.grad = gradient
        if add is None and over_replicas is not None:
            over_replicas(self.parameters)
        for p in self.parameters:
            if (gradient := p.grad) is not None and hooked([p]):
                p.grad = None
                torch.autograd.backward([p], [gradient])  # of a leaf: its hooks see the gradient
        optimizer.step()
        for p in self.parameters:
            p.grad = None
        self.newest += 1

    def _whole(self, parts: Sequence[Tensor | None], add: Whole | None) -> list[Tensor | None]:
        """A shared parameter's gradient for each of its copies."""
        there = [part for part in parts if part is not None]
        whole = sum(there[1:], there[0]) if there else None
        if add is not None:
            whole = add(self.parameters[0], whole)
        return [whole if index == 0 or whole is None else whole.clone() for index in range(len(parts))]


class Versions:
    """The lines of the stages that run in this process, and the handlers that use them."""

    def __init__(
        self,
        program: Program,
        stages: Mapping[int, nn.Module],
        plans: Plans,
        sum_over_ranks: SumOverRanks | None = None,
        sum_over_replicas: SumOverReplicas | None = None,
        replicas: int = 1,
    ) -> None:
        self._optimizer: torch.optim.Optimizer | None = None
        self._sum, self._over_replicas, self._replicas = sum_over_ranks, sum_over_replicas, replicas
        self._ends = group_ends(program.rows)
        self._microbatches = program.shape.microbatches
        self._read = versions_read(program.rows)
        names = {name for plan in plans.values() for name in plan.shared}
        self._first = {name: min(plan.index for plan in plans.values() if name in plan.shared) for name in names}
        self._lines: dict[int | str, Line] = {}
        self._places: dict[int, list[tuple[int | str, list[Place]]]] = {}
        parameters, holders = self._sets(stages, plans)
        for key, found in parameters.items():
            reads = Counter(self._version(key, m) for m in range(program.shape.microbatches) for _ in holders[key])
            self._lines[key] = Line(found, reads, isinstance(key, str))
            for stage in holders[key]:
                self._places.setdefault(stage, []).append((key, list(_places(stages[stage], found))))

    def _sets(
        self, stages: Mapping[int, nn.Module], plans: Plans
    ) -> tuple[dict[int | str, list[nn.Parameter]], dict[int | str, list[int]]]:
        """By stage or shared parameter: the trainable parameters, and the stages here that read them."""
        parameters: dict[int | str, list[nn.Parameter]] = {}
        holders: dict[int | str, list[int]] = {}
        for index, stage in stages.items():
            shared = {id(stage.get_parameter(fqn)): name for name, fqn in plans[index].shared.items()}
            for p in stage.parameters():
                if not p.requires_grad:
                    continue
                key: int | str = shared.get(id(p), index)
                if all(p is not known for known in parameters.setdefault(key, [])):
                    parameters[key].append(p)
                if index not in holders.setdefault(key, []):
                    holders[key].append(index)
        return parameters, holders

    def _version(self, key: int | str, microbatch: int) -> int:
        stage = self._first[key] if isinstance(key, str) else key
        return self._read[stage, microbatch]

    def begin(self, optimizer: torch.optim.Optimizer | None, microbatches: int) -> None:
        """A step of so many microbatches begins, whose updates ``optimizer`` makes."""
        if optimizer is None:
            raise RuntimeFault("this program updates weights inside a step; give step(batch, optimizer)")
        if microbatches < (wanted := self._microbatches):
            raise BatchError(
                f"the batch has {microbatches} rows, fewer than the {wanted} microbatches by which this program updates "
                "weights; leave such a batch out (drop_last=True of a DataLoader), or use a schedule that flushes"
            )
        self._optimizer = optimizer
        for line in self._lines.values():
            line.begin()
            for p in line.parameters if len(self._ends) < self._microbatches else ():
                if hooked([p]):
                    raise RuntimeFault(
                        f"a parameter of shape {tuple(p.shape)} has a hook, which would see the mean of several "
                        "microbatches' gradients, not each of them; take the hook off, or compile with pipedream, which "
                        "updates after each, or with a schedule that flushes"
                    )

    def steps(self, executor: Executor) -> list[Step]:
        """The executor's steps with handlers that run under the versions that the program names."""
        return [self._under_version(step, executor) for step in executor.steps]

    def _under_version(self, step: Step, executor: Executor) -> Step:
        one, inner = step.instruction, step.handler
        if one.op == "UPDATE":
            return replace(step, handler=self._update)
        if one.op == "FORWARD":

            def forward(op: Forward) -> None:
                with self._reading(op.index, op.microbatch):
                    inner(op)

            return replace(step, handler=forward)
        if one.op.startswith("BACKWARD"):
            group = group_of(self._ends, one.microbatch)
            together, last = members(self._ends, group), one.op in LAST

            def backward(op: Backward) -> None:
                executor.weigh(together, self._replicas)
                with self._reading(op.index, op.microbatch), self._collecting(op.index, op.microbatch, group, last):
                    inner(op)

            return replace(step, handler=backward)
        return step

    @contextmanager
    def _reading(self, stage: int, microbatch: int) -> Iterator[None]:
        """The stage's modules have the stand-ins of the microbatch's versions."""
        found = self._places.get(stage, [])
        try:
            for key, places in found:
                stand_ins = self._lines[key].version(self._version(key, microbatch))
                for table, name, index in places:
                    table[name] = stand_ins[index]
            yield
        finally:
            for key, places in found:
                for table, name, index in places:
                    table[name] = self._lines[key].parameters[index]

    @contextmanager
    def _collecting(self, stage: int, microbatch: int, group: int, last: bool) -> Iterator[None]:
        """The gradients that a backward makes are added to the group's."""
        lines = [(self._lines[key], self._version(key, microbatch)) for key, _ in self._places.get(stage, [])]
        for line, version in lines:
            line.open(version, group)
        yield
        for line, version in lines:
            line.close(version, group, last)

    def _update(self, op: Update) -> None:
        assert self._optimizer is not None
        for key in op.values or (op.stage,):
            line = self._lines.get(key)
            if line is None or line.newest >= op.version:
                continue  # nothing is trained, or another rank of this process was first
            add = None
            if self._sum is not None and len(op.ranks) > 1:
                add = _bound(self._sum, op.ranks)
            line.update(self._optimizer, add, self._over_replicas)


def _bound(sum_over_ranks: SumOverRanks, ranks: tuple[int, ...]) -> Whole:
    return lambda parameter, mine: sum_over_ranks(parameter, mine, ranks)


def _places(stage: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[Place]:
    index_of = {id(p): index for index, p in enumerate(parameters)}
    for module in stage.modules():
        for name, p in module._parameters.items():
            if p is not None and id(p) in index_of:
                yield module._parameters, name, index_of[id(p)]
