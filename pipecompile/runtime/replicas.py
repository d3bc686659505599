"""Data parallel replicas of a program: which process is which, and the sums of gradients over them.

process       0    1  │  2    3
replica       0    0  │  1    1      a replica runs the whole program, each on a batch of its own
rank          0    1  │  0    1      processes of one rank hold the same stages and sum their gradients
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from pipecompile.errors import ProgramError, RuntimeFault
from pipecompile.ir import Instruction, Program
from pipecompile.runtime.links import wait_for
from pipecompile.runtime.main_gradients import gradient, gradient_dtype, no_gradient, set_gradient

BUCKET_BYTES = 25 << 20


@dataclass(frozen=True, slots=True)
class World:
    """This ``process`` of a program of ``ranks`` ranks, of which ``replicas`` run."""

    process: int
    ranks: int
    replicas: int

    @property
    def processes(self) -> int:
        return self.ranks * self.replicas

    @property
    def rank(self) -> int:
        return self.process % self.ranks

    @property
    def replica(self) -> int:
        return self.process // self.ranks

    def process_of(self, rank: int) -> int:
        """The process of a rank in this replica."""
        return self.replica * self.ranks + rank

    def processes_of(self, ranks: Iterable[int], replica: int | None = None) -> list[int]:
        """The processes of some ranks, in one replica or in all."""
        which = range(self.replicas) if replica is None else (replica,)
        return [each * self.ranks + rank for each in which for rank in ranks]


def world_of(ranks: int) -> World:
    """This process's place; RuntimeFault unless the processes that run make whole replicas."""
    processes = dist.get_world_size()
    if processes % ranks:
        raise RuntimeFault(
            f"the program has {ranks} ranks, but {processes} processes run; start it with "
            f"torchrun --nproc-per-node {ranks}, or a multiple of it for data parallel replicas"
        )
    return World(dist.get_rank(), ranks, processes // ranks)


def groups_of(world: World, device: torch.device, timeout: timedelta) -> tuple[Any, Any]:
    """The group of this replica's ranks, and that of this rank's replicas (None if there is one only)."""
    if world.replicas == 1:
        return dist.new_group(list(range(world.ranks)), timeout=timeout), None
    mesh = init_device_mesh(device.type, (world.replicas, world.ranks), mesh_dim_names=("replica", "pipeline"))
    return mesh.get_group("pipeline"), mesh.get_group("replica")


def trains(program: Program) -> bool:
    """Whether the program makes gradients; ProgramError if replicas would not sum them."""
    ops = {one.op for row in program.rows for one in row}
    if not ops & {"BACKWARD", "BACKWARD_WEIGHT"}:
        return False
    if not ops & {"REDUCE_REPLICAS", "UPDATE"}:
        raise ProgramError("the program sums no gradients over replicas; make it with passes.replicas.for_replicas")
    return True


class ReplicaSums:
    """The gradients of this process's ``stages``, each summed when its REDUCE_REPLICAS in ``row`` comes.

    A parameter of several stages is summed with the last of them; ``elsewhere`` are those that REDUCE_GRAD sums.
    """

    def __init__(
        self,
        group: Any,
        stages: Mapping[int, nn.Module],
        row: Sequence[Instruction],
        elsewhere: Iterable[Tensor],
        wait: Callable[[Any, str], None],
    ) -> None:
        self._group, self._wait = group, wait
        taken = {id(p) for p in elsewhere}
        self._parameters: dict[int, list[Tensor]] = {}
        for stage in reversed([one.stage for one in row if one.op == "REDUCE_REPLICAS"]):
            mine: list[Tensor] = [p for p in stages[stage].parameters() if p.requires_grad and id(p) not in taken]
            self._parameters[stage] = mine
            taken |= {id(p) for p in mine}
        self._started: list[tuple[Any, list[Tensor], Tensor]] = []

    def start(self, stage: int) -> None:
        """Start the sums of a stage; its gradients become parts of what is summed."""
        self._start(self._parameters[stage])

    def now(self, parameters: Sequence[Tensor]) -> None:
        """Sum the gradients of some parameters, and wait for that."""
        self._start([p for p in parameters if p.requires_grad])
        self.finish()

    def _start(self, summed: Sequence[Tensor]) -> None:
        for parameters in _buckets(summed):
            flat = _flatten(parameters)
            work = dist.all_reduce(flat, group=self._group, async_op=True)
            self._started.append((work, parameters, flat[-len(parameters) :]))

    def finish(self) -> None:
        """Wait for the sums; a parameter that has a gradient in no replica has none."""
        for work, parameters, counts in self._started:
            self._wait(work, "the other replicas of this rank")
            for parameter, count in zip(parameters, counts.tolist()):
                if not count:
                    set_gradient(parameter, None)
        self._started = []

    def abandon(self) -> None:
        self._started = []


def _buckets(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of parameters with gradients of one dtype, at most ``BUCKET_BYTES`` each unless it is one parameter."""
    for dtype in dict.fromkeys(map(gradient_dtype, parameters)):
        bucket: list[Tensor] = []
        size = 0
        for p in (p for p in parameters if gradient_dtype(p) == dtype):
            if bucket and size + p.nbytes > BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(p)
            size += p.nbytes
        yield bucket


def _flatten(parameters: Sequence[Tensor]) -> Tensor:
    """All gradients in one piece, of which they become views, and behind them a 1 for each that is there."""
    gradients = [gradient(p) for p in parameters]
    if any(g is not None and g.layout != torch.strided for g in gradients):
        raise RuntimeFault("a sparse gradient cannot be summed over replicas; make the layer with sparse=False")
    pieces = [no_gradient(p) if g is None else g for p, g in zip(parameters, gradients)]
    there = torch.tensor([g is not None for g in gradients], dtype=pieces[0].dtype, device=parameters[0].device)
    flat = torch.cat([*(piece.reshape(-1) for piece in pieces), there])
    sizes = [*(p.numel() for p in parameters), len(parameters)]
    for p, part in zip(parameters, torch.split(flat, sizes)):
        set_gradient(p, part.view(p.shape))
    return flat


def start_equal(group: Any, stages: Mapping[int, nn.Module], timeout: timedelta) -> None:
    """Give the stages the parameters and buffers of replica 0. What is equal is left alone: its master may know it better."""
    for stage in stages.values():
        for tensor in (*stage.parameters(), *stage.buffers()):
            whole = tensor.detach().clone(memory_format=torch.contiguous_format)
            wait_for(dist.broadcast(whole, group_src=0, group=group, async_op=True), timeout, "replica 0 of this rank")
            if not torch.equal(tensor, whole):
                tensor.detach().copy_(whole)
