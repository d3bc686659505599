"""Gradients of narrow parameters summed in float32 and trained as masters, beside the same on the unsplit model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

import pipecompile
from pipecompile.errors import BuildError, CheckpointError, MemoryLimitError
from pipecompile.runtime import split
from tests.test_training import MICROBATCHES, WIDTH, Tied, compiled, cross_entropy, tokens, words


class Unsplit:
    """The same by hand: a float32 copy of each parameter, to which every microbatch's gradient is added."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.pairs = [(p, nn.Parameter(p.detach().float())) for p in model.parameters()]
        self.masters = [master for _, master in self.pairs]

    def step(self, batch: Any, microbatches: int = MICROBATCHES, whole: int = MICROBATCHES) -> None:
        for part in split(batch, microbatches):
            (cross_entropy(self.model, part) / whole).backward()
            for p, master in self.pairs:
                grad, p.grad = p.grad.float(), None
                master.grad = grad if master.grad is None else master.grad.add_(grad)

    @torch.no_grad()
    def write_back(self) -> None:
        for p, master in self.pairs:
            p.copy_(master)


def narrow(tied: bool = False) -> Tied:
    model = Tied()
    if not tied:
        model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    return model.bfloat16()


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_masters_train_as_on_the_unsplit_model(schedule: str) -> None:
    model = narrow()
    unsplit = Unsplit(copy.deepcopy(model))
    pipe = compiled(model, schedule=schedule, gradient_dtype=torch.float32)
    sides = [
        torch.optim.AdamW(parameters, lr=0.01, fused=True) for parameters in (pipe.master_parameters(), unsplit.masters)
    ]
    for step in range(3):
        for batch in (words(step), words(step + 10)):  # gradients accumulate over batches
            pipe.step(batch)
            unsplit.step(batch)
        assert all(p.grad is None for p in model.parameters())
        for (name, mine), expected in zip(pipe.named_master_parameters(), by_name(unsplit, pipe)):
            assert mine.grad.dtype == torch.float32
            assert torch.equal(mine.grad, expected.grad), name
        norm = pipe.clip_grad_norm_(0.01)
        torch.testing.assert_close(norm, clip_grad_norm_(unsplit.masters, 0.01), rtol=1e-6, atol=0)
        for optimizer in sides:
            optimizer.step()
            optimizer.zero_grad()
        unsplit.write_back()
        for mine, expected in zip(model.parameters(), unsplit.model.parameters()):
            assert mine.dtype == torch.bfloat16
            torch.testing.assert_close(mine, expected, rtol=1e-2, atol=0)


def by_name(unsplit: Unsplit, pipe: pipecompile.Pipe) -> list[nn.Parameter]:
    names = dict(zip((name for name, _ in unsplit.model.named_parameters()), unsplit.masters))
    return [names[name] for name, _ in pipe.named_master_parameters()]


@pytest.mark.parametrize("loss", [cross_entropy, tokens])
def test_a_tied_parameter_and_token_means(loss: Any) -> None:
    model = narrow(tied=True)
    wide = copy.deepcopy(model).float()
    pipe = compiled(model, loss, gradient_dtype=torch.float32)
    pipe.step(words())
    pipe.reference(wide, words()) if loss is cross_entropy else token_mean(wide).backward()
    for name, master in pipe.named_master_parameters():
        torch.testing.assert_close(master.grad, wide.get_parameter(name).grad, rtol=0.1, atol=0.01)


def token_mean(model: nn.Module) -> Tensor:
    total, weight = tokens(model, words())
    return total / weight


def test_the_sum_over_many_microbatches_is_closer_than_in_bfloat16() -> None:
    generator = torch.Generator().manual_seed(3)
    batch = {name: torch.randint(11, (32,), generator=generator) for name in ("words", "next")}
    errors = {}
    exact = [torch.zeros_like(p, dtype=torch.float64) for p in narrow().parameters()]
    model = narrow()
    for part in split(batch, 32):
        for total, grad in zip(exact, torch.autograd.grad(cross_entropy(model, part) / 32, list(model.parameters()))):
            total += grad.double()
    for dtype in (None, torch.float32):
        model = narrow()
        pipe = compiled(model, batch=batch, microbatches=32, gradient_dtype=dtype)
        pipe.step(batch)
        trained = dict(pipe.named_master_parameters())
        found = [trained[name].grad.double() for name, _ in model.named_parameters()]
        errors[dtype] = sum(float((mine - best).square().sum()) for mine, best in zip(found, exact)) ** 0.5
    assert errors[torch.float32] < errors[None] / 100, errors


def test_masters_are_in_the_memory_plan() -> None:
    peaks = [compiled(narrow(), gradient_dtype=dtype).plan for dtype in (None, torch.float32)]
    narrow_bytes = [cost.trainable_bytes for cost in peaks[1].costs]
    assert [cost.master_bytes for cost in peaks[1].costs] == [2 * size for size in narrow_bytes]
    more = [with_ - without for with_, without in zip(peaks[1].forecast.peak_bytes, peaks[0].forecast.peak_bytes)]
    # the masters (4 bytes instead of none), their gradients and two moments (12 instead of 6); the optimizer's step or
    # the sum of one parameter's gradient takes more for a moment
    largest = max(p.nbytes for p in narrow().parameters())
    assert all(5 * size <= bytes <= 5 * size + 2 * largest for bytes, size in zip(more, narrow_bytes, strict=True))


class LargeTable(nn.Module):
    """Most parameters in a table that takes no time, so that equal times and equal memory are different cuts."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2000, WIDTH)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)) for _ in range(6)))
        self.head = nn.Linear(WIDTH, 11)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.blocks(self.table(words)))


def test_a_limit_of_memory_counts_masters() -> None:
    model = LargeTable().bfloat16()
    options: dict[str, Any] = {"stages": 2, "gradient_dtype": torch.float32}
    quick = compiled(model, **options)
    assert quick.plan.stages[0].modules != ("table",)
    table = 2000 * WIDTH
    # the parameter, its master, the master's gradient, two moments, what AdamW's step takes; activations
    limit = (2 + 4 + 4 + 8 + 8) * table + 2000
    assert max(quick.forecast.peak_bytes) > limit
    pipe = compiled(model, memory=limit, **options)
    assert pipe.plan.stages[0].modules == ("table",)
    assert max(pipe.forecast.peak_bytes) <= limit
    assert compiled(model, stages=2, memory=14 * table)
    with pytest.raises(MemoryLimitError, match=rf"would do \(.*; less than {18 * table} would not, for parameters"):
        compiled(model, memory=14 * table, **options)


def test_values_that_were_loaded_reach_the_masters(tmp_path: Any) -> None:
    model = narrow()
    pipe = compiled(model, gradient_dtype=torch.float32)
    pipe.save_weights(tmp_path / "weights")
    before = [p.clone() for p in pipe.master_parameters()]
    for master in pipe.master_parameters():
        master.data.add_(1)
        master.grad = torch.zeros_like(master)
    pipe.load_weights(tmp_path / "weights")
    pipe.evaluate(words())
    assert all(torch.equal(a, b) for a, b in zip(pipe.master_parameters(), before))


def test_other_dtypes_are_refused_and_wide_parameters_stand_for_themselves() -> None:
    with pytest.raises(BuildError, match=r"gradient_dtype is torch.float64, expected torch.float32 or None"):
        compiled(narrow(), gradient_dtype=torch.float64)
    pipe = compiled(Tied(), gradient_dtype=torch.float32)
    assert all(a is b for a, b in zip(pipe.master_parameters(), pipe.parameters()))


@pytest.mark.parametrize("of", ["pipe", "model"])
def test_an_optimizer_of_the_narrow_parameters_is_named(of: str) -> None:
    model = narrow()
    pipe = compiled(model, gradient_dtype=torch.float32)
    optimizer = torch.optim.AdamW(pipe.parameters() if of == "pipe" else model.parameters(), lr=0.01)
    pipe.step(words())
    with pytest.raises(
        BuildError, match=r"has a bfloat16 parameter of shape \(11, 8\) itself.* pipe.master_parameters"
    ):
        optimizer.step()
    compiled(model).step(words())  # without masters it is right
    optimizer.step()
    assert all(optimizer.state[p] for p in model.parameters())


def test_parameters_by_name() -> None:
    model = Tied()
    pipe = compiled(model)
    found = dict(pipe.named_parameters())
    assert found.keys() == dict(model.named_parameters()).keys(), "a tied parameter once, under its first name"
    assert all(model.get_parameter(name) is p for name, p in found.items())
    decayed = [p for name, p in pipe.named_parameters() if not name.endswith("bias")]
    rest = [p for name, p in pipe.named_parameters() if name.endswith("bias")]
    unsplit = copy.deepcopy(model)
    theirs = dict(unsplit.named_parameters())
    for kind in ({"foreach": True}, {"fused": True}, {}):
        sides = [
            torch.optim.AdamW([{"params": a, "weight_decay": 0.1}, {"params": b, "weight_decay": 0.0}], lr=0.01, **kind)
            for a, b in (
                (decayed, rest),
                (
                    [p for n, p in theirs.items() if not n.endswith("bias")],
                    [p for n, p in theirs.items() if "bias" in n],
                ),
            )
        ]
        pipe.step(words())
        for part in split(words(), MICROBATCHES):
            (cross_entropy(unsplit, part) / MICROBATCHES).backward()
        for optimizer in sides:
            optimizer.step()
            optimizer.zero_grad()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p, theirs[name], rtol=1e-6, atol=1e-7, msg=name)


def replicas_train_masters() -> None:
    """Each of two processes has all stages and a batch of its own; they start from different weights."""
    rank = torch.distributed.get_rank()
    model = narrow()
    unsplit = Unsplit(copy.deepcopy(model))
    with torch.no_grad():
        model.blocks[0][0].weight += rank
    pipe = compiled(model, ranks=1, schedule="interleaved-1f1b", gradient_dtype=torch.float32)
    assert (pipe.replica, pipe.replicas) == (rank, 2)
    optimizers = [torch.optim.SGD(p, lr=0.5, momentum=0.9) for p in (pipe.master_parameters(), unsplit.masters)]
    for step in range(3):
        pipe.step(words(2 * step + rank))
        for replica in range(2):
            unsplit.step(words(2 * step + replica), microbatches=MICROBATCHES, whole=2 * MICROBATCHES)
        for (name, mine), theirs in zip(pipe.named_master_parameters(), by_name(unsplit, pipe)):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-7, msg=name)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for (name, mine), theirs in zip(pipe.named_master_parameters(), by_name(unsplit, pipe)):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7, msg=name)
            theirs.data.copy_(mine.data)  # the sums differ in their last bits, which rounding to bfloat16 makes large
        unsplit.write_back()


def adam(pipe: pipecompile.Pipe) -> torch.optim.Optimizer:
    return torch.optim.AdamW(pipe.master_parameters(), lr=0.01)


def train(pipe: pipecompile.Pipe, optimizer: torch.optim.Optimizer, steps: range) -> dict[str, Tensor]:
    for step in steps:
        pipe.step(words(step))
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in pipe.named_master_parameters()}


def ranks_resume_masters(folder: str) -> None:
    """Saved by four stages on two ranks, resumed by two stages, and by one process that has trained without masters."""
    first = compiled(narrow(), schedule="interleaved-1f1b", ranks=2, gradient_dtype=torch.float32)
    optimizer = adam(first)
    train(first, optimizer, range(2))
    first.save_checkpoint(folder, optimizer)
    train(first, optimizer, range(2, 4))
    found: list[Any] = [None, None]
    torch.distributed.all_gather_object(found, {n: p.detach() for n, p in first.named_master_parameters()})
    whole: dict[str, Tensor] = found[0] | found[1]
    other = compiled(narrow(), stages=2, ranks=2, gradient_dtype=torch.float32)
    again = adam(other)
    other.load_checkpoint(folder, again)
    assert other.steps == 2
    for name, p in train(other, again, range(2, 4)).items():
        assert p.dtype == torch.float32
        torch.testing.assert_close(p, whole[name], rtol=1e-6, atol=1e-8, msg=name)
    bare = compiled(narrow(), stages=2, ranks=2)
    with pytest.raises(CheckpointError, match=r"has a float32 master of .* which is trained without one here"):
        bare.load_checkpoint(folder, adam(bare))


def replicas_resume_masters(folder: str) -> None:
    """Each of two processes has all stages; the masters that come back are not rounded when replicas are made equal."""
    pipes = [compiled(narrow(), ranks=1, schedule="interleaved-1f1b", gradient_dtype=torch.float32) for _ in range(2)]
    optimizers = [adam(pipe) for pipe in pipes]
    train(pipes[0], optimizers[0], range(2))
    pipes[0].save_checkpoint(folder, optimizers[0])
    expected = train(pipes[0], optimizers[0], range(2, 4))
    pipes[1].load_checkpoint(folder, optimizers[1])
    for name, p in train(pipes[1], optimizers[1], range(2, 4)).items():
        assert torch.equal(p, expected[name]), name


def test_training_goes_on_with_masters_where_there_were_none(tmp_path: Any) -> None:
    model = narrow()
    pipe = compiled(model)
    optimizer = torch.optim.AdamW(pipe.parameters(), lr=0.01)
    train(pipe, optimizer, range(2))
    pipe.save_checkpoint(tmp_path, optimizer)
    wide = compiled(narrow(), gradient_dtype=torch.float32)
    again = adam(wide)
    wide.load_checkpoint(tmp_path, again)
    for mine, p in zip(wide.master_parameters(), pipe.parameters()):
        assert torch.equal(mine, p.float())
        assert torch.equal(again.state[mine]["exp_avg"], optimizer.state[p]["exp_avg"].float())
    train(wide, again, range(2, 3))


def test_compiling_again_leaves_an_older_pipe_as_it_is() -> None:
    model = narrow()
    older = compiled(model, gradient_dtype=torch.float32)
    older.step(words())
    gradients = {name: p.grad.clone() for name, p in older.named_master_parameters()}
    with pytest.raises(MemoryLimitError):
        compiled(model, gradient_dtype=torch.float32, memory=10, costs="measure")
    older.step(words())
    for name, p in older.named_master_parameters():
        assert torch.equal(p.grad, 2 * gradients[name]), name
    newer = compiled(model, gradient_dtype=torch.float32)
    newer.step(words())
    for name, p in newer.named_master_parameters():
        assert torch.equal(p.grad, gradients[name]), name
