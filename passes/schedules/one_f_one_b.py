"""1F1B: a forward, a backward, in turn, as soon as a rank can (PipeDream-flush, arXiv 2006.09503; DAPPLE).

Three ranks, four microbatches; a backward takes two units:

    rank 0  F0 F1 F2 .. .. .. .. B0 == F3 B1 == .. B2 == .. B3 ==
    rank 1  .. F0 F1 .. .. B0 == F2 B1 == F3 B2 == .. B3 == .. ..
    rank 2  .. .. F0 B0 == F1 B1 == F2 B2 == F3 B3 == .. .. .. ..

p ranks, m microbatches: idle (p-1)(F+B) on each rank, as GPipe, but min(m, p-r) activations in flight on rank r.
"""

from __future__ import annotations

from pipecompile.ir import Instruction, Shape
from pipecompile.passes.schedules import Forms, Rows, Setting, schedule
from pipecompile.passes.schedules.tasks import backward, forward


def alternate(stage: int, microbatches: int, warm_up: int) -> tuple[Instruction, ...]:
    """``warm_up`` forwards, then one backward and one forward in turn, then the backwards that remain."""
    row = [forward(stage, m) for m in range(min(warm_up, microbatches))]
    for m in range(microbatches):
        row.append(backward(stage, m))
        if warm_up + m < microbatches:
            row.append(forward(stage, warm_up + m))
    return tuple(row)


FORMS = Forms("(p-1)*(F+I+W)", "Min(m, p-r)")


@schedule("1f1b", per_rank=1, instead="interleaved-1f1b", forms=FORMS)
def one_f_one_b(shape: Shape, setting: Setting) -> Rows:
    return tuple(alternate(stage, shape.microbatches, shape.stages - stage) for stage in range(shape.stages))
