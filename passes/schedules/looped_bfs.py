"""Looped breadth-first: GPipe with several stages a rank, stage after stage (Lamy-Poirier 2022, arXiv 2211.05953).

Two ranks, four stages (small letters: stages 2 and 3), three microbatches:

    rank 0  F0 F1 F2 f0 f1 f2 .. .. .. b0 == b1 == b2 == B0 == B1 == B2 ==
    rank 1  .. F0 F1 F2 f0 f1 f2 b0 == b1 == b2 == B0 == B1 == B2 == .. ..

p ranks, v stages a rank, m >= p microbatches: idle (p-1)(F+B)/v, where F and B are a whole rank's share; m < p:
(F+B)(p-m + (m-1)/v). All m v activations in flight. All microbatches of a stage run in a row, so that its parameters are fetched, and its gradients
reduced, once for all of them.
"""

from __future__ import annotations

from pipecompile.ir import Shape
from pipecompile.passes.schedules import Forms, Rows, Setting, schedule
from pipecompile.passes.schedules.tasks import backward, forward

FORMS = Forms("(F+I+W)*(Max(0, p-m) + (Min(m, p)-1)/v)", "m*v")


@schedule("looped-bfs", forms=FORMS)
def looped_bfs(shape: Shape, setting: Setting) -> Rows:
    rows = []
    for rank in range(shape.ranks):
        stages = shape.stages_of(rank)
        forwards = [forward(stage, m) for stage in stages for m in range(shape.microbatches)]
        backwards = [backward(stage, m) for stage in reversed(stages) for m in range(shape.microbatches)]
        rows.append(tuple(forwards + backwards))
    return tuple(rows)
