"""Weighs stages: the runtime itself runs two microbatches through them, and what each instruction takes is noted.

A stage costs more time and memory than the sum of its parts says: autograd is entered once for each, gradients are made
by the first microbatch and added to by later ones, values live as long as a stage's locals and its saved tensors do. So
every kind of instruction is run as the program will run it, once to count bytes and a few times for the clock.

    rank 0   F0 SEND F1 SEND      RECV B0 (gradients are made)   RECV B1 (added to)
    rank 1            RECV F0 B0 SEND  RECV F1 B1 SEND            each message a copy, as between processes
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pipecompile.capture import untouched
from pipecompile.compare import gradients_aside
from pipecompile.cost.meter import Meter, meter_of
from pipecompile.cost.stopwatch import Stopwatch
from pipecompile.ir import AFTER_HALF, COMPUTE, SENDS, Instruction, Partition, Program, Shape, StagePlan, Use, Value
from pipecompile.masters import main_gradients
from pipecompile.passes.communicate import communicate
from pipecompile.passes.schedules import make_timetable
from pipecompile.runtime import LocalRuntime, Mailboxes, device_of, gradient, make_stage, set_gradient
from pipecompile.runtime.main_gradients import gradient_dtype

MICROBATCHES = 2
FEWEST, BUDGET_S = 3, 0.2
"""Timed runs: at least 3, then until 0.2 s have passed."""
AHEAD_BYTES = 1 << 20
"""Small receives that are posted ahead on a channel between accelerators."""
Kind = tuple[int, str, bool, int]
"""What instructions are told apart by: stage, op, whether it is of the stage's first microbatch, peer of a send."""


class Copies(Mailboxes):
    """Every message is a copy, as it is between processes."""

    def send(self, message: Any, values: Sequence[Tensor | None]) -> None:
        super().send(message, [None if value is None else value.clone() for value in values])


@dataclass
class Scale:
    """The stages' own gradients, and what was noted of each kind of instruction: ``times`` are where it began and ended.

    ``copies``: a send copies what it carries.
    """

    stages: Mapping[int, nn.Module]
    watch: Stopwatch
    split: bool
    copies: bool = True
    meter: Meter | None = None
    times: dict[Kind, list[tuple[Any, Any]]] = field(default_factory=dict)
    bytes: dict[Kind, tuple[int, int]] = field(default_factory=dict)
    gradients: dict[tuple[int, int], Tensor | None] = field(default_factory=dict)

    def name(self, one: Instruction) -> str:
        return AFTER_HALF if self.split and one.op == "SEND_B" else one.op

    @contextmanager
    def around(self, step: Any) -> Iterator[None]:
        one: Instruction = step.instruction
        kind = (one.stage, self.name(one), one.microbatch == 0, one.peer if one.op in SENDS else -1)
        mine = list(self.stages[one.stage].parameters()) if one.op in COMPUTE else []
        for p in mine:  # a tied parameter is another tensor on another rank, with a gradient of its own
            set_gradient(p, self.gradients.pop((one.stage, id(p)), None))
        before = self.meter.live if self.meter else 0
        if self.meter:
            self.meter.begin()
        begin = self.watch.mark()
        yield
        self.times.setdefault(kind, []).append((begin, self.watch.mark()))
        if self.meter:
            copied = sum(spec.bytes for spec in step.operand.message.specs) if one.op in SENDS and self.copies else 0
            self.bytes[kind] = (self.meter.live - before - copied, self.meter.peak - before - copied)
        for p in mine:
            self.gradients[one.stage, id(p)] = gradient(p)
            set_gradient(p, None)

    def median_ms(self, kind: Kind) -> float:
        return statistics.median(self.watch.between(begin, end) for begin, end in self.times[kind])

    def uses(self) -> Iterator[tuple[Kind, Use]]:
        """The bytes of each kind of instruction, without times."""
        for kind, (after, peak) in self.bytes.items():
            _, op, first, peer = kind
            yield kind, Use(op, after, peak, None, first, peer)


def weigh(
    model: nn.Module,
    microbatch: Any,
    partition: Partition,
    plans: Sequence[StagePlan],
    sources: Sequence[str],
    inputs: Sequence[Value],
    loss: str,
    weight: str,
    budget_s: float = BUDGET_S,
    masters: str = "",
) -> Partition:
    """The partition with the ``uses`` of each stage, as seen on ``microbatch``; the model is left as it was.

    The clock runs for ``budget_s`` seconds, and three times at least. ``masters`` is their dtype (empty: none).
    """
    stages = {plan.index: make_stage(source, model, plan) for plan, source in zip(plans, sources)}
    device = device_of(model, microbatch)
    with gradients_aside(model), untouched(model), main_gradients(model.parameters(), masters):
        uses = [standing(stages[s], inputs, device.type == "cuda") for s in range(partition.stages)]
        for split, program in enumerate(programs(partition)):
            runtime = LocalRuntime(program, stages, plans, loss=loss, weight=weight, mail=Copies())
            scale, microbatches = Scale(stages, Stopwatch.of(device), bool(split)), [microbatch] * MICROBATCHES
            if device.type == "cuda" and not split:
                kept = Use("LIBRARIES", _kept_by_libraries(runtime, scale, microbatches, device))
                for found in uses:
                    found.append(kept)
            for s, use in _observe(runtime, scale, microbatches, budget_s, meter_of(device)):
                add_use(uses[s], use)
    return with_uses(partition, uses)


def add_use(uses: list[Use], use: Use) -> None:
    """Add what an instruction takes, unless one like it was seen before."""
    if not any((use.op, use.first, use.peer) == (other.op, other.first, other.peer) for other in uses):
        uses.append(use)


def with_uses(partition: Partition, uses: Sequence[Sequence[Use]]) -> Partition:
    """The partition with what each stage's instructions take."""
    costs = tuple(replace(cost, uses=tuple(found)) for cost, found in zip(partition.costs, uses, strict=True))
    return replace(partition, costs=costs)


def programs(partition: Partition) -> Iterator[Program]:
    """Two microbatches, each stage on a rank of its own, with whole backwards and with split ones."""
    count = partition.stages
    timetable = make_timetable("1f1b", Shape(count, count, MICROBATCHES))
    yield communicate(timetable, partition)
    halves = ("BACKWARD_INPUT", "BACKWARD_WEIGHT")
    rows = tuple(
        tuple(
            part
            for one in row
            for part in ([replace(one, op=half) for half in halves] if one.op == "BACKWARD" else [one])
        )
        for row in timetable.rows
    )
    yield communicate(replace(timetable, rows=rows), partition)


def _kept_by_libraries(runtime: LocalRuntime, scale: Scale, microbatches: list[Any], device: torch.device) -> int:
    """Bytes that stay allocated after a first run: the workspaces that cuBLAS keeps for each thread and stream."""
    torch._C._cuda_clearCublasWorkspaces()  # torch's note on CUDA semantics names this call
    before = torch.cuda.memory_allocated(device)
    runtime.run(microbatches, scale.around)
    scale.gradients.clear()
    scale.times.clear()
    return max(0, torch.cuda.memory_allocated(device) - before)


def _observe(
    runtime: LocalRuntime, clock: Scale, microbatches: list[Any], budget_s: float, meter: Meter
) -> Iterator[tuple[int, Use]]:
    counted = replace(clock, meter=meter, times={}, bytes={}, gradients={})
    with meter:
        runtime.run(microbatches, counted.around)
    begin, runs = time.perf_counter(), 0
    while runs < FEWEST or time.perf_counter() - begin < budget_s:
        clock.gradients.clear()
        runtime.run(microbatches, clock.around)
        runs += 1
    for kind, use in counted.uses():
        yield kind[0], replace(use, ms=clock.median_ms(kind))


def standing(stage: nn.Module, inputs: Iterable[Value], cuda: bool, block: int = 1) -> list[Use]:
    """What a stage always holds, what an optimizer takes while it steps, and a microbatch.

    Each tensor takes a multiple of ``block`` bytes.
    """

    def whole(size: int) -> int:
        return -(-size // block) * block

    held = {id(t): whole(t.nbytes) for t in (*stage.parameters(), *stage.buffers())}
    trained = [whole(p.numel() * gradient_dtype(p).itemsize) for p in stage.parameters() if p.requires_grad]
    step = sum(trained) if cuda else 2 * max(trained, default=0)
    always = Use("HOLD", sum(held.values()), step)
    batch = Use("BATCH", sum(value.spec.bytes for value in inputs))
    return [always, batch, *([Use("AHEAD", AHEAD_BYTES)] if cuda else [])]
