"""ZB-H1: 1F1B whose backward is split, the weight halves kept for where a rank would wait (arXiv 2401.10241).

Three ranks, six microbatches; I is the backward's input half, W its weight half:

    rank 0  F0 F1 F2 .. .. I0 W0 F3 I1 W1 F4 I2 W2 F5 I3 W3 I4 W4 I5 W5
    rank 1  .. F0 F1 .. I0 F2 I1 W0 F3 I2 W1 F4 I3 W2 F5 I4 W3 I5 W4 W5
    rank 2  .. .. F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 F4 I4 W2 F5 I5 W3 W4 W5

Rank r starts p-r forwards as 1F1B does and lags r weight halves behind, so every rank holds p activations.
p ranks, m microbatches, k = min(m, p), W <= I: from its first to its last computation the slowest rank idles
(p-1)(F+I) - (k-1)W, which is (p-1)(F+I-W) from m = p on; min(m, p) activations in flight.
"""

from __future__ import annotations

from pipecompile.ir import Instruction, Shape
from pipecompile.passes.schedules import Forms, Rows, Setting, schedule
from pipecompile.passes.schedules.tasks import backward_input, backward_weight, forward


def lagging(stage: int, microbatches: int, warm_up: int, lag: int) -> tuple[Instruction, ...]:
    """``warm_up`` forwards, then in turn an input half, the weight half ``lag`` microbatches back, a forward."""
    row = [forward(stage, m) for m in range(min(warm_up, microbatches))]
    for m in range(microbatches):
        row.append(backward_input(stage, m))
        if m >= lag:
            row.append(backward_weight(stage, m - lag))
        if warm_up + m < microbatches:
            row.append(forward(stage, warm_up + m))
    row += [backward_weight(stage, m) for m in range(max(0, microbatches - lag), microbatches)]
    return tuple(row)


FORMS = Forms("(p-1)*(F+I) - (Min(m, p)-1)*W", "Min(m, p)", "W <= I", "Eq(r, 0)")


@schedule("zb-h1", per_rank=1, instead="zb-v", forms=FORMS)
def zb_h1(shape: Shape, setting: Setting) -> Rows:
    p = shape.ranks
    return tuple(lagging(r, shape.microbatches, warm_up=p - r, lag=r) for r in range(p))
