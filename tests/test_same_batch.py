"""A batch that each process draws for itself is refused on every rank."""

from __future__ import annotations

from typing import Any

import torch

from pipecompile.runtime import connect
from pipecompile.same_batch import check_same
from tests.runtime.processes import run

SAME: Any = (
    {"x": torch.arange(6.0).reshape(2, 3).T, "mask": None, "narrow": torch.ones(2, dtype=torch.bfloat16)},
    3,
    "text",
)


def check(rank: int, differs: bool) -> str:
    connect(timeout_s=30)
    batch = ({**SAME[0], "empty": torch.empty(0), "object": object()}, *SAME[1:])
    if differs and rank == 1:
        batch[0]["x"] = SAME[0]["x"].contiguous().add(1)
    check_same(batch)
    return "same"


def test_ranks_with_one_batch() -> None:
    assert run(check, 2, False) == ["same", "same"]


def test_ranks_with_batches_of_their_own() -> None:
    for answer in run(check, 2, True):
        assert "batch() gives other values in each process, but every rank must get the same batch" in str(answer)


def test_one_process_has_nothing_to_compare() -> None:
    check_same(SAME)
