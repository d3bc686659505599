"""DualPipe-V: forwards and backwards of a rank's two stages in pairs, placed in a V (DeepSeek 2025, after 2412.19437).

Two ranks, four stages (rank 0 holds 0 and 3, rank 1 holds 1 and 2; small letters: stages 2 and 3), five microbatches:

    rank 0  F0 F1 F2 f0 i0 w0 f1 F3 b1 == f2 B0 == F4 b2 == f3 B1 == b3 == f4 .. B2 == b4 == I3 W3 I4 W4
    rank 1  .. F0 f0 F1 f1 F2 b0 == f2 B0 == F3 b1 == f3 B1 == F4 b2 == f4 B2 == b3 == B3 == i4 I4 w4 W4

Made for hardware that computes a forward and a backward of different microbatches at once: where a forward and a whole
backward of the other stage stand side by side they need nothing of each other, so that one's messages travel under the
other's computation. p ranks (DeepSeek counts PP = 2p stages), m >= 2p microbatches, F and B = I + W of one stage, F = I:
from its first to its last computation the slowest rank idles (p-1)(F + I - W), as the instructions stand; if a pair is
one operation that takes F + B and ends as a whole, (p-1)(F + B + B - 3W). 2p+1 activations of one stage in flight.
"""

from __future__ import annotations

from pipecompile.ir import Instruction, Shape
from pipecompile.passes.schedules import Forms, Rows, Setting, schedule, vee
from pipecompile.passes.schedules.tasks import backward, backward_input, backward_weight, forward


class _Row:
    """A rank's row in the making: each call adds the next microbatch of a stage; ``weight`` the oldest weight half."""

    def __init__(self) -> None:
        self.instructions: list[Instruction] = []
        self._next: dict[tuple[str, int], int] = {}
        self._weights: list[tuple[int, int]] = []

    def _count(self, letter: str, stage: int) -> int:
        microbatch = self._next.get((letter, stage), 0)
        self._next[letter, stage] = microbatch + 1
        return microbatch

    def forward(self, stage: int) -> None:
        self.instructions.append(forward(stage, self._count("F", stage)))

    def backward(self, stage: int, whole: bool = True) -> None:
        microbatch = self._count("B", stage)
        if whole:
            self.instructions.append(backward(stage, microbatch))
        else:
            self.instructions.append(backward_input(stage, microbatch))
            self._weights.append((stage, microbatch))

    def weight(self) -> None:
        if self._weights:
            self.instructions.append(backward_weight(*self._weights.pop(0)))


def _row(shape: Shape, rank: int) -> tuple[Instruction, ...]:
    """Fill the pipeline (three phases), run it in pairs, drain it (four phases)."""
    p, down, up = shape.ranks, rank, shape.stages - 1 - rank
    below = p - rank - 1
    row = _Row()
    for _ in range(2 * below):
        row.forward(down)
    for _ in range(rank + 1):
        row.forward(down)
        row.forward(up)
    for _ in range(below):
        row.backward(up, whole=False)
        row.weight()
        row.forward(up)
    for _ in range(shape.microbatches - 2 * p + rank + 1):
        row.forward(down)
        row.backward(up)
        row.forward(up)
        row.backward(down)
    for _ in range(below):
        row.backward(up)
        row.forward(up)
        row.backward(down)
    halves = 2 * (rank + 1)
    for index in range(halves):
        row.backward(down if index % 2 else up, whole=index <= rank)
    for _ in range(below):
        row.weight()
        row.backward(down, whole=False)
    for _ in range(rank + 1):
        row.weight()
    return tuple(row.instructions)


FORMS = Forms("(p-1)*(F+I-W)/2", "2*p+1", "(m >= 2*p) & Eq(F, I)", "m >= 2*p")


def _too_few(shape: Shape) -> str:
    if shape.microbatches >= shape.stages:
        return ""
    return (
        f"dualpipe-v pairs microbatches on the way down with others on the way up and needs at least as many as "
        f"stages, not {shape.microbatches} for {shape.stages} stages; use --microbatches {shape.stages}"
    )


@schedule("dualpipe-v", placement=vee, per_rank=2, instead="zb-h1", forms=FORMS, refuses=_too_few)
def dualpipe_v(shape: Shape, setting: Setting) -> Rows:
    return tuple(_row(shape, rank) for rank in range(shape.ranks))
