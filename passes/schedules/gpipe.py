"""GPipe: all forwards, then all backwards (Huang et al. 2019, arXiv 1811.06965).

Three ranks, four microbatches; a backward takes two units:

    rank 0  F0 F1 F2 F3 .. .. .. .. .. .. B0 == B1 == B2 == B3 ==
    rank 1  .. F0 F1 F2 F3 .. .. .. B0 == B1 == B2 == B3 == .. ..
    rank 2  .. .. F0 F1 F2 F3 B0 == B1 == B2 == B3 == .. .. .. ..

p ranks, m microbatches: idle (p-1)(F+B) on each rank, m activations in flight.
"""

from __future__ import annotations

from pipecompile.ir import Shape
from pipecompile.passes.schedules import Forms, Rows, Setting, schedule
from pipecompile.passes.schedules.tasks import backward, forward

FORMS = Forms("(p-1)*(F+I+W)", "m")


@schedule("gpipe", per_rank=1, instead="looped-bfs", forms=FORMS)
def gpipe(shape: Shape, setting: Setting) -> Rows:
    microbatches = range(shape.microbatches)
    return tuple(
        tuple([forward(stage, m) for m in microbatches] + [backward(stage, m) for m in microbatches])
        for stage in range(shape.stages)
    )
