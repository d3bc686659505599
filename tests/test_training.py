"""Whole training loops around ``pipe.step``, each beside the same loop on the unsplit model, to the last bit.

The unsplit loop is plain torch: the loss of each microbatch over their number, backward, and torch's own optimizers,
schedules and clipping.
"""

from __future__ import annotations

import copy
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

import pipecompile
from pipecompile.compare import gradients
from pipecompile.errors import BuildError
from pipecompile.runtime import split
from tests.torchrun import torchrun

WIDTH, WORDS, ROWS, MICROBATCHES = 8, 11, 8, 4


class Tied(nn.Module):
    """Reads words, and scores them with the same table; dropout and batch norm in between, if wanted."""

    def __init__(self, noisy: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(WORDS, WIDTH)
        block = [nn.Linear(WIDTH, WIDTH), nn.Tanh(), *([nn.BatchNorm1d(WIDTH), nn.Dropout(0.3)] if noisy else [])]
        self.blocks = nn.Sequential(*(nn.Sequential(*copy.deepcopy(block)) for _ in range(4)))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.table.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.blocks(self.table(words)))


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["words"]), batch["next"])


def tokens(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    losses = F.cross_entropy(model(batch["words"]), batch["next"], reduction="none")
    kept = (batch["words"] > 2).to(losses.dtype)
    return (losses * kept).sum(), kept.sum()


def words(seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randint(WORDS, (ROWS,), generator=generator) for name in ("words", "next")}


def compiled(model: nn.Module, loss: Any = cross_entropy, batch: Any = None, **options: Any) -> pipecompile.Pipe:
    settings: dict[str, Any] = {"stages": 4, "microbatches": MICROBATCHES, "costs": "estimate"} | options
    return pipecompile.compile(model, words() if batch is None else batch, loss=loss, **settings)


def unsplit_step(model: nn.Module, batch: Any, loss: Any = cross_entropy) -> Tensor:
    """Gradient accumulation over the microbatches; the mean loss."""
    losses = []
    for microbatch in split(batch, MICROBATCHES):
        losses.append(loss(model, microbatch) / MICROBATCHES)
        losses[-1].backward()
    return functools.reduce(torch.add, losses).detach()


def assert_same(model: nn.Module, unsplit: nn.Module) -> None:
    for (name, mine), expected in zip(model.named_parameters(), unsplit.parameters(), strict=True):
        assert torch.equal(mine, expected), name


@pytest.mark.parametrize("norm_type", [2.0, 1.0, 0.5, float("inf"), float("-inf")])
def test_clipping_is_torchs_own_over_all_stages(norm_type: float) -> None:
    model = Tied()
    unsplit = copy.deepcopy(model)
    pipe = compiled(model)
    tied = sum("table.weight" in pipe.plan.stages[s].shared for s in pipe.stages)
    assert tied == 2, "counted twice, the tied table would show"
    for max_norm in (1e-3, 1e6):
        pipe.step(words())
        unsplit_step(unsplit, words())
        norm = pipe.clip_grad_norm_(max_norm, norm_type)
        torch.testing.assert_close(norm, clip_grad_norm_(unsplit.parameters(), max_norm, norm_type), rtol=1e-6, atol=0)
        expected = gradients(unsplit)
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-8)


def test_clipping_without_gradients_gives_zero() -> None:
    pipe = compiled(Tied())
    assert float(pipe.clip_grad_norm_(1.0)) == 0
    assert all(p.grad is None for p in pipe.parameters())


def test_a_gradient_that_is_not_finite_shows_in_the_norm() -> None:
    model = Tied()
    pipe = compiled(model)
    pipe.step(words())
    model.table.weight.grad[0, 0] = float("nan")
    assert pipe.clip_grad_norm_(1.0).isnan()


def test_evaluating_leaves_gradients_parameters_and_buffers_as_they_are() -> None:
    model = Tied(noisy=True)
    pipe = compiled(model)
    pipe.step(words())
    grads = [p.grad for p in model.parameters()]
    values, buffers = gradients(model), {name: b.clone() for name, b in model.named_buffers()}
    model.eval()
    with torch.no_grad():
        expected = sum(cross_entropy(model, part) / MICROBATCHES for part in split(words(2), MICROBATCHES))
    found = pipe.evaluate(words(2))
    assert torch.equal(found, expected)
    assert not found.requires_grad
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))
    assert all(torch.equal(values[name], gradient) for name, gradient in gradients(model).items())
    assert all(torch.equal(buffers[name], b) for name, b in model.named_buffers())


def test_stages_change_their_mode_without_the_model() -> None:
    model = Tied(noisy=True)
    unsplit = copy.deepcopy(model).eval()
    pipe = compiled(model)
    pipe.eval()
    assert not model.training
    del model
    expected = sum(cross_entropy(unsplit, part).detach() / MICROBATCHES for part in split(words(), MICROBATCHES))
    assert torch.equal(pipe.evaluate(words()), expected)
    pipe.train()
    assert not torch.equal(pipe.evaluate(words()), expected)


def test_evaluating_in_training_mode_is_the_next_steps_forward() -> None:
    model = Tied(noisy=True)
    pipe = compiled(model)
    state = torch.get_rng_state()
    first, again = pipe.evaluate(words()), pipe.evaluate(words())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert torch.equal(pipe.step(words()), first)
    assert not torch.equal(pipe.evaluate(words()), first), "the next step draws other numbers"


def test_evaluating_keeps_nothing_for_a_backward() -> None:
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    pipe = compiled(Tied())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = pipe.evaluate(words())
        assert not saved
        assert torch.equal(pipe.step(words()), value)
        assert saved


def test_evaluating_a_sum_and_a_weight() -> None:
    model = Tied()
    pipe = compiled(model, tokens)
    pipe.step(words())
    grads = [p.grad for p in model.parameters()]
    total, weight = tokens(model, words(2))
    torch.testing.assert_close(pipe.evaluate(words(2)), (total / weight).detach())
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved-1f1b", "zb-h1"])
def test_evaluating_under_every_kind_of_schedule(schedule: str) -> None:
    model = Tied()
    pipe = compiled(model, schedule=schedule, ranks=2 if schedule == "interleaved-1f1b" else 4)
    expected = sum(cross_entropy(model, part).detach() / MICROBATCHES for part in split(words(3), MICROBATCHES))
    assert torch.equal(pipe.evaluate(words(3)), expected)
    assert all(p.grad is None for p in model.parameters())


class Plain(nn.Module):
    """Two layers and between them what ``between`` computes in the model's own forward."""

    def __init__(self, between: Callable[[Tensor, bool], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.between = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1), between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x), self.training)).square().mean()


@pytest.mark.parametrize(
    ("between", "name"),
    [
        (lambda x, training: F.dropout(x, 0.5, training), "dropout"),
        (lambda x, training: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5 * training), "scaled_dot"),
        (lambda x, training: F.batch_norm(x, torch.zeros(WIDTH), torch.ones(WIDTH), training=training), "batch_norm"),
    ],
)
def test_a_mode_that_was_written_into_a_stage_cannot_change(
    between: Callable[[Tensor, bool], Tensor], name: str
) -> None:
    model, batch = Plain(between), (torch.randn(ROWS, WIDTH),)
    pipe = compiled(model, None, batch, stages=2)
    pipe.evaluate(batch)
    model.eval()
    said = f"is in eval mode, but a stage was compiled in train mode with '{name}.*back with model.train()"
    for run in (pipe.evaluate, pipe.step):
        with pytest.raises(BuildError, match=said):
            run(batch)
    model.train()
    pipe.step(batch)


def test_dropout_of_nothing_is_bound_to_no_mode() -> None:
    model, batch = Plain(lambda x, training: F.dropout(x, 0.0, training)), (torch.randn(ROWS, WIDTH),)
    pipe = compiled(model, None, batch, stages=2)
    model.eval()
    assert pipe.evaluate(batch) == pipe.step(batch)


Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def assert_trains_alike(
    model: nn.Module,
    make: Make = lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    loss: Any = cross_entropy,
    batches: int = 1,
    rates: Callable[[torch.optim.Optimizer], Any] | None = None,
    **options: Any,
) -> pipecompile.Pipe:
    """Three optimizer steps, each over ``batches`` batches, of the pipeline and of the unsplit model; all is equal."""
    unsplit = copy.deepcopy(model)
    pipe = compiled(model, loss, **options)
    sides = []
    for parameters, step in (
        (pipe.parameters(), pipe.step),
        (list(unsplit.parameters()), lambda given: unsplit_step(unsplit, given, loss)),
    ):
        optimizer = make(parameters)
        sides.append((step, optimizer, rates(optimizer) if rates else None))
    start = [p.clone() for p in model.parameters()]
    for number in range(3):
        losses = []
        for step, optimizer, rate in sides:
            losses.append([step(words(number * batches + index)) for index in range(batches)])
            optimizer.step()
            optimizer.zero_grad()
            if rate is not None:
                rate.step()
        assert torch.equal(torch.stack(losses[0]), torch.stack(losses[1]))
        assert_same(model, unsplit)
    moved = [not torch.equal(p, before) for p, before in zip(model.parameters(), start, strict=True)]
    assert moved == [p.requires_grad for p in model.parameters()], "what can be trained has been, nothing else"
    return pipe


def untied() -> Tied:
    model = Tied()
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    return model


OPTIMIZERS: dict[str, Make] = {
    "sgd with momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.05),
}
RATES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "cosine": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3),
    "warm-up": lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=3),
    "one cycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=4),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_torchs_optimizers_train_a_pipeline(name: str) -> None:
    assert_trains_alike(untied(), OPTIMIZERS[name])


@pytest.mark.parametrize("name", RATES)
def test_torchs_schedules_of_the_learning_rate_drive_it(name: str) -> None:
    assert_trains_alike(untied(), rates=RATES[name])


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1"])
def test_gradients_accumulate_over_several_batches(schedule: str) -> None:
    assert_trains_alike(untied(), batches=3, schedule=schedule)


class LowRank(nn.Module):
    """A frozen layer and a trained product of two thin matrices beside it, as LoRA has it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_a_frozen_trunk_with_low_rank_adapters(schedule: str) -> None:
    model = untied().requires_grad_(False)
    for index, block in enumerate(model.blocks):
        if index != 1:  # one block without anything to train, between others
            block[0] = LowRank(block[0])
    pipe = assert_trains_alike(model, schedule=schedule)
    assert all(p.grad is None for p in pipe.parameters() if not p.requires_grad)


def test_stages_without_anything_to_train_pass_no_gradient_back() -> None:
    model = untied()
    model.table.requires_grad_(False)
    model.blocks[:3].requires_grad_(False)
    pipe = assert_trains_alike(model)
    assert not any(p.requires_grad for p in pipe.stage(0).parameters())


def test_clipping_counts_what_is_trained_only() -> None:
    model = untied()
    model.blocks[:2].requires_grad_(False)
    unsplit = copy.deepcopy(model)
    pipe = compiled(model)
    pipe.step(words())
    unsplit_step(unsplit, words())
    assert torch.equal(pipe.clip_grad_norm_(0.01), clip_grad_norm_(unsplit.parameters(), 0.01))
    assert_same_gradients(model, unsplit)


def assert_same_gradients(model: nn.Module, unsplit: nn.Module) -> None:
    for (name, mine), expected in zip(model.named_parameters(), unsplit.parameters(), strict=True):
        assert (mine.grad is None) == (expected.grad is None), name
        assert mine.grad is None or torch.equal(mine.grad, expected.grad), name


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_parameters_in_bfloat16(schedule: str) -> None:
    pipe = assert_trains_alike(untied().bfloat16(), schedule=schedule)
    assert {port.spec.dtype for plan in pipe.plan.stages[1:] for port in plan.inputs} == {"bfloat16"}


@pytest.mark.parametrize("head", ["float32", "bfloat16"])
def test_clipping_gradients_in_bfloat16(head: str) -> None:
    model = untied().bfloat16()
    model.head.to(getattr(torch, head))
    model.head.register_forward_pre_hook(lambda module, args: (args[0].to(module.weight.dtype),))
    unsplit = copy.deepcopy(model)
    pipe = compiled(model)
    pipe.step(words())
    unsplit_step(unsplit, words())
    norm, expected = pipe.clip_grad_norm_(0.01), clip_grad_norm_(unsplit.parameters(), 0.01)
    assert norm.dtype == expected.dtype
    assert torch.equal(norm, expected)
    assert_same_gradients(model, unsplit)


def autocast_loss(model: nn.Module, batch: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        scores = model(batch["words"])
    return F.cross_entropy(scores.float(), batch["next"])


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_autocast_inside_the_loss_function(schedule: str) -> None:
    model = untied()
    pipe = assert_trains_alike(model, loss=autocast_loss, schedule=schedule)
    crossing = {port.spec.dtype for plan in pipe.plan.stages[1:] for port in plan.inputs}
    assert crossing == {"bfloat16"}, "half precision crosses between stages, as it was computed"
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def train(folder: str) -> None:
    """What torchrun starts: clipped steps and an evaluation after each, then what this rank's parameters became."""
    from pipecompile.runtime import connect

    torch.set_num_threads(1)
    connect(timeout_s=60)
    model = Tied()
    pipe = compiled(model, tokens, schedule="interleaved-1f1b", ranks=2)
    optimizer = torch.optim.SGD(pipe.parameters(), lr=0.5, momentum=0.9)
    losses, norms, evaluated = [], [], []
    for step in range(3):
        losses.append(float(pipe.step(words(step))))
        norms.append(float(pipe.clip_grad_norm_(0.1)))
        optimizer.step()
        optimizer.zero_grad()
        evaluated.append(float(pipe.evaluate(words(step + 10))))
    assert all(p.grad is None for p in pipe.parameters())
    names = {name for stage in pipe.stages for name in pipe.plan.holds[stage]}
    held = {name: p.tolist() for name, p in model.named_parameters(remove_duplicate=False) if name in names}
    result = {"losses": losses, "norms": norms, "evaluated": evaluated, "parameters": held}
    Path(folder, f"{pipe.rank}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


def test_processes_clip_and_evaluate_as_one(tmp_path: Path) -> None:
    torchrun(2, "tests.test_training", str(tmp_path), timeout_s=120)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for step in range(3):
        total, weight = tokens(model, words(step))
        (total / weight).backward()
        norm = clip_grad_norm_(model.parameters(), 0.1)
        assert norm > 0.1, "the gradients must be clipped for the test to tell anything"
        optimizer.step()
        optimizer.zero_grad()
        kept, count = tokens(model, words(step + 10))
        for result in ranks:
            assert result["losses"][step] == pytest.approx((total / weight).item(), rel=1e-6)
            assert result["norms"][step] == pytest.approx(norm.item(), rel=1e-6)
            assert result["evaluated"][step] == pytest.approx((kept / count).item(), rel=1e-6)
    assert all(ranks[0][what] == ranks[1][what] for what in ("losses", "norms", "evaluated"))
    expected = dict(model.named_parameters(remove_duplicate=False))
    assert expected.keys() == {name for result in ranks for name in result["parameters"]}
    for name, value in [pair for result in ranks for pair in result["parameters"].items()]:
        torch.testing.assert_close(torch.tensor(value), expected[name].detach(), rtol=1e-5, atol=1e-6)
    assert {"table.weight", "head.weight"} <= {name for result in ranks for name in result["parameters"]}


if __name__ == "__main__":
    train(sys.argv[1])
