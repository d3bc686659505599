"""What one process has of a compiled model: stages, their parameters and masters, and the checkpoints that hold them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pipecompile.build import write_build
from pipecompile.build_files import Files, plan_and_program
from pipecompile.errors import BuildError
from pipecompile.ir import Forecast, Program
from pipecompile.masters import Masters
from pipecompile.passes.replicas import for_replicas
from pipecompile.passes.verify import verify
from pipecompile.runtime import Stage, World, compile_recomputed, make_stage, watch, world_of
from pipecompile.saving import Share, load_training, load_weights, save_checkpoint, save_weights
from pipecompile.taken import Taken
from pipecompile.training import bound_to_mode, check_compiler
from pipecompile.weights.folder import newest
from pipecompile.weights.layout import Layout


class Part:
    """The stages of ``files`` that this process runs, made of ``model``: all of them without a process group or if ``local``.

    ``plan`` and ``program`` are of the whole, proved for the replicas that run; ``steps`` is how many steps were trained.
    """

    def __init__(self, files: Files, model: nn.Module, local: bool) -> None:
        self._files = dict(files)
        plan, program = plan_and_program(files)
        self._world, mine = stages_here(program, local)
        self.program = verify(for_replicas(program, self._world.replicas), plan.partition)
        self.plan = replace(plan, program=self.program)
        watch(model, plan.random)
        self._stages: dict[int, Stage] = {s: make_stage(self.source(s), model, plan.stages[s]) for s in mine}
        self.steps = 0
        self._model = weakref.ref(model)
        self._taken = Taken(model, [plan.stages[s] for s in mine])
        self._mode = model.training
        self._bound = bound_to_mode(self.source(s) for s in range(len(plan.stages)))
        self._layout = Layout.of(model)
        self._masters = Masters(self._found().values(), plan.gradient_dtype)

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
        backend="aot_eager" they are the same. A stage that is recomputed is compiled within, for each size anew; with
        recompute="calls" only its recomputed calls are. BuildError if the default backend lacks a C++ compiler on the CPU.
        """
        check_compiler(self.parameters(), options.get("backend", "inductor"))
        for index, stage in self._stages.items():
            mode = self.plan.stages[index].recompute
            if mode == "none":
                stage.compile(**options)
            else:
                compile_recomputed(stage, mode == "stage", options)

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
        is the gradient summed in it, and every other parameter itself. Parameters get their new values behind the
        optimizer's step; those of a master that is changed otherwise when the next ``step``, ``evaluate`` or saving begins.
        """
        return [(name, self._masters.of(p)) for name, p in self.named_parameters()]

    def master_parameters(self) -> list[nn.Parameter]:
        """The same without names."""
        return [p for _, p in self.named_master_parameters()]

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
