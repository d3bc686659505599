"""Eager 1F1B: 1F1B with twice as many forwards first, so that messages travel while ranks compute (Alpa, JaxPP).

Three ranks, six microbatches:

    rank 0  F0 F1 F2 F3 F4 .. .. B0 == F5 B1 == .. B2 == .. B3 == .. B4 == .. B5 ==
    rank 1  .. F0 F1 F2 .. B0 == F3 B1 == F4 B2 == F5 B3 == .. B4 == .. B5 == .. ..
    rank 2  .. .. F0 B0 == F1 B1 == F2 B2 == F3 B3 == F4 B4 == F5 B5 == .. .. .. ..

p ranks, m microbatches: idle (p-1)(F+B) on each rank, as 1F1B, but a message may take as long as a forward and a
backward together before it costs anything in the steady state; min(m, 2(p-r)-1) activations in flight on rank r.
"""

from __future__ import annotations

from pipecompile.ir import Shape
from pipecompile.passes.schedules import Forms, Rows, Setting, schedule
from pipecompile.passes.schedules.one_f_one_b import alternate

FORMS = Forms("(p-1)*(F+I+W)", "Min(m, 2*(p-r)-1)")


@schedule("eager-1f1b", per_rank=1, instead="interleaved-1f1b", forms=FORMS)
def eager(shape: Shape, setting: Setting) -> Rows:
    return tuple(alternate(stage, shape.microbatches, 2 * (shape.stages - stage) - 1) for stage in range(shape.stages))
