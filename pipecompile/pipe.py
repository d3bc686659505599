"""A compiled pipeline that trains a model: the stages made of its modules, the program, and a runtime for both."""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipecompile.build import write_build
from pipecompile.capture import Loss, Step, copied
from pipecompile.check_batch import check_batch
from pipecompile.errors import BuildError
from pipecompile.ir import Forecast, Program
from pipecompile.ir.versions import updates
from pipecompile.masters import Masters
from pipecompile.passes.communicate import communicate
from pipecompile.passes.replicas import for_replicas
from pipecompile.passes.schedules import make_timetable
from pipecompile.passes.verify import verify
from pipecompile.plan import Plan
from pipecompile.reference import accumulate
from pipecompile.runtime import (
    Gathering,
    LocalRuntime,
    Ran,
    RankRuntime,
    Stage,
    World,
    begin_microbatch,
    make_stage,
    own_streams,
    split,
    watch,
    world_of,
)
from pipecompile.runtime.sizes import StepSizesOf
from pipecompile.saving import Share, load_training, load_weights, save_checkpoint, save_weights
from pipecompile.scaling import GradScaler, scale_of
from pipecompile.training import bound_to_mode, check_compiler, clip_gradients, forward_only
from pipecompile.updating import check_frozen, check_mean, check_optimizer
from pipecompile.weights.folder import newest
from pipecompile.weights.layout import Layout

Files = Mapping[str, str]


def build_files(plan: Plan, program: Program, sources: tuple[str, ...]) -> dict[str, str]:
    """The contents of a build directory by file name."""
    files = {
        "plan.json": json.dumps(plan.to_json(), indent=1),
        "program.json": json.dumps(program.to_json()),
        "program.txt": f"{program}\n",
    }
    return files | {f"stages/stage_{index}.py": source for index, source in enumerate(sources)}


class Pipe:
    """A model's pipeline. ``step(batch)`` is one forward and backward of all microbatches.

    Without a process group all ranks run in this process and the stages hold the model's own parameters; with one, this
    process runs the program of its rank, and holds only its stages once the caller drops the model. ``local`` runs all
    ranks here all the same.
    """

    def __init__(
        self,
        files: Files,
        model: nn.Module,
        loss: Loss | None = None,
        *,
        local: bool = False,
        timeout_s: float = 300.0,
        seed: int = 0,
    ) -> None:
        self._files = dict(files)
        self.plan = Plan.from_json(json_of(files, "plan.json"))
        program = Program.from_json(json_of(files, "program.json"))
        self._world, mine = stages_here(program, local)
        self.program = verify(for_replicas(program, self._world.replicas), self.plan.partition)
        check_mean(self.program, self.plan.weight)
        self.plan = replace(self.plan, program=self.program)
        self.loss = loss
        watch(model, self.plan.random)
        self._stages: dict[int, Stage] = {s: self._make(s, model) for s in mine}
        self.seed = seed
        self.steps = 0
        self._model = weakref.ref(model)
        self._mode = model.training
        self._bound = bound_to_mode(self.source(s) for s in range(len(self.plan.stages)))
        self._layout = Layout.of(model)
        self._masters = Masters(self._found().values(), self.plan.gradient_dtype)
        frozen = set(self.plan.frozen)
        self._frozen = [(name, p) for name, p in self.named_parameters() if name in frozen]
        self._timeout_s = timeout_s
        self._gathering = Gathering((), 1, False)
        self._gathered: dict[str, Tensor] = {}
        self._runtimes: dict[bool, LocalRuntime | RankRuntime] = {}

    def _make(self, index: int, model: nn.Module) -> Stage:
        return make_stage(self.source(index), model, self.plan.stages[index])

    @property
    def forecast(self) -> Forecast:
        """The predicted time, idle shares and peak memory of a step."""
        return self.plan.forecast

    @property
    def rank(self) -> int:
        """The rank whose program this process runs; 0 where all ranks run in it."""
        return self._world.rank

    @property
    def ranks(self) -> int:
        """How many processes run the program; 1 where all ranks run in this one."""
        return self._world.ranks

    @property
    def replica(self) -> int:
        """Which of the ``replicas`` this process belongs to."""
        return self._world.replica

    @property
    def replicas(self) -> int:
        """How many data parallel replicas run the program."""
        return self._world.replicas

    @property
    def stages(self) -> Mapping[int, Stage]:
        """The stages that this process runs, by index."""
        return MappingProxyType(self._stages)

    def stage(self, index: int) -> Stage:
        """Stage ``index``, an nn.Module whose state_dict has the model's own keys. BuildError if another rank has it."""
        if index not in self._stages:
            here = ", ".join(map(str, self._stages))
            raise BuildError(f"stage {index} is not on rank {self.rank}, which has {here}; ask the rank that runs it")
        return self._stages[index]

    def train(self, mode: bool = True) -> None:
        """Put the model and this process's stages into train mode, or with False into eval mode."""
        model = self._model()
        for module in (*self._stages.values(), *([] if model is None else [model])):
            module.train(mode)

    def eval(self) -> None:
        """Put them into eval mode, as ``evaluate`` most often wants it."""
        self.train(False)

    def compile_stages(self, **options: Any) -> None:
        """``torch.compile`` each stage of this process, in place, with its options; the next steps compile them.

        With the default backend, random numbers (dropout) are torch.compile's own and differ from eager mode's; with
        backend="aot_eager" they are the same. BuildError if the default backend lacks a C++ compiler on the CPU, or if a
        stage is recomputed.
        """
        again = [plan.index for plan in self.plan.stages if plan.recompute != "none"]
        if again:
            raise BuildError(
                f"stage {again[0]} is recomputed, which does not go with torch.compile (a stage may be compiled anew "
                "between its two runs); compile the pipeline with recompute='none', torch.compile recomputes on its own"
            )
        check_compiler(self.parameters(), options.get("backend", "inductor"))
        for stage in self._stages.values():
            stage.compile(**options)

    def source(self, index: int) -> str:
        """The Python source of stage ``index``."""
        try:
            return self._files[f"stages/stage_{index}.py"]
        except KeyError:
            raise BuildError(f"there is no stage {index}; stages go from 0 to {len(self.plan.stages) - 1}") from None

    def parameters(self) -> list[nn.Parameter]:
        """The parameters of this process's stages, each once, in the order of the stages."""
        return [p for _, p in self.named_parameters()]

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The same with their FQNs in the model (a tied one's first), for groups by name."""
        names = self.share().names()
        return [(names[key], p) for key, p in self._found().items()]

    def _found(self) -> dict[int, nn.Parameter]:
        return {id(p): p for stage in self._stages.values() for p in stage.parameters()}

    def named_master_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """What an optimizer trains under ``gradient_dtype``: a copy in that dtype of each narrow parameter, whose ``.grad``
        is the gradient summed in it, and every other parameter itself. Parameters get their new values when the next
        ``step``, ``evaluate`` or ``save_weights`` begins.
        """
        return [(name, self._masters.of(p)) for name, p in self.named_parameters()]

    def master_parameters(self) -> list[nn.Parameter]:
        """The same without names."""
        return [p for _, p in self.named_master_parameters()]

    def grad_scaler(self, **options: Any) -> GradScaler:
        """A ``torch.amp.GradScaler`` with its options for ``step(batch, scaler=…)``: where one rank's gradients are not
        finite, every rank skips the optimizer's step. Every rank makes it and calls its methods at the same points.
        """
        device = next((p.device.type for p in self.parameters()), "cpu")
        return GradScaler(
            lambda found: self._runtime(trains=True).sum_over_ranks(found), **{"device": device, **options}
        )

    def step(
        self,
        batch: Any,
        optimizer: torch.optim.Optimizer | None = None,
        ran: list[Ran] | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Tensor:
        """The loss of a whole batch (0-dim, detached, the same on every rank); gradients are added to ``.grad``.

        The loss is the mean over the microbatches, or sum / weight where the loss function returns (sum, weight).
        Sizes that the model leaves open (``plan.sizes``: rows, sequence length) may be others than the compiled ones.
        Each replica is given a batch of its own, and loss and gradients are the mean over the microbatches of all.
        For a seed, the loss and each gradient that one stage makes are those of any other cut, bit for bit. Where several
        stages make parts of a gradient (a tied parameter; what lies before a value that several stages read), each adds up
        its part over the microbatches first, which the unsplit model does within each microbatch: equal to rounding.

        A schedule that never flushes (``pipedream``, ``pipedream-2bw``) updates weights while it runs, with ``optimizer``
        over ``parameters()``: after each microbatch, by the gradient of its loss, or after each group of as many
        microbatches as ranks, by that of their mean loss; gradients are used up. Microbatches read weights that are some
        updates old, as the schedule's own file states. A step begins and ends with one version of the weights.
        ``ran`` gets the instructions that this process ran, with ``time.perf_counter`` when each began and ended.
        Gradients are scaled by ``scaler`` (``grad_scaler()``), the loss is not.

        Raises BatchError for a batch of any other shape, ScheduleError for an optimizer where none
        is used or none where one is, RuntimeFault for a failure on any rank.
        """
        check_optimizer(self.program, self.parameters(), optimizer)
        check_frozen(self._frozen)
        scale = scale_of(scaler, self.updates, self.ranks, self.parameters())
        self._runtime(trains=True)  # replicas are given equal weights when it is made, before masters are rounded
        self._masters.before_step()
        value = self._run(batch, trains=True, optimizer=optimizer, ran=ran, scale=scale)
        self._masters.after_step()
        self.steps += 1
        return value

    @overload
    def evaluate(self, batch: Any) -> Tensor: ...

    @overload
    def evaluate(self, batch: Any, outputs: Literal[True]) -> tuple[Tensor, dict[str, Tensor]]: ...

    def evaluate(self, batch: Any, outputs: bool = False) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The loss that ``step`` would give, forward only: no gradient is made or touched, nothing is kept for one.

        With ``outputs`` also, on every rank, what the loss function returns besides the loss, ``(loss, {"scores": …})``,
        and what the model does if it was compiled with ``outputs=True``, by name ("logits"; "output" for a tensor alone):
        scalars as means over the microbatches, other tensors concatenated along the batch's dimension (else dim 0), truths
        as uint8. BuildError if there is nothing to give.
        Every rank calls it and gets the loss. Modules are in the mode, train or eval, in which the caller has put them.
        """
        if outputs and not self.plan.reported:
            raise BuildError(
                "there are no outputs to give: compile with outputs=True for what the model returns, or return "
                "(loss, {name: tensor}) from the loss function"
            )
        self._masters.write_back()
        with torch.no_grad():
            loss = self._run(batch, trains=False, outputs=outputs)
        return (loss, self._gathered) if outputs else loss

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Scale the gradients so that their norm over the whole model is at most ``max_norm``; gives the norm before.

        What ``torch.nn.utils.clip_grad_norm_`` does on the unsplit model: a tied parameter counts once. Every rank
        calls it and gets the same norm, or with ``error_if_nonfinite`` a RuntimeFault if that is infinite or NaN.
        """
        runtime = self._runtime(trains=True)
        sum_over_ranks = runtime.sum_over_ranks
        return clip_gradients(self.share(), self._masters.of, sum_over_ranks, max_norm, norm_type, error_if_nonfinite)

    @property
    def updates(self) -> bool:
        """Whether ``step`` updates weights itself and needs an optimizer."""
        return updates(self.program.rows)

    @property
    def metrics(self) -> dict[str, Tensor]:
        """The scalars that the loss function returned besides the loss in the last ``step`` or ``evaluate``: means over the
        microbatches (0-dim, float64), the same on every rank.
        """
        return {name: value for name, value in self._gathered.items() if not value.dim()}

    def _run(
        self,
        batch: Any,
        trains: bool,
        optimizer: torch.optim.Optimizer | None = None,
        ran: list[Ran] | None = None,
        outputs: bool = False,
        scale: Tensor | None = None,
    ) -> Tensor:
        check_batch(self.plan, batch)
        self._check_mode()
        runtime = self._runtime(trains)
        self._gathering = Gathering(self.plan.reported, self.plan.microbatches, outputs, self._sizes(batch, outputs))
        with own_streams() if self.plan.random else nullcontext(), self._gathering.active():
            loss = runtime.step(batch, ran, optimizer=optimizer, scale=scale)
        self._gathered = self._gathering.results(runtime.sum_over_ranks, loss.device)
        return loss

    def _sizes(self, batch: Any, outputs: bool) -> list[dict[str, int]]:
        """The open sizes of each microbatch, if ``outputs`` are wanted."""
        if not (outputs and self.plan.reported):
            return []
        read = StepSizesOf(self.plan.inputs)
        return [dict(zip(read.names, sizes)) for sizes in read(split(batch, self.plan.microbatches, uneven=True))]

    def _runtime(self, trains: bool) -> LocalRuntime | RankRuntime:
        if trains not in self._runtimes:
            self._runtimes[trains] = self._make_runtime(trains)
            if self.plan.random or self.plan.reported:
                self._runtimes[trains].before_forward(self._begin_microbatch)
        return self._runtimes[trains]

    def _begin_microbatch(self, microbatch: int) -> None:
        self._gathering.microbatch = microbatch
        if self.plan.random:
            begin_microbatch(self.seed, self.steps, self.replica * self.plan.microbatches + microbatch)

    def _make_runtime(self, trains: bool) -> LocalRuntime | RankRuntime:
        plan = self.plan
        program, stages = (self.program, plan.stages) if trains else forward_only(self.program, plan.stages)
        if self._world.processes == 1:
            return LocalRuntime(program, self._stages, stages, loss=plan.loss, weight=plan.weight, inputs=plan.inputs)
        return RankRuntime(
            program,
            self.rank,
            self._stages,
            stages,
            loss=plan.loss,
            weight=plan.weight,
            inputs=plan.inputs,
            timeout_s=self._timeout_s,
        )

    def together(self) -> AbstractContextManager[None]:
        """While this lasts, a process that is lost between steps (in a save, say) is named to all others, as in a step."""
        runtime = self._runtime(trains=True)
        return runtime.telling() if isinstance(runtime, RankRuntime) else nullcontext()

    def _check_mode(self) -> None:
        """BuildError if the model has changed between train and eval and a stage has the old mode in its operations."""
        model = self._model()
        mode = next(iter(self._stages.values())).training if model is None else model.training
        if self._bound and mode != self._mode:
            now, then = ("train", "eval") if mode else ("eval", "train")
            raise BuildError(
                f"the model is in {now} mode, but a stage was compiled in {then} mode with {self._bound!r} written out, "
                f"because no module of its own computes it; go back with model.{then}(), compile again in {now} mode, "
                f"or put it into a module such as nn.Dropout, which looks at its mode when it is called"
            )

    def reference(self, model: nn.Module, batch: Any, step: int | None = None, others: Sequence[Any] = ()) -> Tensor:
        """The same step on the unsplit ``model``: gradient accumulation over the same microbatches. Returns the loss.

        Random numbers are those of the pipe's step ``step``, the one that it took last unless given. ``others`` are the
        batches of the replicas after the first. A model that changes its batch in place changes a copy.
        """
        number = max(self.steps - 1, 0) if step is None else step
        watch(model, self.plan.random)
        with own_streams():
            batches = map(copied, (batch, *others))
            microbatches = [m for each in batches for m in split(each, self.plan.microbatches, uneven=True)]
            return accumulate(Step(model, self.loss), microbatches, lambda m: begin_microbatch(self.seed, number, m))

    def plain(self, model: nn.Module) -> Pipe:
        """The same stages of ``model`` in this process, where ``step`` leaves in ``.grad`` what can be compared with the
        unsplit model's: without masters, and, if the program updates weights, with all forwards before all backwards.
        """
        program = self.program
        if self.updates:
            program = communicate(make_timetable("gpipe", program.shape), self.plan.partition)
        plan = replace(self.plan, gradient_dtype="")
        files = {"program.json": json.dumps(program.to_json()), "plan.json": json.dumps(plan.to_json())}
        return Pipe(self._files | files, model, self.loss, local=True)

    def share(self) -> Share:
        """What this process has of the model's weights."""
        masters = self._masters.by_parameter()
        return Share(self._layout, self.plan.holds, self._stages, self.rank, self.ranks, self.replica, masters)

    def save_weights(self, directory: str | Path) -> None:
        """Write the model's weights under its own names: safetensors and an index, each rank its shards.

        ``from_pretrained`` and ``load_state_dict(strict=True)`` read them. Older weights there are replaced whole;
        CheckpointError if the directory holds anything else.
        """
        self._masters.write_back()
        save_weights(self.share(), directory)

    def load_weights(self, path: str | Path) -> None:
        """Fill this process's stages from a checkpoint of the whole model: a safetensors file, an index, or a folder
        with either. CheckpointError names a tensor that is missing, extra, of another shape or dtype, or cut off.
        """
        load_weights(self.share(), path)
        self._masters.read_again()

    def save_checkpoint(self, directory: str | Path, optimizer: torch.optim.Optimizer) -> None:
        """Write weights, masters, the optimizer's and the random generators' state as the newest checkpoint of a directory.

        It is whole or not there at all, and the last two are kept. Every rank calls it.
        """
        self._masters.write_back()
        save_checkpoint(self.share(), directory, self.steps, optimizer)

    def load_checkpoint(self, directory: str | Path, optimizer: torch.optim.Optimizer) -> None:
        """Go on from the newest checkpoint of a directory, written with any number of stages; ``steps`` is its step.

        CheckpointError if there is none, or if it is of another model or optimizer.
        """
        checkpoint = newest(directory)
        self.load_weights(checkpoint)
        self.steps = load_training(self.share(), checkpoint, optimizer)

    def save(self, directory: str | Path) -> None:
        """Write the build directory; an older build there is replaced, anything else refused with BuildError."""
        write_build(directory, self._files)


def stages_here(program: Program, local: bool = False) -> tuple[World, list[int]]:
    """This process's place (that of a single rank where all run in it), and the stages that it runs."""
    if local or not dist.is_initialized() or dist.get_world_size() == 1:
        return World(0, 1, 1), list(range(program.shape.stages))
    world = world_of(program.shape.ranks)
    return world, list(program.shape.stages_of(world.rank))


def json_of(files: Files, name: str) -> Any:
    """A build's JSON file by name; BuildError if it is missing or malformed."""
    try:
        return json.loads(files[name])
    except KeyError:
        raise BuildError(f"the build has no {name}; compile again") from None
    except ValueError as error:
        raise BuildError(f"the build's {name} is no JSON: {error}; compile again") from error
