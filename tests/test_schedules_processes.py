"""Real processes: every schedule on two ranks, 1F1B on four; what each rank holds has the unsplit model's loss, gradients
and buffers after two steps.

The default run has all schedules on GPT-2 and 1F1B and its interleaved form on T5 and UNet2D; ``make processes`` has all
schedules on all.
"""

from __future__ import annotations

import os

import pytest

from tests.runtime.processes import run
from tests.scheduled import FLUSHING, UPDATING, checked

SCHEDULES = (*FLUSHING, *UPDATING)
MODELS = ("gpt2", "t5", "unet2d")
FEW = () if os.environ.get("PIPECOMPILE_ALL_PROCESSES") else ("1f1b", "interleaved-1f1b")
TWO = [(name, schedule) for name in MODELS for schedule in SCHEDULES if name == "gpt2" or not FEW or schedule in FEW]
FOUR = [(name, "1f1b") for name in MODELS]
CASES = [*((2, *case) for case in TWO), *((4, *case) for case in FOUR)]


@pytest.fixture(scope="module")
def found() -> dict[int, list[dict[str, list[str]]]]:
    """What each rank has, by the number of ranks: processes are started once for all cases of that number."""
    return {ranks: run(checked, ranks, ranks, cases, timeout_s=240) for ranks, cases in ((2, TWO), (4, FOUR))}


@pytest.mark.parametrize(("ranks", "name", "schedule"), CASES)
def test_exact_on_every_rank(
    found: dict[int, list[dict[str, list[str]]]], ranks: int, name: str, schedule: str
) -> None:
    held: list[str] = []
    for rank, answer in enumerate(found[ranks]):
        assert isinstance(answer, dict), f"rank {rank}: {answer}"
        names = answer[f"{name} {schedule}"]
        assert not any(text.startswith("WRONG") for text in names), f"rank {rank}: {names}"
        held += names
    if name == "gpt2" and schedule == "1f1b":
        assert held.count("transformer.wte.weight") == 2, "tied: on the first rank and on the last"
