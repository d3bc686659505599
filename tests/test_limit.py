"""A limit of memory is kept by what the stages take, not by what their parts add up to."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipecompile
from pipecompile.calibration import Calibration
from pipecompile.errors import MemoryLimitError


class Wide(nn.Module):
    """A last layer whose scores, and their gradient, take far more for a moment than any part keeps."""

    def __init__(self) -> None:
        super().__init__()
        block = [nn.Linear(16, 128), nn.Tanh(), nn.Linear(128, 16)]
        self.layers = nn.Sequential(*(nn.Sequential(*copy.deepcopy(block)) for _ in range(6)))
        self.head = nn.Linear(16, 100)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x)).log_softmax(-1).square().mean()


def compiled(memory: int | None, **options: Any) -> pipecompile.Pipe:
    torch.manual_seed(0)
    batch = (torch.randn(256, 16),)
    settings: dict[str, Any] = {"stages": 3, "microbatches": 4, "costs": "estimate", "check": False} | options
    return pipecompile.compile(Wide(), batch, memory=memory, progress=False, **settings)


def test_what_the_error_names_is_enough() -> None:
    """So is a limit between that and what is taken without one, which another cut than the fastest meets."""
    free = compiled(None)
    most = max(free.forecast.peak_bytes)
    with pytest.raises(MemoryLimitError, match=r"bytes for each rank would do \(") as error:
        compiled(1000)
    needed = int(error.value.needed)
    assert needed < most
    for limit in (needed, (needed + most) // 2):
        pipe = compiled(limit)
        assert all(cost.uses for cost in pipe.plan.costs), "by what the stages take"
        assert max(pipe.forecast.peak_bytes) <= limit
        assert [stage.modules for stage in pipe.plan.stages] != [stage.modules for stage in free.plan.stages]
    rows = pipe.plan.largest_microbatch(limit)
    assert rows >= 64
    assert (
        max(pipe.plan.at(batch=rows).forecast.peak_bytes)
        <= limit
        < max(pipe.plan.at(batch=rows + 1).forecast.peak_bytes)
    )


def test_a_model_that_fits_is_not_refused_for_its_count() -> None:
    """The count has gradients of parameters all the time, which gpipe's forwards do not meet."""
    free = compiled(None, schedule="gpipe")
    most = max(free.forecast.peak_bytes)
    assert compiled(most, schedule="gpipe").plan.stages == free.plan.stages


def test_a_stricter_calibration_has_the_most_of_both() -> None:
    first, second = Calibration(1.1, (5, -3, 0)), Calibration(1.1, (4, 2, 0))
    assert second.stricter(first) == Calibration(1.1, (5, 2, 0))
