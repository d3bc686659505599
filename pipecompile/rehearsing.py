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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pipecompile.capture import untouched
from pipecompile.compare import gradients_aside
from pipecompile.cost.kernels import BLOCK, PRODUCTS, Kernels, workspace_bytes
from pipecompile.cost.meter import TensorMeter
from pipecompile.cost.stopwatch import Stopwatch
from pipecompile.errors import briefly
from pipecompile.ir import RECEIVES, Graph, Partition, Path, StagePlan, Use, Value
from pipecompile.machine import Machine
from pipecompile.masters import main_gradients
from pipecompile.passes.assemble import StageBody
from pipecompile.passes.opening import Split
from pipecompile.plan import Plan
from pipecompile.runtime import make_stage
from pipecompile.runtime.executor import Executor
from pipecompile.runtime.links import empty
from pipecompile.runtime.local import SUMMED_ALREADY
from pipecompile.runtime.messages import Message, by_index
from pipecompile.runtime.wiring import wire
from pipecompile.stage_key import absolute, relative, stage_keys
from pipecompile.weighing import MICROBATCHES, Scale, add_use, programs, standing, with_uses

FAKE = "fake"
"""Kernels of the CPU on torch's fake tensors, beside those of the CPU and of CUDA on the meta device."""

WHOLE = frozenset({"gpipe", "1f1b", "eager-1f1b", "interleaved-1f1b", "looped-bfs"})
"""Schedules that split no backward, so that the halves of one need no rehearsal."""

Uses = tuple[Use, ...]


@dataclass(frozen=True, slots=True)
class Stand:
    """Where a rehearsal's tensors are: on the meta device, or fake ones on the CPU. It is entered before any is made."""

    device: torch.device
    mode: AbstractContextManager[Any]
    kernels: str

    @staticmethod
    def of(kernels: str) -> Stand:
        if kernels == FAKE:
            return Stand(torch.device("cpu"), _fake(), "cpu")
        return Stand(torch.device("meta"), nullcontext(), kernels)

    def hollow(self, stage: nn.Module) -> nn.Module:
        """The stage on this stand: itself if it is there, else a copy of everything but the contents of tensors."""
        tensors = {id(t): t for t in (*stage.parameters(), *stage.buffers())}
        if self.device.type == "meta" and all(t.is_meta for t in tensors.values()):
            return stage
        tensors |= {id(x): x for module in stage.modules() for x in vars(module).values() if isinstance(x, Tensor)}
        return copy.deepcopy(stage, {key: self._move(t) for key, t in tensors.items()})

    def _move(self, tensor: Tensor) -> Tensor:
        moved = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self.device)
        return nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved

    def batch(self, inputs: Iterable[Value]) -> Any:
        """A microbatch, which may be a tensor alone."""
        whole = Structure()
        for value in inputs:
            whole.put((("item", ""), *value.path), empty(value.spec, self.device))
        return whole.get("")

    def meter(self) -> TensorMeter:
        return TensorMeter(BLOCK[self.kernels], workspace_bytes if self.kernels == "cuda" else None)

    def begin(self, message: Any = None) -> None:
        """A transport for one rank alone: what it sends goes nowhere, what it receives is made when it is asked for."""

    def send(self, message: Message, values: Sequence[Tensor | None]) -> None:
        pass

    def receive(self, message: Message) -> list[Tensor | None]:
        return [None if spec.dtype == "none" else empty(spec, self.device) for spec in message.specs]


class Structure(dict[str | int, Any]):
    """A structure of tensors that answers to items and attributes alike."""

    __getattr__ = dict.__getitem__

    def put(self, path: Path, leaf: Any) -> None:
        *way, (_, last) = path
        here = self
        for _, step in way:
            here = here.setdefault(step, Structure())
        here[last] = leaf


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


@dataclass(frozen=True, slots=True)
class Play:
    """Stages that are rehearsed: how they are wired, the tensors of a microbatch, the dtype of masters (empty: none).

    ``halves``: split backwards are rehearsed too.
    """

    partition: Partition
    plans: tuple[StagePlan, ...]
    inputs: tuple[Value, ...]
    loss: str
    weight: str
    gradient_dtype: str
    halves: bool = True

    def uses(self, stage: nn.Module, index: int, kernels: str) -> Uses:
        """What stage ``index`` would take. What needs contents or has no kernel raises errors of any kind."""
        stand = Stand.of(kernels)
        cuda = stand.kernels == "cuda"
        with gradients_aside(stage), untouched(stage), stand.mode, Kernels(stand.kernels):
            stage, batch = stand.hollow(stage), stand.batch(self.inputs)
            with main_gradients(stage.parameters(), self.gradient_dtype):
                found = standing(stage, self.inputs, cuda, BLOCK[stand.kernels])
                found += [Use("LIBRARIES", PRODUCTS)] if cuda else []
                for use in self._run(stage, index, batch, stand):
                    add_use(found, use)
        return tuple(found)

    def _run(self, stage: nn.Module, index: int, batch: Any, stand: Stand) -> Iterator[Use]:
        for split, program in enumerate(islice(programs(self.partition), 2 if self.halves else 1)):
            row = wire(program, index, {index: stage}, by_index(self.plans, program), self.loss, self.weight)
            executor = Executor(row, stand, SUMMED_ALREADY, 1, not self.weight, splits_all=stand.kernels == "cuda")
            meter = stand.meter()
            scale = Scale({index: stage}, Stopwatch(), bool(split), copies=False, meter=meter)
            with meter:
                executor.begin([batch] * MICROBATCHES)
                for step in executor.steps:
                    with scale.around(step):
                        step.handler(step.operand)
            yield from (use for _, use in scale.uses() if use.op not in RECEIVES)


@dataclass
class Rehearsal:
    """Rehearses the stages that ``model`` is cut into, for a machine; what is known of equal ones is kept.

    ``halves``: split backwards too.
    """

    model: nn.Module
    machine: Machine
    gradient_dtype: str = ""
    halves: bool = True
    known: dict[str, tuple[str, Uses]] = field(default_factory=dict)

    def __call__(self, parts: Split, bodies: tuple[StageBody, ...], sources: Sequence[str]) -> Split:
        """The split with what each stage takes; with a note instead where one cannot be run without contents."""
        kernels = kernels_of(self.machine.device)
        keys = stage_keys(parts.graph, bodies, self.model, kernels)
        play = Play(
            parts.partition,
            tuple(body.plan for body in bodies),
            parts.graph.inputs,
            parts.graph.loss,
            parts.graph.weight,
            self.gradient_dtype,
            self.halves,
        )
        attempts = (FAKE,) if has_autocast(parts.graph) else (kernels, FAKE)
        for s, key in enumerate(keys):
            if key not in self.known:
                try:
                    self.known[key] = self._first(attempts, play, sources[s], s)
                except Exception as error:
                    return _with_note(parts, error)
        uses = [[absolute(use, s) for use in self.known[key][1]] for s, key in enumerate(keys)]
        return replace(
            parts,
            partition=with_uses(parts.partition, uses),
            alike=tuple(map(keys.index, keys)),
            kernels=tuple(self.known[key][0] for key in keys),
        )

    def _first(self, attempts: Sequence[str], play: Play, source: str, s: int) -> tuple[str, Uses]:
        """What the first attempt that succeeds finds, and its kernels."""
        for kernels in attempts:
            try:
                uses = play.uses(make_stage(source, self.model, play.plans[s]), s, kernels)
                return kernels, tuple(relative(use, s) for use in uses)
            except Exception as error:
                failed = error
        raise failed


def at_other_sizes(stages: Mapping[int, nn.Module]) -> Callable[[Plan], tuple[Uses, ...]]:
    """What tells the uses of a plan's stages, all of which are at hand; errors of any kind as in ``Play.uses``."""
    known: dict[tuple[int, ...], tuple[Uses, ...]] = {}

    def of(plan: Plan) -> tuple[Uses, ...]:
        sizes = tuple(plan.sizes.values())
        if sizes not in known:
            halves = plan.schedule not in WHOLE
            play = Play(plan.partition, plan.stages, plan.inputs, plan.loss, plan.weight, plan.gradient_dtype, halves)
            first = {
                s: [relative(use, s) for use in play.uses(stages[s], s, plan.kernels[s])]
                for s in dict.fromkeys(plan.alike)
            }
            known[sizes] = tuple(tuple(absolute(use, s) for use in first[a]) for s, a in enumerate(plan.alike))
        return known[sizes]

    return of


def kernels_of(device: str) -> str:
    """The kernels of a kind of device, by torch's name; those of CUDA for other accelerators."""
    return device if device in BLOCK else "cuda"


def has_autocast(graph: Graph) -> bool:
    parts = [part for node in graph.nodes for part in (node, *node.inside)]
    return any(region.startswith("torch.autocast") for part in parts for region in part.context)


def _with_note(parts: Split, error: Exception) -> Split:
    note = (
        f"peak memory is only a sum over the parts of the stages, which cannot be run without values: {briefly(error)}"
    )
    return replace(parts, graph=replace(parts.graph, notes=(*parts.graph.notes, note)))
