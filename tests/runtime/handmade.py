"""A small model with every awkward boundary, and the same model cut by hand into four stages.

stage 0 ── hidden ──▶ 1, 3     wide (expanded) ──▶ 2      flags (bool) ──▶ 1, 3     counts (int64) ──▶ 2
        ── total (0-dim) ──▶ 3     nothing (zero-size) ──▶ 3     missing (None) ──▶ 2     half (bfloat16) ──▶ 3
stage 1 ── middle ──▶ 2        (BatchNorm; changes what it received in place)
stage 2 ── deep ──▶ 3
stage 3 ── loss, weight        (its projection is the embedding of stage 0)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipecompile.ir import Partition, Port, Program, Shape, Shared, Spec, StageCost, StagePlan, Transfer
from pipecompile.passes.communicate import communicate
from pipecompile.passes.schedules import make_timetable
from pipecompile.passes.verify import verify
from pipecompile.runtime import Stage

ROWS, TOKENS, WIDTH, WORDS = 2, 5, 8, 16
"""Rows of one microbatch, and the sizes of the model."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wte = nn.Embedding(WORDS, WIDTH)
        self.norm = nn.BatchNorm1d(TOKENS)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.wte.weight
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The mean loss, and the number of its tokens."""
        hidden, wide, flags, counts, total, nothing, half, missing = first(self, batch)
        deep = third(self, second(self, hidden, flags), wide, counts, missing)
        return fourth(self, batch, hidden, flags, total, nothing, half, deep)


def first(self: Any, batch: Any) -> tuple[Any, ...]:
    hidden = self.layers[0](self.wte(batch["ids"]))
    flags = batch["ids"] > 3
    wide = hidden.mean(1, keepdim=True).expand(-1, TOKENS, -1)
    return hidden, wide, flags, batch["ids"].sum(1), hidden.sum(), hidden[:, :0], hidden.bfloat16(), None


def second(self: Any, hidden: Tensor, flags: Tensor) -> Tensor:
    self.steps.add_(1)
    return self.norm(self.layers[1](hidden.relu()) * flags.unsqueeze(-1))


def third(self: Any, middle: Tensor, wide: Tensor, counts: Tensor, missing: None) -> Tensor:
    assert missing is None
    middle.mul_(2).add_(wide)
    return torch.tanh(self.layers[2](middle)) * counts.view(-1, 1, 1)


def fourth(
    self: Any, batch: Any, hidden: Tensor, flags: Tensor, total: Tensor, nothing: Tensor, half: Tensor, deep: Tensor
) -> tuple[Tensor, Tensor]:
    mixed = self.layers[3](deep + hidden + half.float().tanh()) * total.sigmoid() + nothing.sum()
    logits = F.linear(mixed, self.wte.weight) * flags.unsqueeze(-1)
    return F.cross_entropy(logits.flatten(0, 1), batch["ids"].flatten()), flags.sum().float()


def spec(*shape: int, dtype: str = "float32", gradient: bool = True) -> Spec:
    return Spec(shape, dtype, gradient)


H = spec(ROWS, TOKENS, WIDTH)
OUTPUTS = (
    Port("hidden", H, targets=(1, 3)),
    Port("wide", H, targets=(2,)),
    Port("flags", spec(ROWS, TOKENS, dtype="bool", gradient=False), targets=(1, 3)),
    Port("counts", spec(ROWS, dtype="int64", gradient=False), targets=(2,)),
    Port("total", spec(), targets=(3,)),
    Port("nothing", spec(ROWS, 0, WIDTH), targets=(3,)),
    Port("half", spec(ROWS, TOKENS, WIDTH, dtype="bfloat16"), targets=(3,)),
    Port("missing", spec(dtype="none", gradient=False), targets=(2,)),
)
MIDDLE, DEEP = Port("middle", H, targets=(2,)), Port("deep", H, targets=(3,))
LOSS, WEIGHT = Port("loss", spec()), Port("weight", spec(gradient=False))


def taken(ports: Sequence[Port], *names: str, source: int = 0) -> tuple[Port, ...]:
    """The same ports as inputs, in the order of ``names``."""
    found = {port.name: port for port in ports}
    return tuple(Port(name, found[name].spec, source=source) for name in names)


TIED = "wte.weight"
PLANS = (
    StagePlan(0, (), OUTPUTS, modules=("wte", "layers.0"), shared={TIED: TIED}),
    StagePlan(1, taken(OUTPUTS, "hidden", "flags"), (MIDDLE,), modules=("norm", "layers.1"), buffers=("steps",)),
    StagePlan(
        2,
        taken([MIDDLE], "middle", source=1) + taken(OUTPUTS, "wide", "counts", "missing"),
        (DEEP,),
        modules=("layers.2",),
    ),
    StagePlan(
        3,
        taken(OUTPUTS, "hidden", "flags", "total", "nothing", "half") + taken([DEEP], "deep", source=2),
        (LOSS, WEIGHT),
        modules=("layers.3",),
        parameters=(TIED,),
        shared={TIED: TIED},
    ),
)


class First(Stage):
    def forward(self, batch: Any) -> tuple[Any, ...]:
        return first(self, batch)


class Second(Stage):
    def forward(self, batch: Any, hidden: Tensor, flags: Tensor) -> tuple[Any, ...]:
        return (second(self, hidden, flags),)


class Third(Stage):
    def forward(self, batch: Any, *received: Any) -> tuple[Any, ...]:
        return (third(self, *received),)


class Fourth(Stage):
    def forward(self, batch: Any, *received: Any) -> tuple[Any, ...]:
        return fourth(self, batch, *received)


STAGES = (First, Second, Third, Fourth)


def stages_of(model: nn.Module) -> dict[int, Stage]:
    return {index: make(model, plan) for index, (make, plan) in enumerate(zip(STAGES, PLANS))}


def partition_of(plans: Sequence[StagePlan]) -> Partition:
    """The partition that the plans imply."""
    transfers = tuple(
        Transfer(port.name, plan.index, target, port.spec.bytes, port.spec.bytes if port.spec.gradient else 0)
        for plan in plans
        for port in plan.outputs
        for target in port.targets
    )
    holders: dict[str, tuple[int, ...]] = {}
    for plan in plans:
        for canonical in plan.shared:
            holders[canonical] = (*holders.get(canonical, ()), plan.index)
    shared = tuple(Shared(canonical, stages) for canonical, stages in holders.items())
    cost = StageCost(1.0, 2.0, 1.0, saved_bytes=1)
    stages = len(plans)
    return Partition("handmade", stages, tuple(range(stages)), (cost,) * stages, transfers, shared)


def program_of(
    schedule: str = "1f1b", ranks: int = 4, microbatches: int = 4, plans: Sequence[StagePlan] = PLANS
) -> Program:
    partition = partition_of(plans)
    timetable = make_timetable(schedule, Shape(len(plans), ranks, microbatches))
    return verify(communicate(timetable, partition), partition)


def batch_of(microbatches: int, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"ids": torch.randint(WORDS, (ROWS * microbatches, TOKENS), generator=generator)}


def accumulate(model: nn.Module, batch: dict[str, Tensor], microbatches: int) -> Tensor:
    """What a step means: gradient accumulation on the unsplit model."""
    value = torch.zeros(())
    for ids in batch["ids"].chunk(microbatches):
        loss = model({"ids": ids})[0] / microbatches
        loss.backward()
        value += loss.detach()
    return value
