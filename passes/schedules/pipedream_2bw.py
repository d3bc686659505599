"""PipeDream-2BW: 1F1B that never flushes, with two versions of the weights at most (arXiv 2006.09503).

Three ranks, six microbatches; a stage updates after every p-th backward, here after B2 and B5:

    rank 0  F0 F1 F2 .. .. .. .. B0 == F3 B1 == F4 B2 == F5 B3 == .. B4 == .. B5 ==
    rank 1  .. F0 F1 .. .. B0 == F2 B1 == F3 B2 == F4 B3 == F5 B4 == .. B5 == .. ..
    rank 2  .. .. F0 B0 == F1 B1 == F2 B2 == F3 B3 == F4 B4 == F5 B5 == .. .. .. ..

What it trains is accumulation over p microbatches with gradients that are one update old, on every stage alike:

    w(n+1) = w(n) - rate * gradient of the mean loss of microbatches pn .. pn+p-1 at w(max(0, n-1))

A microbatch of group n reads version max(0, n-1) in its forward and its backward, so a stage holds two versions whatever
p is; where p does not divide m the last group is smaller. A parameter that several stages share is updated with the sum
of their gradients, and read at the same version as all others. A step of the runtime is such a run over the m
microbatches of its batch, m/p updates long: versions and groups count from its beginning, and it is filled and drained
once. p ranks: idle (p-1)(F+B) in the run, min(m, p-r) activations on rank r.
"""

from __future__ import annotations

from pipecompile.ir import Shape
from pipecompile.passes.schedules import Forms, Rows, Setting, schedule
from pipecompile.passes.schedules.one_f_one_b import alternate
from pipecompile.passes.schedules.versions import with_updates

FORMS = Forms("(p-1)*(F+I+W)", "Min(m, p-r)", versions="Min(2, ceiling(m/p))")


@schedule("pipedream-2bw", per_rank=1, instead="interleaved-1f1b", flushes=False, forms=FORMS)
def pipedream_2bw(shape: Shape, setting: Setting) -> Rows:
    p, m = shape.stages, shape.microbatches
    ends = [min(first + p, m) - 1 for first in range(0, m, p)]

    def version_of(microbatch: int) -> int:
        return max(0, microbatch // p - 1)

    return tuple(with_updates(alternate(stage, m, p - stage), version_of, ends) for stage in range(p))
