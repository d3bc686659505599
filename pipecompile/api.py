"""What a user calls: ``compile``, ``load`` and the ``pipeline`` decorator."""

from __future__ import annotations

import functools
import json
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipecompile.build_files import build_files
from pipecompile.capture import Loss, copied, untouched
from pipecompile.capture.outputs import with_outputs
from pipecompile.compare import differences, gradients, gradients_aside, worst
from pipecompile.compiled import Compiled, Options
from pipecompile.compiler import Weigh, compile_model
from pipecompile.cost import NodeCost, estimate, existing, measure, read_costs, stage_formulas
from pipecompile.errors import ScheduleError, VerificationError
from pipecompile.garbage import seldom_searched
from pipecompile.ir import Graph, Shape, StageFormulas
from pipecompile.machine import Machine, find_machine, parse_bytes
from pipecompile.masters import read_dtype
from pipecompile.opened import read_files
from pipecompile.pipe import Pipe
from pipecompile.recomputing import Recompute, read_modes
from pipecompile.rehearsing import FAKE, WHOLE, Rehearsal, has_autocast, kernels_of
from pipecompile.runtime import device_of, from_first_rank, main_gradients_aside, split
from pipecompile.simulate import Link
from pipecompile.weighing import weigh

VERSIONED = ("pipedream", "pipedream-2bw")
"""Schedules that keep versions of the weights."""

__all__ = ["Pipe", "compile", "load", "pipeline"]


def compile(
    model: nn.Module,
    batch: Any,
    *,
    stages: int,
    microbatches: int,
    schedule: str = "1f1b",
    loss: Loss | None = None,
    ranks: int | None = None,
    costs: str | Path = "measure",
    machine: str | Path | Machine | None = None,
    memory: int | str | None = None,
    opaque: tuple[str, ...] = (),
    recompute: Recompute = "none",
    gradient_dtype: torch.dtype | None = None,
    outputs: bool = False,
    check: bool = True,
    progress: bool = True,
    source: Mapping[str, Any] | None = None,
) -> Pipe:
    """Compile ``loss(model, batch)`` into a pipeline of ``stages`` stages on ``ranks`` ranks (as many, unless given).

    ``batch`` is a whole batch (dict: keywords, tuple: positions), whose tensors' dimension 0 is split into
    ``microbatches``. ``costs`` is "measure", "estimate" or a cost file; ``machine`` names the device and link for
    estimates and the forecast; ``memory`` is each rank's limit ("80GiB" or bytes); modules whose FQN matches a pattern
    of ``opaque`` are never cut. ``recompute`` says what runs again before its backward instead of keeping what it saves:
    "none", "calls" (each large module call) or "stage", for all stages or by stage ({0: "stage"}). With ``gradient_dtype``
    (torch.float32), gradients of bfloat16 and float16 parameters are summed in that dtype and trained as
    ``pipe.master_parameters()``. With ``outputs``, ``pipe.evaluate(batch, outputs=True)`` gives what the model itself
    returns, besides what ``loss`` does. ``check=False`` skips the comparison of one microbatch with the unsplit model. In a
    process group, rank 0 compiles and every rank gets its result.

    Raises CaptureError, PartitionError, ScheduleError, CostError, MemoryLimitError, BatchError or VerificationError.
    """
    device = machine if isinstance(machine, Machine) else find_machine(machine or "cpu")
    if schedule in VERSIONED and gradient_dtype:
        raise ScheduleError(
            f"{schedule} updates weights while it runs, which does not go with gradient_dtype: masters are rounded to "
            "parameters between steps; leave it out, or choose another schedule"
        )
    options = Options(
        stages=stages,
        ranks=stages if ranks is None else ranks,
        microbatches=microbatches,
        schedule=schedule,
        memory=parse_bytes(memory) if isinstance(memory, str) else memory,
        link=Link(device.link_latency_us / 1e3, device.link_bandwidth / 1e3),
        opaque=tuple(opaque),
        recompute=read_modes(recompute, stages),
        gradient_dtype=read_dtype(gradient_dtype),
    )

    Shape(stages, options.ranks, microbatches)  # refuses numbers below 1 before anything is split by them

    def files() -> str:
        microbatch = copied(split(batch, microbatches)[0])
        price = _price(costs, model, microbatch, device, progress)
        traced = with_outputs(loss) if outputs else loss
        compiled = compile_model(
            model, microbatch, traced, price, options, _weigh(costs, model, microbatch, device, options)
        )
        note = _check(compiled, model, microbatch, loss) if check else "not checked against the unsplit model"
        plan = compiled.plan(source or {}, note, _formulas(compiled, device))
        return json.dumps(build_files(plan, compiled.program, compiled.sources))

    with seldom_searched(), main_gradients_aside(model.parameters()):  # of an older pipe of the model
        found = json.loads(from_first_rank(files))
    return Pipe(found, model, loss)


def _formulas(compiled: Compiled, machine: Machine) -> tuple[StageFormulas, ...]:
    """The stages' costs at other sizes; none where they cannot be estimated."""
    parts = compiled.split
    try:
        return stage_formulas(parts.graph, parts.stage_of, compiled.options.stages, machine)
    except Exception:  # operations without a meta kernel raise errors of any kind
        return ()


def _price(
    costs: str | Path, model: nn.Module, microbatch: Any, machine: Machine, progress: bool
) -> Callable[[Graph], Mapping[str, NodeCost]]:
    if costs == "measure":
        return lambda graph: measure(graph, model, microbatch, progress=progress)
    if costs == "estimate":
        found: dict[str, NodeCost] = {}
        return lambda graph: estimate(graph, machine, found)
    file = existing(costs)
    return lambda graph: read_costs(file, graph)


def _weigh(costs: str | Path, model: nn.Module, microbatch: Any, machine: Machine, options: Options) -> Weigh:
    """What tells the memory that a step takes: stages that run, or are rehearsed where costs were not measured."""
    if costs == "measure":
        return lambda parts, bodies, sources: replace(
            parts,
            partition=weigh(
                model,
                microbatch,
                parts.partition,
                [body.plan for body in bodies],
                sources,
                parts.graph.inputs,
                parts.graph.loss,
                parts.graph.weight,
                masters=options.gradient_dtype,
            ),
            alike=tuple(range(parts.partition.stages)),
            kernels=(FAKE if has_autocast(parts.graph) else kernels_of(device_of(model, microbatch).type),)
            * len(bodies),
        )
    return Rehearsal(model, machine, options.gradient_dtype, halves=options.schedule not in WHOLE)


def _check(compiled: Compiled, model: nn.Module, microbatch: Any, loss: Loss | None) -> str:
    """Compare one microbatch's loss and gradients with the unsplit model's; VerificationError names the worst."""
    if any(p.is_meta for p in model.parameters()):
        return "not checked against the unsplit model: it is on the meta device"
    single = build_files(*compiled.single_microbatch(), compiled.sources)
    pipe = Pipe(single, model, loss, local=True)
    with gradients_aside(model):
        with untouched(model):
            value = pipe.step(microbatch)
        got = gradients(model) | {"": value}
        for p in model.parameters():
            p.grad = None
        with untouched(model):
            expected_value = pipe.reference(model, microbatch)
        expected = gradients(model) | {"": expected_value}
    found = list(differences(got, expected, "the gradient of"))
    bad = worst(found)
    if bad.ok:
        return ""
    if not expected_value.isfinite():
        raise VerificationError(
            f"the unsplit model's own loss of the first microbatch is {expected_value.item()}, so that nothing can be "
            "compared; give a batch whose microbatches have finite losses, or leave the check out (check=False, --no-check)"
        )
    name = "the loss" if bad.name == "the gradient of " else bad.name
    raise VerificationError(
        f"{name} differs from the unsplit model's by {bad.error:.1e} (relative; allowed {bad.allowed:.0e}) on one "
        "microbatch; this model does something that the capture does not see, please report it with the model"
    )


def load(directory: str | Path, model: nn.Module, loss: Loss | None = None, *, trust: bool = False) -> Pipe:
    """The pipeline of a build directory for ``model``, which must have the parameters that it was compiled with.

    ``loss`` is only needed for ``reference``. BuildError names a file that was changed, unless ``trust``.
    """
    return Pipe(read_files(directory, trust), model, loss)


def pipeline(**options: Any) -> Callable[[Loss], Any]:
    """Make a loss function ``loss(model, batch)`` a pipelined step: forward, backward, and the mean loss as its value.

    The first call for a model compiles with ``compile``'s options; ``loss.pipeline(model)`` is the compiled pipe.
    """

    def decorate(function: Loss) -> Any:
        pipes: weakref.WeakKeyDictionary[nn.Module, Pipe] = weakref.WeakKeyDictionary()

        @functools.wraps(function)
        def step(model: nn.Module, batch: Any) -> Tensor:
            if model not in pipes:
                pipes[model] = compile(model, batch, loss=function, **options)
            return pipes[model].step(batch)

        def compiled(model: nn.Module) -> Pipe:
            if model not in pipes:
                raise VerificationError("this model has not been compiled yet; call the loss function with it first")
            return pipes[model]

        step.pipeline = compiled  # type: ignore[attr-defined]
        return step

    return decorate
