"""Whole training loops around ``pipe.step``, each beside the same loop on the unsplit model, to the last bit.

The unsplit loop is plain torch: the loss of each microbatch over their number, backward, and torch's own optimizers,
schedules and clipping.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

import pipecompile
from pipecompile.compare import gradients
from pipecompile.runtime import split

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
    total = torch.zeros(())
    for microbatch in split(batch, MICROBATCHES):
        value = loss(model, microbatch) / MICROBATCHES
        value.backward()
        total = total + value.detach()
    return total


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


def test_evaluating_in_training_mode_is_the_next_steps_forward() -> None:
    model = Tied(noisy=True)
    pipe = compiled(model)
    state = torch.get_rng_state()
    first, again = pipe.evaluate(words()), pipe.evaluate(words())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert torch.equal(pipe.step(words()), first)
    assert not torch.equal(pipe.evaluate(words()), first), "the next step draws other numbers"


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
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.test_training", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        cwd=root,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
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
