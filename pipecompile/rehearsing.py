"""What stages would take, without running them: they are rehearsed on tensors that have shapes and no contents.

The runtime itself runs two microbatches through each stage on the meta device, forward and backward, with the kernels of
the machine that is planned for (``cost/kernels.py``), and every storage is counted from when it is made until its last
reference goes, as in ``weighing``: autograd decides what is kept. A stage stands alone, what it would receive is made up
from the specs. Stages that are equal (``stage_key``) are rehearsed once, so many equal layers take a few seconds whatever
their size. Autocast does not know the meta device, so models with it, and those that make tensors on the CPU by name, are
rehearsed on torch's fake tensors, which take four times as long and know the CPU's kernels only.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pipecompile.capture import untouched
from pipecompile.compare import gradients_aside
from pipecompile.cost.kernels import BLOCK, PRODUCTS, Kernels, workspace_bytes
from pipecompile.cost.meter import TensorMeter
from pipecompile.cost.stopwatch import Stopwatch
from pipecompile.ir import RECEIVES, Graph, StagePlan, Use
from pipecompile.machine import Machine
from pipecompile.passes.assemble import StageBody
from pipecompile.passes.opening import Split
from pipecompile.runtime import make_stage
from pipecompile.runtime.executor import Executor
from pipecompile.runtime.links import empty
from pipecompile.runtime.local import SUMMED_ALREADY
from pipecompile.runtime.messages import Message, by_index
from pipecompile.runtime.microbatches import rebuild
from pipecompile.runtime.wiring import wire
from pipecompile.stage_key import absolute, relative, stage_keys
from pipecompile.weighing import MICROBATCHES, Scale, add_use, programs, standing, with_uses


@dataclass(frozen=True, slots=True)
class Stand:
    """Where a rehearsal's tensors are: on the meta device, or fake ones on the CPU. It is entered before any is made."""

    device: torch.device
    mode: AbstractContextManager[Any]
    kernels: str

    @staticmethod
    def of(kernels: str, fake: bool) -> Stand:
        if fake:
            return Stand(torch.device("cpu"), _fake(), "cpu")
        return Stand(torch.device("meta"), nullcontext(), kernels)

    def move(self, leaf: Any) -> Any:
        """A tensor like ``leaf`` without contents; anything else as it is."""
        if not isinstance(leaf, Tensor):
            return leaf
        moved = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=self.device)
        return nn.Parameter(moved, leaf.requires_grad) if isinstance(leaf, nn.Parameter) else moved

    def meter(self) -> TensorMeter:
        return TensorMeter(BLOCK[self.kernels], workspace_bytes if self.kernels == "cuda" else None)

    def begin(self, message: Any = None) -> None:
        """A transport for one rank alone: what it sends goes nowhere, what it receives is made when it is asked for."""

    def send(self, message: Message, values: Sequence[Tensor | None]) -> None:
        pass

    def receive(self, message: Message) -> list[Tensor | None]:
        return [None if spec.dtype == "none" else empty(spec, self.device) for spec in message.specs]


@contextmanager
def _fake() -> Iterator[None]:
    """Fake tensors, whose failures are told by their errors and not logged too."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        with FakeTensorMode():
            yield
    finally:
        log.disabled = before


@dataclass
class Rehearsal:
    """Rehearses the stages of ``model`` on ``microbatch`` for a machine; what is known of equal ones is kept."""

    model: nn.Module
    microbatch: Any
    machine: Machine
    known: dict[str, tuple[Use, ...]] = field(default_factory=dict)

    def __call__(self, parts: Split, bodies: tuple[StageBody, ...], sources: Sequence[str]) -> Split:
        """The split with what each stage takes; with a note instead where one cannot be run without contents."""
        kernels = self.machine.device if self.machine.device in BLOCK else "cuda"
        keys = stage_keys(parts.graph, bodies, self.model, kernels)
        fresh = {key: s for s, key in reversed(list(enumerate(keys))) if key not in self.known}
        attempts = (True,) if _has_autocast(parts.graph) else (False, True)
        for fake in attempts if fresh else ():
            try:
                self._run(parts, [body.plan for body in bodies], sources, fresh, Stand.of(kernels, fake))
                break
            except Exception as error:  # what needs contents or has no kernel raises errors of any kind
                failed = error
        else:
            if fresh:
                return _with_note(parts, failed)
        uses = [[absolute(use, s) for use in self.known[key]] for s, key in enumerate(keys)]
        return replace(parts, partition=with_uses(parts.partition, uses))

    def _run(
        self, parts: Split, plans: list[StagePlan], sources: Sequence[str], fresh: dict[str, int], stand: Stand
    ) -> None:
        kernels = stand.kernels
        with gradients_aside(self.model), untouched(self.model), stand.mode, Kernels(kernels):
            model, batch = _hollow(self.model, stand), rebuild(self.microbatch, stand.move)
            for key, s in fresh.items():
                stage = make_stage(sources[s], model, plans[s])
                uses = standing(stage, batch, kernels == "cuda", BLOCK[kernels])
                uses += [Use("LIBRARIES", PRODUCTS)] if kernels == "cuda" else []
                for use in _rehearse(parts, plans, stage, s, batch, stand):
                    add_use(uses, use)
                self.known[key] = tuple(relative(use, s) for use in uses)


def _rehearse(
    parts: Split, plans: list[StagePlan], stage: nn.Module, index: int, batch: Any, stand: Stand
) -> list[Use]:
    found = []
    for split, program in enumerate(programs(parts.partition)):
        row = wire(program, index, {index: stage}, by_index(plans, program), parts.graph.loss, parts.graph.weight)
        executor = Executor(row, stand, SUMMED_ALREADY, MICROBATCHES, not parts.graph.weight)
        meter = stand.meter()
        scale = Scale({index: stage}, Stopwatch(), bool(split), copies=False, meter=meter)
        with meter:
            executor.begin([batch] * MICROBATCHES)
            for step in executor.steps:
                with scale.around(step):
                    step.handler(step.operand)
        found += [use for _, use in scale.uses() if use.op not in RECEIVES]
    return found


def _hollow(model: nn.Module, stand: Stand) -> nn.Module:
    """The model on a stand: itself if it is there, else a copy of everything but the contents of tensors."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    if stand.device.type == "meta" and all(t.is_meta for t in tensors.values()):
        return model
    tensors |= {id(x): x for module in model.modules() for x in vars(module).values() if isinstance(x, Tensor)}
    return copy.deepcopy(model, {key: stand.move(t) for key, t in tensors.items()})


def _has_autocast(graph: Graph) -> bool:
    parts = [part for node in graph.nodes for part in (node, *node.inside)]
    return any(region.startswith("torch.autocast") for part in parts for region in part.context)


def _with_note(parts: Split, error: Exception) -> Split:
    said = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    note = f"peak memory is only a sum over the parts of the stages, which cannot be run without values: {said}"
    return replace(parts, graph=replace(parts.graph, notes=(*parts.graph.notes, note)))
