"""ZB-H2: no idle time in exchange for twice the activations of 1F1B (arXiv 2401.10241).

Three ranks, six microbatches; I is the backward's input half, W its weight half:

    rank 0  F0 F1 F2 F3 F4 I0 W0 F5 I1 W1 I2 W2 I3 W3 I4 W4 I5 W5 .. ..
    rank 1  .. F0 F1 F2 I0 F3 I1 F4 I2 W0 F5 I3 W1 I4 W2 I5 W3 W4 W5 ..
    rank 2  .. .. F0 I0 F1 I1 F2 I2 F3 I3 F4 I4 W0 F5 I5 W1 W2 W3 W4 W5

Rank r starts 2(p-r)-1 forwards and lags 2r weight halves behind, so every rank holds 2p-1 activations.
p ranks, m microbatches, k = min(m, 2p-1), W <= I: from its first to its last computation the slowest rank idles
max(0, (p-1)(F+I) - (k-1)W), which is max(0, (p-1)(F+I-2W)) from m = 2p-1 on; k activations in flight. The ranks start
and end one after the other, so the next step has to begin before the last rank is done to gain all of it.
"""

from __future__ import annotations

from pipecompile.ir import Shape
from pipecompile.passes.schedules import Forms, Rows, Setting, schedule
from pipecompile.passes.schedules.zb_h1 import lagging

FORMS = Forms("Max(0, (p-1)*(F+I) - (Min(m, 2*p-1)-1)*W)", "Min(m, 2*p-1)", "W <= I", "Eq(r, 0)")


@schedule("zb-h2", per_rank=1, instead="zb-v", forms=FORMS)
def zb_h2(shape: Shape, setting: Setting) -> Rows:
    p = shape.ranks
    return tuple(lagging(r, shape.microbatches, warm_up=2 * (p - r) - 1, lag=2 * r) for r in range(p))
