"""One rank of a program in its own process: what ``torchrun`` starts R times."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipecompile.errors import PeerFault, RuntimeFault
from pipecompile.ir import Instruction, Program, Spec, StagePlan, Value
from pipecompile.ir.batches import as_run
from pipecompile.ir.versions import updates
from pipecompile.runtime.channels import Channels, Contents, Meeting, contents
from pipecompile.runtime.device import check_current, device_among
from pipecompile.runtime.device_progress import DeviceWatch, waiting_places
from pipecompile.runtime.ends import Ends
from pipecompile.runtime.executor import Executor, Ran, Step, timed, told
from pipecompile.runtime.faults import check_in
from pipecompile.runtime.gradients import Apart, shared_parameters
from pipecompile.runtime.heap import keep_freed_memory
from pipecompile.runtime.links import broken, late, wait_for
from pipecompile.runtime.marks import BEGINNING, OUTSIDE, PLACE, SUMMING, WAITS
from pipecompile.runtime.messages import Plans, by_index
from pipecompile.runtime.microbatches import split
from pipecompile.runtime.replicas import ReplicaSums, groups_of, start_equal, trains, world_of
from pipecompile.runtime.sentry import Sentry
from pipecompile.runtime.shared_sums import SharedSums
from pipecompile.runtime.sigterm import outlive_sigterm
from pipecompile.runtime.sizes import MOST, StepSizes, StepSizesOf, plans_at
from pipecompile.runtime.stream_channels import StreamChannels
from pipecompile.runtime.stream_links import check_queues, leave
from pipecompile.runtime.versions import Versions
from pipecompile.runtime.wiring import wire

_made = itertools.count()
"""Runtimes of this process: all ranks make theirs in the same order, so the count names them in the store."""


class RankRuntime:
    """``step`` runs this rank's part of a training step; every rank gets its replica's whole batch and the loss.

    ``stages`` are the rank's own, ``plans`` all. The default process group must be there (``connect`` makes it), with
    one process for each rank, or a multiple of them: replicas of the program, each with a batch of its own, whose
    gradients and losses are summed and divided by all microbatches, or all weight. A wait longer than ``timeout_s``
    seconds is a RuntimeFault; so is any failure of another rank, and its message is the first one's. Ranks of one host
    pass messages between CPUs through shared memory, unless ``shared_memory`` is False. ``inputs`` are the batch's
    tensors as they were compiled: with them, sizes that the model leaves open may change from step to step.
    """

    def __init__(
        self,
        program: Program,
        rank: int,
        stages: Mapping[int, nn.Module],
        plans: Iterable[StagePlan] | Mapping[int, StagePlan],
        *,
        loss: str,
        weight: str = "",
        timeout_s: float = 300.0,
        device: torch.device | str | None = None,
        shared_memory: bool = True,
        inputs: Sequence[Value] = (),
    ) -> None:
        program = as_run(program)
        found = by_index(plans, program)
        ranks = program.shape.ranks
        self._world = world = world_of(ranks)
        self._timeout = timedelta(seconds=timeout_s)
        self._microbatches = program.shape.microbatches
        self._failed = ""
        self._failure: RuntimeFault | None = None
        row = wire(program, rank, stages, found, loss, weight)
        store = dist.distributed_c10d._get_default_store()
        name = f"pipecompile/runtime/{next(_made)}"
        check_in(store, world.process, world.processes, name, timeout_s)
        here = device_among(stages.values(), store, name, world.process, world.processes)
        self._device = torch.device(device) if device is not None else here
        check_current(self._device)
        outlive_sigterm()
        keep_freed_memory()
        self._sentry = Sentry(store, name, program, world.process, world.processes, timeout_s)
        self._totals = [_maker(program, found, name) for name in filter(None, (loss, weight))]
        meeting = Meeting(store, f"{name}/{world.replica}", self._timeout, world, shared_memory)
        ends = Ends.of(self._device)
        self._on_device = ends.on_device
        self._limit = None if ends.on_device else self._timeout
        channels = StreamChannels if ends.on_device else Channels
        self._channels = channels(program, rank, found, self._device, meeting, self._totals, ends)
        shared = shared_parameters(stages, found)
        self._shared_sums = SharedSums(program, world, shared, self._timeout, self._wait)
        self._everyone, self._replicas = groups_of(world, self._device, self._timeout)
        if ends.on_device:
            check_queues(len(self._channels) + len(self._shared_sums) + 1 + (self._replicas is not None))
        self._failing = threading.Lock()
        self._watch = self._watched(ends, program.rows[rank], timeout_s)
        self._sizes_of = StepSizesOf(inputs)

        def wired(sizes: StepSizes) -> tuple[list[Step], Contents]:
            at = plans_at(found, self._sizes_of.names, sizes)
            self._executor.steps = self._executor.wired(wire(program, rank, stages, found, loss, weight, at))
            steps = self._versions.steps(self._executor) if self._versions else self._executor.steps
            return steps, contents(program, found, at)

        self._wired = lru_cache(MOST)(wired)
        self._sizes: StepSizes = (self._sizes_of.compiled,) * self._microbatches
        elsewhere = {name for one in program.rows[rank] if one.op == "REDUCE_GRAD" for name in one.values}
        tied = [p for name, copies in shared.items() if name in elsewhere for p in copies]
        self._replica_sums = ReplicaSums(self._replicas, stages, program.rows[rank], tied, self._wait)
        reduce: dict[str, Callable[[Any], None]] = {
            "REDUCE_GRAD": self._shared_sums.start,
            "REDUCE_REPLICAS": self._replica_sums.start,
        }
        self._executor = Executor(row, self._channels, reduce, world.replicas, not weight)
        everything = [list(stage.parameters()) for stage in stages.values()]
        over_replicas = self._replica_sums.now if world.replicas > 1 else None
        self._versions = (
            Versions(program, stages, found, self._shared_sums.now, over_replicas, world.replicas)
            if updates(program.rows)
            else None
        )
        if self._versions is not None:
            self._executor.steps = self._versions.steps(self._executor)
        several = everything if weight or self._versions is not None or world.replicas > 1 else shared.values()
        self._apart = Apart(p for parameters in several for p in parameters)
        if world.replicas > 1 and trains(program):
            start_equal(self._replicas, stages, self._timeout)

    def before_forward(self, hook: Callable[[int], None]) -> None:
        """Call ``hook(microbatch)`` before each forward of a stage."""
        self._executor.before_forward = hook

    def step(
        self,
        batch: Any,
        ran: list[Ran] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """The loss of ``batch`` on every rank; the gradients of this rank's stages, times ``scale``, are added to their
        ``.grad``, or used up by ``optimizer`` where the program updates weights.

        ``ran`` gets this rank's instructions with the times at which they began and ended.
        """
        self._check_alive()
        microbatches = split(batch, self._microbatches, uneven=True)
        if self._versions is not None:
            self._versions.begin(optimizer, len(microbatches))
        self._executor.begin(microbatches, scale)
        self._apart.begin()
        words = self._sentry.words
        self._sentry.begin(BEGINNING, self._on_device)
        if self._watch is not None:
            self._watch.begin()
        try:
            if (sizes := self._sizes_of.of_all(microbatches, self._microbatches)) != self._sizes:
                self._executor.steps, carried = self._wired(sizes)
                self._channels.resize(carried)
                self._sizes = sizes
            self._channels.begin()
            steps = self._executor.steps
            if self._watch is not None:
                value = self._step_on_device(self._watch, steps, ran)
            else:
                for step in steps if ran is None else [timed(step, ran) for step in steps]:
                    words[PLACE] = step.position
                    step.handler(step.operand)
                words[PLACE] = len(steps)
                value = self._finish()
        except Exception as error:
            raise self._fail(error) from error
        finally:
            self._leave()
        return value

    def _step_on_device(self, watch: DeviceWatch, steps: list[Step], ran: list[Ran] | None) -> Tensor:
        """Launch the step, and wait until the device has done it: what fails there is this step's error."""
        watch.launch(steps)
        value = self._finish()
        watch.finish(lambda: bool(self._failed))
        if self._failed:
            raise RuntimeFault(self._failed)
        if ran is not None:
            ran += watch.times(steps)
        return value

    def _leave(self) -> None:
        if self._watch is not None:
            self._watch.leave()
        self._sentry.words[PLACE] = OUTSIDE

    def _watched(self, ends: Ends, row: Sequence[Instruction], timeout_s: float) -> DeviceWatch | None:
        """What shows where the device is; None on the CPU, where the host is."""
        if ends.module is None:
            return None
        words, trouble = self._sentry.words, self._sentry.trouble
        watch = DeviceWatch(ends.module, words, waiting_places(row), timeout_s, trouble, self._fault_on_device)
        watch.start()
        weakref.finalize(self, watch.stop.set)
        return watch

    def _fault_on_device(self, late_: bool) -> None:
        self._fail(late("the ranks that it receives from", self._timeout) if late_ else broken("another rank"))

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """The sum of what all ranks give, in place; every rank must call it at the same point."""
        self._check_alive()
        self._sentry.begin(SUMMING)
        try:
            whole = tensor.to(self._device)  # a rank without parameters may have made it elsewhere
            work = dist.all_reduce(whole, group=self._everyone, async_op=True)
            self._wait(work, "the other ranks, which must call this too", on_host=True)
            if whole is not tensor:
                tensor.copy_(whole)
        except Exception as error:
            raise self._fail(error) from error
        finally:
            self._sentry.words[PLACE] = OUTSIDE
        return tensor

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Who is lost between steps is made known to all, as within one."""
        try:
            yield
        except PeerFault as error:
            raise self._fail(error) from error

    def _check_alive(self) -> None:
        if self._failed:
            raise RuntimeFault(f"this runtime has failed before ({self._failed}); start the processes again")

    def _finish(self) -> Tensor:
        self._shared_sums.finish()
        self._replica_sums.finish()
        loss, weight = self._executor.losses, self._executor.weights
        values = [self._tell(index, mine) for index, (mine, _) in enumerate(zip((loss, weight), self._totals))]
        self._sentry.words[WAITS] = 1
        self._channels.end()
        self._apart.end(*values[1:])
        self._executor.end()
        return values[0] / values[1] if len(values) > 1 else values[0]

    def _tell(self, index: int, mine: Tensor | None) -> Tensor:
        """The loss (0) or the weight (1) of the rank that has made it, summed over the replicas, on every rank."""
        rank, spec = self._totals[index]
        self._sentry.words[WAITS] = mine is None or self._on_device
        value = self._channels.tell(index, mine)
        if value is None:
            value = torch.empty((), dtype=getattr(torch, spec.dtype), device=self._device) if mine is None else mine
            work = dist.broadcast(value, src=self._world.process_of(rank), group=self._everyone, async_op=True)
            self._wait(work, f"rank {rank}, which makes the loss, or another rank")
        if self._replicas is not None:
            value = value.clone()
            self._wait(dist.all_reduce(value, group=self._replicas, async_op=True), "the other replicas")
        return value

    def _wait(self, work: Any, whom: str, on_host: bool = False) -> None:
        """Wait for a sum of which this process has done its part; where the device does so, the host only on demand."""
        self._sentry.words[WAITS] = 1
        wait_for(work, self._timeout if on_host else self._limit, whom)
        self._sentry.words[WAITS] = self._on_device

    def _fail(self, error: Exception) -> RuntimeFault:
        """The failure of this runtime: that of ``error``, unless it has failed before."""
        with self._failing:
            if self._failure is None:
                self._failure = self._fail_first(error)
        return self._failure

    def _fail_first(self, error: Exception) -> RuntimeFault:
        """Make the first cause known, or hear of it, and let go of everyone who waits for this rank."""
        mine = f"{self._sentry.place()}: {told(error)}"
        self._failed, ours = self._sentry.first(mine, error)
        self._replica_sums.abandon()
        self._apart.abandon()
        self._channels.close()
        self._shared_sums.leave(self._on_device)
        for group in (self._everyone, self._replicas):
            if group is not None:
                leave(group, self._on_device)
        self._everyone, self._replicas = None, None
        failure = RuntimeFault(self._failed)
        if not ours:
            failure.add_note(f"that ended {self._sentry.who} too: {mine}")
        self._sentry.leave()
        return failure


def _maker(program: Program, plans: Plans, name: str) -> tuple[int, Spec]:
    """The rank that makes the output ``name``, and what it looks like."""
    for plan in plans.values():
        for port in plan.outputs:
            if port.name == name:
                return program.shape.placement[plan.index], port.spec
    raise AssertionError(f"wiring has checked that one stage makes {name!r}")
