"""Sums of the gradients of parameters that several ranks hold: started in the step, awaited at its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums that go on over a group: of the gradients of some parameters, and of how many ranks have any, and a dense one.

    ``copies`` are the parameters' tensors on this rank, ``mine`` its own gradients.
    """

    group: Any
    copies: Sequence[Sequence[Tensor]]
    mine: Sequence[Tensor | None]
    gradients: Sequence[tuple[Any, Tensor]]
    counts: tuple[Any, Tensor]

    @staticmethod
    def start(group: Any, copies: Sequence[Sequence[Tensor]], mine: Sequence[Tensor | None]) -> Sums:
        gradients = [_dense(some[0], gradient) for some, gradient in zip(copies, mine)]
        found = [[gradient is not None, gradient is not None and not gradient.is_sparse] for gradient in mine]
        counts = torch.tensor(found, dtype=torch.float32, device=copies[0][0].device)
        return Sums(
            group, copies, mine, [(_sum(each, group), each) for each in gradients], (_sum(counts, group), counts)
        )

    def finish(self, wait: Callable[..., None]) -> list[Tensor | None]:
        """Wait for them: the whole gradients, None if no rank has one, sparse if all that have one have it so."""
        for work, _ in self.gradients:
            wait(work, SHARING)
        work, counts = self.counts
        wait(work, SHARING, on_host=True)
        found: list[Tensor | None] = []
        for (some, dense), mine, (_, gradient) in zip(counts.tolist(), self.mine, self.gradients):
            if some and not dense:
                rows = _rows(mine, gradient)
                wait(_sum(rows, self.group), SHARING)
                at = rows.nonzero()
                found.append(
                    torch.sparse_coo_tensor(
                        at.t(), gradient[at[:, 0]], gradient.shape, is_coalesced=True, check_invariants=False
                    )
                )
            else:
                found.append(gradient if some else None)
        return found


def _sum(tensor: Tensor, group: Any) -> Any:
    return dist.all_reduce(tensor, group=group, async_op=True)


def _dense(parameter: Tensor, gradient: Tensor | None) -> Tensor:
    if gradient is None:
        return no_gradient(parameter)
    return gradient.to_dense() if gradient.is_sparse else gradient.contiguous()


def _rows(sparse: Tensor | None, like: Tensor) -> Tensor:
    """Ones where a sparse gradient has rows, be they zeros."""
    rows = torch.zeros(len(like), device=like.device)
    return rows if sparse is None else rows.index_fill_(0, sparse.coalesce().indices()[0], 1)


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
        timeout: timedelta,
        wait: Callable[..., None],
    ) -> None:
        self._shared, self._wait = shared, wait
        self._groups = _groups(program, world, timeout)
        self._started: list[Sums] = []

    def __len__(self) -> int:
        """How many groups there are."""
        return len(self._groups)

    def start(self, op: Reduce) -> None:
        """Start the sums of ``op.values``."""
        several = [copies for canonical in op.values if (copies := self._shared.get(canonical))]
        if several:
            self._started.append(Sums.start(self._groups[op.ranks], several, [total(copies) for copies in several]))

    def now(self, parameter: Tensor, mine: Tensor | None, ranks: tuple[int, ...]) -> Tensor | None:
        """The sum of this rank's gradient of a parameter and those of the other ``ranks``; None if there is none."""
        (whole,) = Sums.start(self._groups[ranks], [[parameter]], [mine]).finish(self._wait)
        return whole

    def finish(self) -> None:
        """Wait for all sums; a parameter that has a gradient on no rank has none."""
        for sums in self._started:
            for copies, whole in zip(sums.copies, sums.finish(self._wait)):
                share(copies, whole)
        self.abandon()

    def abandon(self) -> None:
        self._started = []

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
