"""PipeDream-2BW: 1F1B that never flushes, with two versions of the weights at most (arXiv 2006.09503).

Three ranks, six microbatches, the whole training run; a stage updates after every p-th backward, here after B2 and B5:

    rank 0  F0 F1 F2 .. .. .. .. B0 == F3 B1 == F4 B2 == F5 B3 == .. B4 == .. B5 ==
    rank 1  .. F0 F1 .. .. B0 == F2 B1 == F3 B2 == F4 B3 == F5 B4 == .. B5 == .. ..
    rank 2  .. .. F0 B0 == F1 B1 == F2 B2 == F3 B3 == F4 B4 == F5 B5 == .. .. .. ..

What it trains is accumulation over p microbatches with gradients that are one update old, on every stage alike:

    w(n+1) = w(n) - rate * gradient of the mean loss of microbatches pn .. pn+p-1 at w(max(0, n-1))

A microbatch of group n reads version max(0, n-1) in its forward and its backward, so a stage holds two versions whatever
p is. p ranks, a run of m microbatches: idle (p-1)(F+B) once in the whole run; min(m, p-r) activations on rank r. It can
be printed, proved and simulated; the runtime keeps one version of the weights and refuses it.
"""

from __future__ import annotations

from pipecompile.ir import Shape
from pipecompile.passes.schedules import Forms, Rows, Setting, schedule
from pipecompile.passes.schedules.one_f_one_b import alternate

FORMS = Forms("(p-1)*(F+I+W)", "Min(m, p-r)")


@schedule("pipedream-2bw", per_rank=1, instead="interleaved-1f1b", flushes=False, forms=FORMS)
def pipedream_2bw(shape: Shape, setting: Setting) -> Rows:
    return tuple(alternate(stage, shape.microbatches, shape.stages - stage) for stage in range(shape.stages))
