"""A build runs at other sizes than it was compiled for: exact beside the unsplit model at these sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipecompile import Pipe
from pipecompile.compiled import Options
from pipecompile.compiler import compile_model
from pipecompile.pipe import build_files
from pipecompile.runtime import RankRuntime, connect, split
from tests.models import MODELS
from tests.oracle import Outcome, accumulate, assert_same
from tests.runtime.processes import run
from tests.zoo.harness import price

MICROBATCHES = 4


def compiled(name: str, stages: int = 4, ranks: int = 4, schedule: str = "1f1b") -> dict[str, str]:
    """The files of a build for the sizes of the six models."""
    model, batch, loss = MODELS[name]()
    options = Options(stages=stages, ranks=ranks, microbatches=MICROBATCHES, schedule=schedule)
    found = compile_model(model, split(batch, MICROBATCHES)[0], loss, price, options)
    return build_files(found.plan({}), found.program, found.sources)


def eager(name: str) -> Any:
    """The model that is never split, without a cache."""
    model, batch, loss = MODELS[name]()
    for module in model.modules():
        if hasattr(module, "config"):
            module.config.use_cache = False
    return model, batch, loss


def resized(batch: Any, rows: int, lengths: dict[int, int]) -> Any:
    """Another batch of so many rows, and of other lengths in dimension 1 of tokens."""
    torch.manual_seed(rows)

    def tensor(old: Tensor) -> Tensor:
        shape = [rows, *(lengths.get(size, size) if not old.is_floating_point() else size for size in old.shape[1:])]
        return torch.randn(shape) if old.is_floating_point() else torch.randint(1, 10, shape)

    return {key: tensor(old) for key, old in batch.items()}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("gpt2", [(12, {}), (4, {16: 31})]),
        ("llama", [(12, {16: 21}), (4, {16: 5})]),
        ("t5", [(12, {}), (4, {12: 7, 10: 13})]),
        ("unet2d", [(12, {}), (4, {})]),
        ("cnn", [(12, {}), (4, {})]),
    ],
)
def test_other_sizes_give_the_unsplit_models_gradients(name: str, sizes: list[tuple[int, dict[int, int]]]) -> None:
    files = compiled(name)
    for rows, lengths in sizes:
        model, first, loss = eager(name)
        batch = resized(first, rows, lengths)
        mine = MODELS[name]()[0]
        pipe = Pipe(files, mine, loss)
        pipe.step(first)  # the compiled sizes, then the others
        mine.zero_grad()
        mine.load_state_dict(model.state_dict())
        value = pipe.step(batch)
        assert_same(pipe, Outcome.of(mine, value), accumulate(model, batch, loss, MICROBATCHES))


STEPS: list[tuple[int, dict[int, int]]] = [(8, {}), (16, {16: 9}), (4, {16: 24}), (16, {16: 9})]
"""What the processes train on, one after the other."""


def train(rank: int, files: dict[str, str], shared_memory: bool) -> tuple[list[float], dict[str, Any]]:
    """This rank's losses, and the gradients of its stages after all steps together."""
    connect(timeout_s=30)
    model, first, loss = MODELS["gpt2"]()
    pipe = Pipe(files, model, loss)
    plan = pipe.plan
    runtime = RankRuntime(
        pipe.program,
        rank,
        pipe.stages,
        plan.stages,
        loss=plan.loss,
        inputs=plan.inputs,
        timeout_s=30,
        shared_memory=shared_memory,
    )
    losses = [runtime.step(resized(first, *sizes)).item() for sizes in STEPS]
    return losses, {name: p.grad.tolist() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("shared_memory", [True, False])
def test_processes_follow_the_sizes(shared_memory: bool) -> None:
    model, first, loss = eager("gpt2")
    expected = [accumulate(model, resized(first, *sizes), loss, MICROBATCHES) for sizes in STEPS]
    answers = run(train, 2, compiled("gpt2", 4, 2, "interleaved-1f1b"), shared_memory)
    seen = set()
    for losses, gradients in answers:
        assert losses == pytest.approx([one.loss.item() for one in expected], rel=1e-6)
        for name, gradient in gradients.items():
            seen.add(name)
            torch.testing.assert_close(torch.tensor(gradient), expected[-1].gradients[name], rtol=1e-5, atol=1e-7)
    assert seen == set(expected[-1].gradients)
