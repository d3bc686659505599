"""PipeDream: 1F1B that never flushes, each microbatch an update of its own, weights stashed (arXiv 1806.03377).

Three ranks, six microbatches; a backward takes two units, a stage's update follows it at once:

    rank 0  F0 F1 F2 .. .. .. .. B0 == F3 B1 == F4 B2 == F5 B3 == .. B4 == .. B5 ==
    rank 1  .. F0 F1 .. .. B0 == F2 B1 == F3 B2 == F4 B3 == F5 B4 == .. B5 == .. ..
    rank 2  .. .. F0 B0 == F1 B1 == F2 B2 == F3 B3 == F4 B4 == F5 B5 == .. .. .. ..

What it trains is not accumulation on the unsplit model. Microbatch t's forward on stage s of p reads the version
max(0, t - (p-s) + 1) of the stage's weights, the newest there is, and its backward reads the same one:

    w_s(t+1) = w_s(t) - rate * gradient_s of the loss at (w_0(t-p+1), ..., w_s(t-p+1+s), ..., w_p-1(t))

(a loss that is a sum over a weight is divided by microbatch t's own; over replicas the gradient is their mean), so early
stages learn from gradients that are p-1 updates old, and the last from its own weights. A parameter that
several stages share (tied embeddings) is one parameter with one delay, that of its first stage s: all its stages read
version max(0, t - (p-s) + 1), and its update sums their gradients. A step of the runtime is such a run over the m
microbatches of its batch, m updates long: it begins and ends with one version everywhere, so t and the versions count
from its beginning, and it is filled and drained once. p ranks: idle (p-1)(F+B) in the run, min(m, p-r) activations and
up to p-r versions of the weights on rank r.
"""

from __future__ import annotations

from pipecompile.ir import Instruction, Shape
from pipecompile.passes.schedules import Forms, Rows, Setting, schedule
from pipecompile.passes.schedules.one_f_one_b import alternate
from pipecompile.passes.schedules.versions import with_updates

FORMS = Forms("(p-1)*(F+I+W)", "Min(m, p-r)", versions="Min(m, p-r, Max(2, m-p+r+2))")


@schedule("pipedream", per_rank=1, instead="interleaved-1f1b", flushes=False, forms=FORMS)
def pipedream(shape: Shape, setting: Setting) -> Rows:
    def row(stage: int) -> tuple[Instruction, ...]:
        delay = shape.stages - stage - 1
        order = alternate(stage, shape.microbatches, delay + 1)
        return with_updates(order, lambda m: max(0, m - delay), range(shape.microbatches))

    return tuple(map(row, range(shape.stages)))
