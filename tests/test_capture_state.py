"""What capture leaves behind, and what a loss function may return beside its loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipecompile.capture import capture
from pipecompile.errors import CaptureError

WEIGHT = torch.tensor(5.0)


class Counting(nn.Module):
    """Counts its calls in a plain attribute, and the rows in a buffer; fails in its second call if it is told to."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.linear, self.calls, self.fails = nn.Linear(4, 4), 0, fails
        self.register_buffer("rows", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.rows += len(x)
        if self.fails:
            raise ValueError("spilled")
        return self.linear(x)


def mean_and_metric(model: nn.Module, batch: Any) -> Any:
    return model(batch[0]).square().mean(), {"sum": batch[0].sum()}


def test_a_model_that_fails_is_left_as_it_was() -> None:
    model = Counting(fails=True)
    with pytest.raises(CaptureError, match=r"the model fails by itself.*spilled"):
        capture(model, (torch.randn(2, 4),), mean_and_metric)
    assert (model.calls, float(model.rows)) == (0, 0.0)


def test_a_counting_model_may_have_metrics() -> None:
    graph = capture(Counting(), (torch.randn(2, 4),), mean_and_metric)
    assert list(graph.reported) == ["sum"]
    assert any("attribute 'calls' another value" in note for note in graph.notes)


def test_a_weight_from_outside_is_refused() -> None:
    """It would be left out, and the loss would be a sum."""
    for weight in (WEIGHT, nn.Parameter(torch.ones(()))):
        with pytest.raises(CaptureError, match=r"'the weight'.* is no result of its computation; .*\.clone\(\)"):
            capture(nn.Linear(4, 4), (torch.randn(2, 4),), lambda m, b, w=weight: (m(b[0]).square().sum(), w))
    made = capture(nn.Linear(4, 4), (torch.randn(2, 4),), lambda m, b: (m(b[0]).square().sum(), WEIGHT.clone()))
    assert made.weight
