"""Every schedule in two real processes: what each rank holds has the unsplit model's loss, gradients and buffers.

The default run has all schedules on GPT-2; ``make processes`` adds T5 and UNet2D.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.scheduled import FLUSHING, UPDATING
from tests.torchrun import torchrun

ROOT = Path(__file__).parent.parent
RANKS = 2
MODELS = ("gpt2", "t5", "unet2d") if os.environ.get("PIPECOMPILE_ALL_PROCESSES") else ("gpt2",)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What each rank found wrong, by model and schedule: one pair of processes runs them all."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun(RANKS, "tests.scheduled", str(folder), *MODELS)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("schedule", [*FLUSHING, *UPDATING])
@pytest.mark.parametrize("name", MODELS)
def test_exact_on_every_rank(found: list[dict[str, str]], name: str, schedule: str) -> None:
    for rank, wrong in enumerate(found):
        assert wrong[f"{name} {schedule}"] == "", f"rank {rank}"
