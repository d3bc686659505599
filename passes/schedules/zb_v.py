"""ZB-V: no idle time with the activations of 1F1B, two stages a rank placed in a V (arXiv 2401.10241).

Two ranks, four stages (rank 0 holds 0 and 3, rank 1 holds 1 and 2; small letters: stages 2 and 3), five microbatches:

    rank 0  F0 F1 F2 f0 i0 w0 f1 i1 w1 F3 B0 == f2 i2 w2 F4 B1 == f3 i3 w3 B2 == f4 i4 w4 B3 == B4 == ..
    rank 1  .. F0 f0 F1 f1 i0 w0 F2 I0 W0 f2 i1 w1 F3 I1 W1 f3 i2 w2 F4 I2 W2 f4 i3 w3 I3 i4 I4 W3 w4 W4

p ranks, m microbatches: at F = I = W the slowest rank idles 0 from its first to its last computation (m >= 2p-1),
F/2 max(4p-1-4m, 2p-1-min(m, p)) with fewer microbatches;
min(m, p) activations of a whole rank's share in flight. The drawn order is taken where all tasks cost the same and
m >= 2p-1; otherwise the fastest of it and of the building blocks (blocks.py) that fit the same activations.
"""

from __future__ import annotations

from pipecompile.ir import Shape
from pipecompile.passes.schedules import Forms, Rows, Setting, schedule, vee
from pipecompile.passes.schedules.blocks import best_vee
from pipecompile.passes.schedules.problem import Task


def drawn(shape: Shape, rank: int) -> list[Task]:
    """The order of the drawing; a step with fewer than 2p-1 microbatches leaves out those it does not have."""
    p, down, up = shape.ranks, rank, shape.stages - 1 - rank
    count = max(2 * p - 1, shape.microbatches)
    row: list[Task] = []
    done: dict[tuple[str, int], int] = {}

    def run(letters: str, stage: int) -> None:
        for letter in letters:
            m = done.get((letter, stage), 0)
            if m < count:
                row.append((letter, stage, m))
            done[letter, stage] = m + 1

    for _ in range(2 * (p - rank) - 1):
        run("F", down)
    for _ in range(rank):
        run("F", up)
        run("F", down)
    for _ in range(p - rank):
        run("FIW", up)
    for _ in range(count - p):
        run("FIW", down)
        run("FIW", up)
    for _ in range(rank):
        run("I", down)
        run("I", up)
    for _ in range(p - rank):
        run("IW", down)
    for stage in (up, down):
        while done["W", stage] < count:
            run("W", stage)
    return [task for task in row if task[2] < shape.microbatches]


FORMS = Forms(
    "Piecewise((0, m >= 2*p-1), (F*Max(4*p-1-4*m, 2*p-1-Min(m, p))/2, True))",
    "2*Min(m, p)",
    "Eq(F, I) & Eq(I, W)",
    "Eq(F, I) & Eq(I, W)",
)


@schedule("zb-v", placement=vee, per_rank=2, instead="zb-h1", forms=FORMS, adapts=True)
def zb_v(shape: Shape, setting: Setting) -> Rows:
    order = [drawn(shape, rank) for rank in range(shape.ranks)]
    return best_vee("zb-v", shape, setting, 2 * shape.ranks, order)
