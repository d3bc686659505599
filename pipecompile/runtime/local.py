"""The local runtime: every rank's program in this process, in one fixed order. What it gives is what all ranks give.

One process gains nothing from microbatches that are under way at once, so it takes one after the other where that leaves
each stage the order of its own work: fewest activations live, and what was written last is read first. Where somebody
watches (a trace, a scale), the ranks take turns as they do in processes of their own.

    rank 0   F0 F1 B0 B1   ╲
    rank 1      F0 B0 F1 B1 ▶   0F0 1F0 1B0 0B0 │ 0F1 1F1 1B1 0B1
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from pipecompile.ir import COMPUTE, Instruction, Program, StagePlan, Value
from pipecompile.ir.versions import updates
from pipecompile.runtime.executor import Executor, Ran, Step, fault
from pipecompile.runtime.gradients import Apart, share, shared_parameters, total
from pipecompile.runtime.messages import by_index, interleave
from pipecompile.runtime.microbatches import split
from pipecompile.runtime.sizes import MOST, StepSizes, StepSizesOf, plans_at
from pipecompile.runtime.transport import Mailboxes, Transport
from pipecompile.runtime.versions import Versions
from pipecompile.runtime.wiring import wire


class LocalRuntime:
    """``step`` trains ``stages`` (by index) on a batch; ``loss`` and ``weight`` name the outputs that make its value.

    ``mail`` carries the messages between ranks, by hand-over unless given. ``inputs`` are the batch's tensors as they
    were compiled: with them, sizes that the model leaves open may change from step to step.
    """

    def __init__(
        self,
        program: Program,
        stages: Mapping[int, nn.Module],
        plans: Iterable[StagePlan] | Mapping[int, StagePlan],
        *,
        loss: str,
        weight: str = "",
        mail: Transport | None = None,
        inputs: Sequence[Value] = (),
    ) -> None:
        found = by_index(plans, program)
        self._microbatches = program.shape.microbatches
        self._weighted = bool(weight)
        self._mail = mail or Mailboxes()
        self._ranks = [
            Executor(
                wire(program, rank, stages, found, loss, weight),
                self._mail,
                SUMMED_ALREADY,
                1,
                not weight,
            )
            for rank in range(program.shape.ranks)
        ]
        self._versions = Versions(program, stages, found) if updates(program.rows) else None
        if self._versions is not None:
            for executor in self._ranks:
                executor.steps = self._versions.steps(executor)
        order = interleave(program, found)
        self._in_turns = not _in_order_of_microbatches(program.rows)
        self._steps = self._both([self._ranks[rank].steps[position] for rank, position in order])
        self._sizes_of = StepSizesOf(inputs)

        def wired(sizes: StepSizes) -> tuple[list[Step], list[Step]]:
            at = plans_at(found, self._sizes_of.names, sizes)
            for rank, executor in enumerate(self._ranks):
                executor.steps = executor.wired(wire(program, rank, stages, found, loss, weight, at))
            rows = [self._versions.steps(one) if self._versions else one.steps for one in self._ranks]
            return self._both([rows[rank][position] for rank, position in order])

        self._wired = lru_cache(MOST)(wired)
        self._sizes: StepSizes = (self._sizes_of.compiled,) * self._microbatches
        shared = shared_parameters(stages, found)
        self._copies = [tensors for tensors in shared.values() if len(tensors) > 1]
        everything = [list(stage.parameters()) for stage in stages.values()]
        self._device = next((p.device for parameters in everything for p in parameters), torch.device("cpu"))
        apart = everything if weight or self._versions is not None else self._copies
        self._apart = Apart(p for several in apart for p in several)

    def before_forward(self, hook: Callable[[int], None]) -> None:
        """Call ``hook(microbatch)`` before each forward of a stage."""
        for executor in self._ranks:
            executor.before_forward = hook

    def step(
        self,
        batch: Any,
        ran: list[Ran] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """The loss of ``batch``, 0-dim and detached; gradients, times ``scale``, are added to the parameters' ``.grad``, or
        used up by ``optimizer`` where the program updates weights.

        The loss is the mean over the microbatches, or sum(loss) / sum(weight) with a weight. RuntimeFault names the
        instruction that failed, BatchError what does not fit in the batch. ``ran`` gets all instructions with the times
        at which they began and ended.
        """
        if ran is None:
            return self.run(split(batch, self._microbatches, uneven=True), optimizer=optimizer, scale=scale)

        @contextmanager
        def around(step: Step) -> Iterator[None]:
            began = time.perf_counter()
            yield
            if self._device.type != "cpu":
                torch.accelerator.synchronize(self._device)
            ran.append((step.instruction, began, time.perf_counter()))

        return self.run(split(batch, self._microbatches, uneven=True), around, optimizer, scale)

    def run(
        self,
        microbatches: Sequence[Any],
        around: Callable[[Step], AbstractContextManager[None]] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """``step`` for a batch in pieces; each instruction runs within ``around`` of it."""
        if self._versions is not None:
            self._versions.begin(optimizer, len(microbatches))
        for executor in self._ranks:
            executor.begin(microbatches, scale)
        if (sizes := self._sizes_of.of_all(microbatches, self._microbatches)) != self._sizes:
            self._steps, self._sizes = self._wired(sizes), sizes
        self._mail.begin()
        self._apart.begin()
        turns, by_microbatch = self._steps
        step = turns[0]
        try:
            for step in by_microbatch if around is None else turns:
                if around is None:
                    step.handler(step.operand)
                else:
                    with around(step):
                        step.handler(step.operand)
        except Exception as error:
            self._apart.abandon()
            raise fault(step, error) from error
        value = self._finish()
        for executor in self._ranks:
            executor.end()
        return value

    def _both(self, turns: list[Step]) -> tuple[list[Step], list[Step]]:
        """The steps as ranks take turns, and one microbatch after the other; sums come last."""
        if self._in_turns:
            return turns, turns
        last = self._microbatches
        return turns, sorted(turns, key=lambda step: m if (m := step.instruction.microbatch) >= 0 else last)

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """``tensor`` as it is: this one process has all ranks."""
        return tensor

    def _finish(self) -> Tensor:
        for copies in self._copies:
            gradient = total(copies)
            if gradient is not None:
                share(copies, gradient)
        (value,) = (executor.losses for executor in self._ranks if executor.losses is not None)
        if not self._weighted:
            self._apart.end()
            return value
        (weight,) = (executor.weights for executor in self._ranks if executor.weights is not None)
        self._apart.end(divisor=weight)
        return value / weight


def _in_order_of_microbatches(rows: Sequence[Sequence[Instruction]]) -> bool:
    """Whether each stage computes its microbatches in their order, with one version of its weights."""
    last: dict[tuple[str, int], int] = {}
    for one in (one for row in rows for one in row):
        if one.op == "UPDATE" or (one.op in COMPUTE and one.microbatch < last.get((one.op, one.stage), -1)):
            return False
        last[one.op, one.stage] = one.microbatch
    return True


def _nothing(op: object) -> None:
    """All ranks hold the same tensors here, so their gradients are summed already."""


SUMMED_ALREADY = {"REDUCE_GRAD": _nothing}
