"""A build runs at other sizes than it was compiled for: exact beside the unsplit model at these sizes."""

from __future__ import annotations

import re
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn

import pipecompile
from pipecompile import Pipe
from pipecompile.compare import differences, worst
from pipecompile.errors import BatchError, BuildError, MemoryLimitError
from pipecompile.ir.size import read_size
from pipecompile.runtime import RankRuntime, connect
from tests.compiled import case, files
from tests.models import MODELS
from tests.oracle import Outcome, accumulate, assert_same
from tests.runtime.processes import run
from tests.zoo.harness import price

MICROBATCHES = 4


def compiled(name: str, stages: int = 4, ranks: int = 4, schedule: str = "1f1b") -> dict[str, str]:
    """The files of a build for the sizes of the six models."""
    return files(name, stages, ranks, MICROBATCHES, schedule, price)


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
    build = compiled(name)
    for rows, lengths in sizes:
        model, first, loss = case(name)
        batch = resized(first, rows, lengths)
        mine = case(name)[0]
        pipe = Pipe(build, mine, loss)
        pipe.step(first)  # the compiled sizes, then the others
        mine.zero_grad()
        mine.load_state_dict(model.state_dict())
        value = pipe.step(batch)
        assert_same(pipe, Outcome.of(mine, value), accumulate(model, batch, loss, MICROBATCHES))


STEPS: dict[str, list[tuple[int, dict[int, int]]]] = {
    "gpt2": [(8, {}), (16, {16: 9}), (4, {16: 24}), (16, {16: 9})],
    "llama": [(8, {}), (4, {16: 31}), (12, {16: 3})],
    "t5": [(8, {}), (16, {12: 7, 10: 13}), (4, {12: 20})],
    "unet2d": [(8, {}), (16, {}), (4, {})],
}
"""What the processes train on, one size after the other."""


def train(rank: int, builds: dict[str, dict[str, str]], shared_memory: bool) -> dict[str, tuple[list[float], Any]]:
    """For each model this rank's losses, and the gradients of its stages after all steps together."""
    connect(timeout_s=30)
    return {name: train_one(rank, name, build, shared_memory) for name, build in builds.items()}


def train_one(rank: int, name: str, build: dict[str, str], shared_memory: bool) -> tuple[list[float], Any]:
    model, first, loss = case(name)
    pipe = Pipe(build, model, loss)
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
    losses = [runtime.step(resized(first, *sizes)).item() for sizes in STEPS[name]]
    return losses, {name: p.grad.tolist() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("shared_memory", [True, False])
def test_processes_follow_the_sizes(shared_memory: bool) -> None:
    builds = {name: compiled(name, 4, 2, "interleaved-1f1b") for name in STEPS}
    answers = run(train, 2, builds, shared_memory)
    for name, steps in STEPS.items():
        model, first, loss = case(name)
        expected = [accumulate(model, resized(first, *sizes), loss, MICROBATCHES) for sizes in steps]
        seen = set()
        for losses, gradients in (answer[name] for answer in answers):
            assert losses == pytest.approx([one.loss.item() for one in expected], rel=1e-6)
            got = {key: torch.tensor(gradient) for key, gradient in gradients.items()}
            found = list(differences(got, {key: expected[-1].gradients[key] for key in got}, name))
            assert worst(found).error <= 1e-6, worst(found)
            seen |= got.keys()
        assert seen == {key for key, gradient in expected[-1].gradients.items() if gradient is not None}


def estimated(name: str, rows: int, less: int) -> Pipe:
    """One of the six models with another number of rows, and sequences shorter by ``less``, compiled with estimates."""
    model, batch, loss = MODELS[name]()
    batch = {k: torch.cat([t, t, t])[:rows, : t.shape[1] - less] if t.ndim == 2 else t for k, t in batch.items()}
    options: dict[str, Any] = {"costs": "estimate", "check": False, "progress": False}
    return pipecompile.compile(model, batch, stages=4, microbatches=MICROBATCHES, loss=loss, **options)


def test_the_plan_of_other_sizes_is_that_of_compiling_anew(tmp_path: Any) -> None:
    estimated("gpt2", 8, 0).save(tmp_path / "build")
    plan = pipecompile.load(tmp_path / "build", MODELS["gpt2"]()[0]).plan
    told, anew = plan.at(batch=5, sequence=13), estimated("gpt2", 20, 3).plan
    assert told.sizes == anew.sizes == {"batch": 5, "sequence": 13}
    assert told.transfers == anew.transfers
    assert told.inputs == anew.inputs
    assert [cost.saved_bytes for cost in told.costs] == [cost.saved_bytes for cost in anew.costs]
    assert [cost.total_ms for cost in told.costs] == pytest.approx([cost.total_ms for cost in anew.costs], rel=1e-9)
    assert told.forecast.peak_bytes == anew.forecast.peak_bytes
    assert told.forecast.step_ms == pytest.approx(anew.forecast.step_ms, rel=1e-9)
    assert plan.flops == anew.flops
    batch, sequence = (sympy.Symbol(name, integer=True, positive=True) for name in ("batch", "sequence"))
    assert plan.bytes_of(told.transfers[0].value) == 32 * 4 * batch * sequence
    with pytest.raises(BuildError, match="no stage gives a value 'nothing'; those that cross are "):
        plan.bytes_of("nothing")
    assert plan.flops[1].subs({batch: 5, sequence: 13}) == anew.flops[1].subs({batch: 5, sequence: 13}) > 0


def test_the_largest_microbatch_fits_and_one_row_more_does_not() -> None:
    plan = estimated("gpt2", 8, 0).plan
    for rows in (3, 40):
        limit = max(plan.at(batch=rows).forecast.peak_bytes)
        for memory, expected in ((limit, rows), (limit - 1, rows - 1), (limit + 7, rows)):
            found = plan.largest_microbatch(memory)
            assert found == expected
            assert max(plan.at(batch=found).forecast.peak_bytes) <= memory
            assert max(plan.at(batch=found + 1).forecast.peak_bytes) > memory
    with pytest.raises(MemoryLimitError, match=r"not even a microbatch of one row fits into 1\.0 KiB"):
        plan.largest_microbatch("1KiB")


class Fixing(nn.Module):
    """Reads the number of rows as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        rows = int(x.shape[0])
        for layer in self.layers:
            x = layer(x) * torch.tensor([0.5] * rows)[:, None]
        return x


def test_the_line_that_fixes_a_size_is_found_behind_torch_s_own_code() -> None:
    pipe = pipecompile.compile(
        nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))), torch.randn(8, 8), stages=2, microbatches=4,
        loss=lambda m, x: (m(x) + torch.zeros(2, 8)).square().mean(), costs="estimate", progress=False,
    )  # fmt: skip
    assert re.match(r"the loss function \(test_sizes.py, line \d+\) takes it", pipe.plan.fixed["batch"])


def test_what_the_model_fixes_is_told() -> None:
    pipe = pipecompile.compile(
        Fixing(), torch.randn(8, 8), stages=2, microbatches=4, loss=lambda m, x: m(x).square().mean(), costs="estimate",
        progress=False,
    )  # fmt: skip
    assert "batch" in pipe.plan.fixed
    assert re.match(r"\S*test_sizes.py, line \d+ takes it as a constant", pipe.plan.fixed["batch"])
    assert "batch is fixed" in str(pipe.plan)
    with pytest.raises(BatchError, match=r"batch is float32\[12, 8\], but .* batch is fixed: .*test_sizes.py, line"):
        pipe.step(torch.randn(12, 8))
    with pytest.raises(BatchError, match=r"batch=3: batch is fixed: "):
        pipe.plan.at(batch=3)
    with pytest.raises(BatchError, match=r"width=3: the model has no such open size, it has none"):
        pipe.plan.at(width=3)


def test_lengths_that_were_equal_must_agree() -> None:
    files = compiled("gpt2")
    model, batch, loss = MODELS["gpt2"]()
    with pytest.raises(BatchError, match=r"dimension 1 of batch\['labels'\] is 12, but .*'input_ids'\] is 16"):
        Pipe(files, model, loss).step({**batch, "labels": batch["labels"][:, :12]})


@pytest.mark.parametrize("text", ["__import__('os')", "batch.real", "9**9", "batch[0]", "width", "batch(", "lambda: 1"])
def test_a_size_that_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(BuildError, match=r"is no size in batch|is no expression"):
        read_size(text, {"batch": 2})
