"""Real processes give what gradient accumulation on the unsplit model gives, and fail together with the first cause."""

from __future__ import annotations

import itertools
import os
import re
import signal
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from pipecompile.errors import RuntimeFault
from pipecompile.ir.batches import as_run
from pipecompile.runtime import RankRuntime, connect
from tests.runtime.handmade import PLANS, Net, accumulate, batch_of, program_of, stages_of
from tests.runtime.processes import run

MICROBATCHES = 4


def runtime_of(rank: int, schedule: str, ranks: int, **options: Any) -> tuple[Net, RankRuntime]:
    program = program_of(schedule, ranks, MICROBATCHES)
    model = Net()
    mine = {s: stage for s, stage in stages_of(model).items() if s in program.shape.stages_of(rank)}
    return model, RankRuntime(program, rank, mine, PLANS, loss="loss", **options)


def train(rank: int, ranks: int, schedules: tuple[str, ...], weight: str, shared_memory: bool = True) -> dict[str, Any]:
    """Two steps with each schedule: the losses, and the gradients and buffers of this rank's stages."""
    connect(timeout_s=30)
    found: dict[str, Any] = {}
    for schedule in schedules:
        model, runtime = runtime_of(rank, schedule, ranks, weight=weight, timeout_s=30, shared_memory=shared_memory)
        ran: list[Any] = []
        losses = [runtime.step(batch_of(MICROBATCHES, seed), ran).item() for seed in (1, 2)]
        assert [one for one, _, _ in ran] == 2 * list(as_run(program_of(schedule, ranks, MICROBATCHES)).rows[rank])
        assert all(began <= ended <= following for (_, began, ended), (_, following, _) in itertools.pairwise(ran))
        gradients = {name: p.grad.tolist() for name, p in model.named_parameters() if p.grad is not None}
        found[schedule] = losses, gradients, {name: b.tolist() for name, b in model.named_buffers()}
    return found


@pytest.mark.parametrize(
    ("ranks", "schedules", "shared_memory"),
    [
        (2, ("interleaved-1f1b", "looped-bfs"), True),
        (4, ("gpipe", "1f1b", "eager-1f1b", "zb-h2"), True),
        (4, ("1f1b", "zb-h1"), False),
    ],
)
def test_loss_gradients_and_buffers(ranks: int, schedules: tuple[str, ...], shared_memory: bool) -> None:
    reference = Net()
    losses = [accumulate(reference, batch_of(MICROBATCHES, seed), MICROBATCHES).item() for seed in (1, 2)]
    expected = {name: p.grad for name, p in reference.named_parameters()}
    answers = run(train, ranks, ranks, schedules, "", shared_memory)
    for schedule in schedules:
        seen = set()
        for rank, answer in enumerate(answers):
            assert isinstance(answer, dict), answer
            got, gradients, buffers = answer[schedule]
            assert got == pytest.approx(losses, rel=1e-6)
            for name, gradient in gradients.items():
                torch.testing.assert_close(torch.tensor(gradient), expected[name], rtol=1e-6, atol=1e-6, msg=name)
            seen |= set(gradients)
            if rank == program_of(schedule, ranks, 1).shape.placement[1]:
                torch.testing.assert_close(torch.tensor(buffers["norm.running_mean"]), reference.norm.running_mean)
                assert buffers["steps"] == 2 * MICROBATCHES
        assert seen == set(expected)
    tied = [answer[schedules[0]][1].get("wte.weight") for answer in answers]
    assert tied[0] == tied[-1]


def test_a_weighted_loss() -> None:
    reference = Net()
    for seed in (1, 2):
        totals = [reference({"ids": ids}) for ids in batch_of(MICROBATCHES, seed)["ids"].chunk(MICROBATCHES)]
        loss, weight = sum(loss for loss, _ in totals), sum(weight for _, weight in totals)
        (loss / weight).backward()
        value = loss.item() / weight.item()
    for answer in run(train, 2, 2, ("interleaved-1f1b",), "weight"):
        assert isinstance(answer, dict), answer
        got, gradients, _ = answer["interleaved-1f1b"]
        assert got[1] == pytest.approx(value, rel=1e-6)
        for name, gradient in gradients.items():  # bfloat16 inside: the scale of a gradient changes its rounding
            torch.testing.assert_close(
                torch.tensor(gradient), dict(reference.named_parameters())[name].grad, rtol=1e-2, atol=1e-4, msg=name
            )


def fail(rank: int, how: str, at: int, timeout_s: float, shared_memory: bool = True) -> str:
    """Rank 1 fails in the forward of microbatch ``at``; the others tell how they hear of it, and after how long."""
    connect(timeout_s=30)
    model, runtime = runtime_of(rank, "1f1b", 4, timeout_s=timeout_s, shared_memory=shared_memory)
    runtime.step(batch_of(MICROBATCHES))
    calls: list[int] = []
    forward = model.layers[1].forward

    def bad(hidden: Tensor) -> Tensor:
        calls.append(0)
        if len(calls) == at + 1:
            if how == "raise":
                raise ValueError("spilled")
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(timeout_s + 2)
        return forward(hidden)

    if rank == 1:
        model.layers[1].forward = bad
    started = time.monotonic()
    try:
        runtime.step(batch_of(MICROBATCHES))
    except RuntimeFault as error:
        took = time.monotonic() - started
        again = ""
        try:
            runtime.step(batch_of(MICROBATCHES))
        except RuntimeFault as second:
            again = str(second)
        return f"{error} | {'; '.join(getattr(error, '__notes__', []))} | {again} | {took:.1f}"
    return "no error"


def test_a_rank_that_raises_ends_all_ranks_with_its_error() -> None:
    for rank, answer in enumerate(run(fail, 4, "raise", 2, 20.0)):
        first, note, again, took = answer.split(" | ")
        assert "rank 1, instruction" in first
        assert "(1F2), microbatch 2: ValueError: spilled" in first
        assert (f"that ended rank {rank} too" in note) == (rank != 1)
        assert "this runtime has failed before (rank 1" in again
        assert float(took) < 15, "nobody waits for the timeout"


@pytest.mark.parametrize("shared_memory", [True, False])
def test_a_rank_that_is_killed_ends_all_ranks(shared_memory: bool) -> None:
    answers = run(fail, 4, "kill", 1, 20.0, shared_memory)
    assert answers.pop(1) is None
    for answer in answers:
        first, *_, took = answer.split(" | ")
        assert re.match(r"rank 1, instruction \d+ \(1F1\), microbatch 1: its process has ended: killed, out of", first)
        assert float(took) < 15


def test_a_rank_that_hangs_ends_all_ranks_and_hears_of_it_when_it_wakes() -> None:
    for answer in run(fail, 4, "hang", 1, 3.0, agent=True):
        first, *_, took = answer.split(" | ")
        assert re.match(
            r"rank 1, instruction \d+ \(1F1\), microbatch 1: it lives, but has not come further for 3 s: stuck or slow; "
            r"allow more time with timeout_s= \(noticed by rank [023], instruction \d+ \([023]RECV_[FB]\d<\d\), "
            r"microbatch \d, peer stage \d\)",
            first,
        ), first
        assert float(took) < 3 + 10


def start(rank: int, ranks: int) -> str:
    connect(timeout_s=2)
    return "joined"


def test_a_missing_rank_is_named() -> None:
    answers = run(start, 3, 3, absent=(1,))
    assert answers[0] == (
        "RuntimeFault: rank 0 waited 2 s for rank 1 of 3, which did not start; "
        "look at what they printed, start all of them, or allow more time with timeout_s="
    )
    gives_up = "rank 2 waited 2 s for rank 1 of 3, which did not start"
    loses_rank_0 = "rank 2 lost the store while it waited for rank 1: the process that keeps it, rank 0"
    assert gives_up in answers[2] or loses_rank_0 in answers[2]


def test_a_missing_rank_0_is_named() -> None:
    answers = run(start, 2, 2, absent=(0,))
    assert "within 2 s: rank 0, which keeps the store, did not start; look at what it printed" in answers[1]


def test_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(
        RuntimeFault, match="the environment has no 'RANK'; start the program with torchrun, which sets it"
    ):
        connect()


def too_many(rank: int) -> str:
    connect(timeout_s=20)
    torch.distributed.barrier()
    return str(runtime_of(rank, "1f1b", 4))


def test_processes_and_ranks_that_differ() -> None:
    for answer in run(too_many, 2):
        assert "the program has 4 ranks, but 2 processes run; start it with torchrun --nproc-per-node 4" in answer
