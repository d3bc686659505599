"""Loss scaling for float16: the pipeline beside the unsplit model with torch's own scaler, overflows among the steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

import pipecompile
from pipecompile.errors import RuntimeFault, ScheduleError
from pipecompile.runtime import split
from tests.test_training import MICROBATCHES, Tied, compiled, words

SCALE = {"init_scale": 2.0**19, "growth_interval": 2}
"""So large that the first steps overflow, and growing so fast that a later one does again."""
STEPS = 6


def half_loss(model: nn.Module, batch: Any) -> Tensor:
    with torch.autocast("cpu", torch.float16):
        scores = model(batch["words"])
    return F.cross_entropy(scores.float(), batch["next"])


def model_of(tied: bool) -> Tied:
    model = Tied()
    if not tied:
        model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    return model


def two_optimizers(named: list[tuple[str, nn.Parameter]]) -> list[torch.optim.Optimizer]:
    """One for the words' tables and the head, one for the blocks between."""
    groups = [[p for name, p in named if name.startswith("blocks") == inner] for inner in (False, True)]
    return [torch.optim.SGD(group, lr=0.5, momentum=0.9) for group in groups]


class Side:
    """A training loop with a scaler; ``skipped`` has the optimizers that each step left out."""

    def __init__(self, named: list[tuple[str, nn.Parameter]], scaler: torch.amp.GradScaler, backward: Any, clip: Any):
        self.named, self.scaler, self.backward, self.clip = named, scaler, backward, clip
        self.optimizers = two_optimizers(named)
        self.norms: list[float] = []

    def step(self, batch: Any) -> Tensor:
        loss: Tensor = self.backward(batch, self.scaler)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        self.norms.append(float(self.clip(1.0)))
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
            optimizer.zero_grad()
        self.scaler.update()
        return loss


def sides(tied: bool, **options: Any) -> tuple[pipecompile.Pipe, Side, nn.Module, Side]:
    model = model_of(tied)
    unsplit = copy.deepcopy(model)
    pipe = compiled(model, half_loss, **options)

    def accumulate(batch: Any, scaler: torch.amp.GradScaler) -> Tensor:
        losses = [half_loss(unsplit, part) / MICROBATCHES for part in split(batch, MICROBATCHES)]
        for loss in losses:
            scaler.scale(loss).backward()
        return sum(losses[1:], losses[0]).detach()

    mine = Side(
        pipe.named_parameters(),
        pipe.grad_scaler(**SCALE),
        lambda batch, scaler: pipe.step(batch, scaler=scaler),
        pipe.clip_grad_norm_,
    )
    theirs = Side(
        list(unsplit.named_parameters()),
        torch.amp.GradScaler("cpu", **SCALE),
        accumulate,
        lambda norm: clip_grad_norm_(unsplit.parameters(), norm),
    )
    return pipe, mine, unsplit, theirs


def assert_trains_alike(tied: bool, **options: Any) -> None:
    _pipe, mine, unsplit, theirs = sides(tied, **options)
    scales = []
    for number in range(STEPS):
        before = {name: p.clone() for name, p in mine.named}
        torch.testing.assert_close(mine.step(words(number)), theirs.step(words(number)), rtol=1e-6, atol=0)
        assert mine.scaler.get_scale() == theirs.scaler.get_scale()
        assert mine.norms[-1] == pytest.approx(theirs.norms[-1], rel=1e-5, nan_ok=True)
        expected = dict(unsplit.named_parameters())
        for name, p in mine.named:
            torch.testing.assert_close(p, expected[name], rtol=1e-6 if tied else 0, atol=1e-7 if tied else 0, msg=name)
        scales.append((mine.scaler.get_scale(), any(not torch.equal(p, before[name]) for name, p in mine.named)))
    assert any(moved for _, moved in scales)
    assert scales[0][0] < SCALE["init_scale"], "the first step overflows"


@pytest.mark.parametrize(("tied", "schedule"), [(False, "zb-h1"), (True, "1f1b")])
def test_scaled_steps_are_torchs(tied: bool, schedule: str) -> None:
    assert_trains_alike(tied, schedule=schedule)


def test_parameters_in_float16_with_masters() -> None:
    model = model_of(tied=False).half()
    pipe = compiled(model, gradient_dtype=torch.float32)
    scaler = pipe.grad_scaler(init_scale=8.0)
    optimizer = torch.optim.SGD(pipe.master_parameters(), lr=0.5)
    pipe.step(words())
    plain = [p.grad.clone() for p in pipe.master_parameters()]
    optimizer.zero_grad()
    pipe.step(words(), scaler=scaler)
    for p, gradient in zip(pipe.master_parameters(), plain):
        torch.testing.assert_close(p.grad, 8 * gradient, rtol=1e-2, atol=1e-2)
    scaler.step(optimizer)
    scaler.update()


def test_a_scaler_that_is_off_changes_nothing() -> None:
    model = model_of(tied=True)
    pipe = compiled(model)
    off = pipe.grad_scaler(enabled=False)
    pipe.step(words())
    plain = [p.grad.clone() for p in pipe.parameters()]
    for p in pipe.parameters():
        p.grad = None
    pipe.step(words(), scaler=off)
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(pipe.parameters(), plain))


def test_gradients_that_were_not_scaled_are_not_unscaled() -> None:
    pipe = compiled(model_of(tied=True))
    scaler = pipe.grad_scaler(init_scale=4.0)
    optimizer = torch.optim.SGD(pipe.parameters(), lr=0.1)
    pipe.step(words(), scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    pipe.step(words())
    with pytest.raises(RuntimeFault, match=r"no step since .* call pipe.step\(batch, scaler=scaler\)"):
        scaler.step(optimizer)


def test_no_scaler_where_weights_are_updated_inside() -> None:
    model = model_of(tied=False)
    pipe = compiled(model, schedule="pipedream")
    optimizer = torch.optim.SGD(pipe.parameters(), lr=0.1)
    with pytest.raises(ScheduleError, match="updates weights while it runs, before infinities of all ranks are known"):
        pipe.step(words(), optimizer, scaler=pipe.grad_scaler())


def ranks_scale_alike() -> None:
    options = {"schedule": "interleaved-1f1b", "ranks": 2}
    assert_trains_alike(True, **options)
    pipe, mine, _, theirs = sides(False, **options)
    with pytest.raises(ScheduleError, match=r"is a torch.amp.grad_scaler.GradScaler, .* make it with pipe.grad_scaler"):
        pipe.step(words(), scaler=theirs.scaler)
    one_rank_overflows(pipe, mine)


def one_rank_overflows(pipe: pipecompile.Pipe, side: Side) -> None:
    """Of two optimizers, only that of the rank's infinity skips, and it skips on both ranks."""
    scaler = pipe.grad_scaler(init_scale=2.0)
    pipe.step(words(), scaler=scaler)
    if pipe.rank == 0:
        dict(side.named)["table.weight"].grad[0, 0] = float("inf")
    before = {name: p.clone() for name, p in side.named}
    for optimizer in side.optimizers:
        scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 1.0
    for name, p in side.named:
        assert torch.equal(p, before[name]) != name.startswith("blocks"), name
