"""A compiled pipeline that trains a model: steps of this process's part of it, on the runtimes that run its program."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from pipecompile.build_files import Files
from pipecompile.capture import Loss, Step, copied
from pipecompile.capture.unfit import refuse_unfit
from pipecompile.check_batch import check_batch
from pipecompile.errors import BuildError
from pipecompile.ir.versions import updates
from pipecompile.part import Part
from pipecompile.passes.communicate import communicate
from pipecompile.passes.schedules import make_timetable
from pipecompile.reference import accumulate
from pipecompile.rehearsing import at_other_sizes
from pipecompile.runtime import (
    Gathering,
    LocalRuntime,
    Ran,
    RankRuntime,
    begin_microbatch,
    check_current,
    own_streams,
    split,
    watch,
)
from pipecompile.runtime.sizes import StepSizesOf
from pipecompile.scaling import GradScaler, scale_of
from pipecompile.training import clip_gradients, forward_only
from pipecompile.updating import check_frozen, check_mean, check_optimizer


class Pipe(Part):
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
        refuse_unfit(model)
        super().__init__(files, model, local)
        check_mean(self.program, self.plan, self._world.replicas)
        self.loss = loss
        if len(self._stages) == len(self.plan.stages):
            self.plan = replace(self.plan, rehearse=at_other_sizes(self._stages))
        self.seed = seed
        frozen = set(self.plan.frozen)
        self._frozen = [(name, p) for name, p in self.named_parameters() if name in frozen]
        self._timeout_s = timeout_s
        self._gathering = Gathering((), 1, False)
        self._gathered: dict[str, Tensor] = {}
        self._runtimes: dict[bool, LocalRuntime | RankRuntime] = {}

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
        A batch of fewer rows than microbatches is one of as many microbatches as rows. Each replica is given a batch of
        its own, and loss and gradients are the mean over the replicas.
        For a seed, the loss and each gradient that one stage makes are those of any other cut, bit for bit. Where several
        stages make parts of a gradient (a tied parameter; what lies before a value that several stages read), each adds up
        its part over the microbatches first, which the unsplit model does within each microbatch: equal to rounding.

        A schedule that never flushes (``pipedream``, ``pipedream-2bw``) updates weights while it runs, with ``optimizer``
        over ``parameters()``: after each microbatch, by the gradient of its loss, or after each group of as many
        microbatches as ranks, by that of their mean loss, over all replicas; gradients are used up. Microbatches read
        weights that are some updates old, as the schedule's own file states. A step begins and ends with one version of the weights.
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
        self._taken.check()
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
            if self.plan.random:
                check_current(next((p.device for p in self.parameters()), torch.device("cpu")))
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

    def reference(self, model: nn.Module, batch: Any, step: int | None = None, others: Sequence[Any] = ()) -> Tensor:
        """The same step on the unsplit ``model``: gradient accumulation over the same microbatches. Returns the loss.

        Random numbers are those of the pipe's step ``step``, the one that it took last unless given. ``others`` are the
        batches of the replicas after the first. A model that changes its batch in place changes a copy.
        """
        number = max(self.steps - 1, 0) if step is None else step
        watch(model, self.plan.random)
        with own_streams():
            count = self.plan.microbatches
            batches = [split(copied(each), count, uneven=True) for each in (batch, *others)]
            return accumulate(
                Step(model, self.loss), batches, lambda r, m: begin_microbatch(self.seed, number, r * count + m)
            )

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
