"""Interleaved 1F1B: several stages a rank, placed in loops, microbatches in rounds (Megatron, arXiv 2104.04473).

Two ranks, four stages (rank 0 holds 0 and 2, rank 1 holds 1 and 3), four microbatches; small letters are
stages 2 and 3, a backward takes two units:

    rank 0  F0 F1 f0 f1 F2 .. b0 == F3 b1 == f2 B0 == f3 B1 == .. b2 == .. b3 == B2 == B3 ==
    rank 1  .. F0 F1 f0 b0 == f1 b1 == F2 B0 == F3 B1 == f2 b2 == f3 b3 == B2 == B3 == .. ..

p ranks, v stages a rank, m microbatches in rounds of p: idle (p-1)(F+B)/v, where F and B are a whole rank's share;
2(p-r-1)+(v-1)p+1 activations of one stage in flight on rank r. Any m is allowed: the m mod p microbatches left over
are spread over the rounds, which then hold between p and 2p-1 microbatches (m < p: one round
of m, idle (F+B)(p-m + (m-1)/v)).
"""

from __future__ import annotations

from itertools import pairwise

from pipecompile.ir import Instruction, Shape
from pipecompile.passes.schedules import Forms, Rows, Setting, schedule
from pipecompile.passes.schedules.tasks import backward, forward


def rounds(ranks: int, microbatches: int) -> tuple[range, ...]:
    """The microbatches in consecutive rounds of at least ``ranks`` each, as equal as can be, larger ones first."""
    count = max(1, microbatches // ranks)
    size, left = divmod(microbatches, count)
    starts = [0]
    for index in range(count):
        starts.append(starts[-1] + size + (index < left))
    return tuple(range(start, stop) for start, stop in pairwise(starts))


def _row(shape: Shape, rank: int) -> tuple[Instruction, ...]:
    stages = shape.stages_of(rank)
    groups = rounds(shape.ranks, shape.microbatches)
    forwards = [forward(stage, m) for group in groups for stage in stages for m in group]
    backwards = [backward(stage, m) for group in groups for stage in reversed(stages) for m in group]
    warm_up = min(len(forwards), 2 * (shape.ranks - rank - 1) + (len(stages) - 1) * len(groups[0]) + 1)
    row = forwards[:warm_up]
    for index, one in enumerate(backwards):
        row += [one, *forwards[warm_up + index : warm_up + index + 1]]
    return tuple(row)


FORMS = Forms("(F+I+W)*(Max(0, p-m) + (Min(m, p)-1)/v)", "Min(m*v, 2*(p-r-1)+(v-1)*ceiling(m/Max(1, floor(m/p)))+1)")


def _one_stage(shape: Shape) -> str:
    if shape.stages > shape.ranks:
        return ""
    return (
        f"interleaved-1f1b needs at least two stages on each rank, not {shape.stages} stages on {shape.ranks} "
        f"ranks; use --stages {2 * shape.ranks}, or --schedule 1f1b"
    )


@schedule("interleaved-1f1b", forms=FORMS, refuses=_one_stage)
def interleaved_1f1b(shape: Shape, setting: Setting) -> Rows:
    return tuple(_row(shape, rank) for rank in range(shape.ranks))
