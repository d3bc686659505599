"""V-Min: a third of the activations of 1F1B for about two thirds of its idle time, in a V (arXiv 2405.15362).

Four ranks, eight stages (rank 0 holds 0 and 7; small letters: stages 4 to 7), four microbatches:

    rank 0  F0 F1 .. .. .. .. .. f0 i0 F2 w0 .. .. f1 i1 I0 w1 F3 W0 f2 i2 I1 w2 W1 .. f3 i3 I2 w3 W2 .. .. .. B3 ==
    rank 1  .. F0 .. .. .. .. f0 F1 .. i0 w0 .. f1 F2 I0 i1 W0 w1 f2 F3 I1 i2 W1 w2 f3 .. I2 i3 W2 w3 .. .. I3 W3 ..
    rank 2  .. .. F0 .. .. f0 .. .. F1 .. i0 f1 w0 I0 F2 W0 i1 f2 w1 I1 F3 W1 i2 f3 w2 I2 W2 .. i3 w3 .. I3 W3 .. ..
    rank 3  .. .. .. F0 f0 .. .. .. .. F1 f1 i0 I0 w0 W0 F2 f2 i1 I1 w1 W1 F3 f3 i2 I2 w2 W2 .. .. i3 I3 w3 W3 .. ..

p ranks: floor((p+4)/3) activations of a whole rank's share in flight. The paper gives the idle time at F = I = W as
about two thirds that of 1F1B, without a closed form. The fastest building block (blocks.py) that fits these activations
gives, from p microbatches on, (4p-5)F/2 for 4 and for 6 or more ranks and less for others, where 1F1B has (6p-6)F/2.
Under other costs the search decides. Where stages differ the activations bind: with I = 1.1 F and W = 0.8 F nothing is
gained over 1F1B but memory.
"""

from __future__ import annotations

from pipecompile.ir import Shape
from pipecompile.passes.schedules import Forms, Rows, Setting, schedule, vee
from pipecompile.passes.schedules.blocks import best_vee

IDLE = "(F+I+W)/6*Piecewise((4*p-7, p <= 3), (11, p <= 5), (4*p-5, True))"
FORMS = Forms(IDLE, "Min(2*m, 2*floor((p+4)/3))", "(p >= 2) & (m >= p) & Eq(F, I) & Eq(I, W)")


@schedule("v-min", placement=vee, per_rank=2, instead="zb-h1", forms=FORMS, adapts=True)
def v_min(shape: Shape, setting: Setting) -> Rows:
    return best_vee("v-min", shape, setting, 2 * ((shape.ranks + 4) // 3))
