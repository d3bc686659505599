"""V-Half: half the activations of 1F1B for about half its idle time, two stages a rank in a V (arXiv 2405.15362).

Four ranks, eight stages (rank 0 holds 0 and 7; small letters: stages 4 to 7), four microbatches:

    rank 0  F0 F1 F2 .. .. .. .. f0 i0 F3 w0 f1 i1 w1 .. f2 i2 I0 w2 f3 i3 I1 W0 w3 W1 B2 == B3 ==
    rank 1  .. F0 F1 .. .. .. f0 F2 .. i0 f1 F3 w0 i1 f2 w1 I0 i2 f3 W0 I1 i3 w2 W1 I2 w3 I3 W2 W3
    rank 2  .. .. F0 F1 .. f0 .. .. F2 f1 i0 w0 F3 f2 i1 I0 w1 f3 i2 I1 W0 w2 i3 I2 W1 I3 w3 W2 W3
    rank 3  .. .. .. F0 f0 F1 f1 .. .. F2 f2 i0 w0 F3 I0 W0 f3 i1 I1 i2 I2 w1 W1 i3 I3 w2 W2 w3 W3

p ranks: (p+2)/2 activations of a whole rank's share in flight. The paper gives the idle time at F = I = W as about half
that of 1F1B, without a closed form. The fastest building block (blocks.py) that fits these activations gives, from p
microbatches on, (3p-5)F/2 for p >= 6 and less for fewer ranks, where 1F1B has (6p-6)F/2. Under other costs, and with
fewer microbatches, the search decides.
"""

from __future__ import annotations

from pipecompile.ir import Shape
from pipecompile.passes.schedules import Forms, Rows, Setting, schedule, vee
from pipecompile.passes.schedules.blocks import best_vee

IDLE = "(F+I+W)/6*Piecewise((2*p-3, p <= 4), (9, p <= 5), (3*p-5, True))"
FORMS = Forms(IDLE, "Min(2*m, p+2)", "(p >= 2) & (m >= p) & Eq(F, I) & Eq(I, W)")


@schedule("v-half", placement=vee, per_rank=2, instead="zb-h1", forms=FORMS, adapts=True)
def v_half(shape: Shape, setting: Setting) -> Rows:
    return best_vee("v-half", shape, setting, shape.ranks + 2)
