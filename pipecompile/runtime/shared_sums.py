"""Sums of the gradients of parameters that several ranks hold: started in the step, awaited at its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipecompile.ir import Program
from pipecompile.runtime.gradients import share, total
from pipecompile.runtime.main_gradients import no_gradient
from pipecompile.runtime.replicas import World
from pipecompile.runtime.stream_links import leave
from pipecompile.runtime.wiring import Reduce

SHARING = "the ranks that share a parameter"


class SharedSums:
    """The sums of ``shared`` parameters (the different tensors that this rank holds for each, by canonical FQN).

    Sums go over all replicas too. ``wait(work, whom, on_host)`` waits for one; every rank makes its groups here at the
    same point.
    """

    def __init__(
        self,
        program: Program,
        world: World,
        shared: Mapping[str, Sequence[Tensor]],
        device: torch.device,
        timeout: timedelta,
        wait: Callable[..., None],
    ) -> None:
        self._shared, self._device, self._wait = shared, device, wait
        self._groups = _groups(program, world, timeout)
        self._sums: list[tuple[Any, Sequence[Tensor], Tensor]] = []
        self._there: list[tuple[Any, list[Sequence[Tensor]], Tensor]] = []

    def __len__(self) -> int:
        """How many groups there are."""
        return len(self._groups)

    def start(self, op: Reduce) -> None:
        """Start the sums of ``op.values``, and those of how many ranks have a gradient."""
        several = [copies for canonical in op.values if (copies := self._shared.get(canonical))]
        if not several:
            return
        group, found = self._groups[op.ranks], [total(copies) for copies in several]
        for copies, mine in zip(several, found):
            gradient = no_gradient(copies[0]) if mine is None else mine.contiguous()
            self._sums.append((dist.all_reduce(gradient, group=group, async_op=True), copies, gradient))
        there = torch.tensor([mine is not None for mine in found], dtype=torch.float32, device=self._device)
        self._there.append((dist.all_reduce(there, group=group, async_op=True), several, there))

    def now(self, gradient: Tensor, ranks: tuple[int, ...]) -> None:
        """Add to ``gradient`` what the other ``ranks`` have, and wait for it."""
        self._wait(dist.all_reduce(gradient, group=self._groups[ranks], async_op=True), SHARING)

    def finish(self) -> None:
        """Wait for all sums; a parameter that has a gradient on no rank has none."""
        for work, copies, gradient in self._sums:
            self._wait(work, SHARING)
            share(copies, gradient)
        for work, several, counts in self._there:
            self._wait(work, SHARING, on_host=True)
            for copies in (copies for copies, count in zip(several, counts.tolist()) if not count):
                share(copies, None)
        self.abandon()

    def abandon(self) -> None:
        self._sums, self._there = [], []

    def leave(self, on_device: bool) -> None:
        """Abandon the sums, and let go of the ranks that wait in one."""
        self.abandon()
        for group in self._groups.values():
            leave(group, on_device)
        self._groups = {}


def _groups(program: Program, world: World, timeout: timedelta) -> dict[tuple[int, ...], Any]:
    """A group for each set of ranks that sums a gradient, over all replicas, made in one order; this rank's are given."""
    placement = program.shape.placement
    sets = {
        tuple(sorted({placement[one.stage], *(placement[peer] for peer in one.peers)}))
        for row in program.rows
        for one in row
        if one.op in ("REDUCE_GRAD", "UPDATE") and one.peers
    }
    groups = {ranks: dist.new_group(world.processes_of(ranks), timeout=timeout) for ranks in sorted(sets)}
    return {ranks: group for ranks, group in groups.items() if world.rank in ranks}
