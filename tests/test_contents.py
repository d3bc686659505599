"""Sizes that depend on what is in a tensor: masked losses and activations, CTC, in one stage and exact."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pipecompile
from pipecompile.capture import capture
from pipecompile.errors import CaptureError, PartitionError, VerificationError
from tests.zoo.harness import run

Batch = dict[str, Tensor]


class Rows(nn.Module):
    """The number of chosen rows goes into an operation."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x[x[:, 0, 0] > -9]
        return torch.cat([rows.reshape(rows.shape[0], -1), x.flatten(1)])[: x.shape[0]].reshape(x.shape)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))
        self.head, self.rows = nn.Linear(8, 6), Rows()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def masked(model: nn.Module, batch: Batch) -> Tensor:
    chosen = batch["labels"] != 0
    return F.cross_entropy(model(batch["x"])[chosen], batch["labels"][chosen])


def masked_in_the_middle(model: nn.Module, batch: Batch) -> Tensor:
    x, chosen = batch["x"], batch["labels"] != 0
    for layer in model.layers:
        x = torch.tanh(layer(x))
        x = x.masked_scatter(chosen[..., None].expand_as(x), model.layers[5](x[chosen]))
    return model.head(x).square().mean()


def ctc(model: nn.Module, batch: Batch) -> Tensor:
    scores = model(batch["x"]).log_softmax(-1).transpose(0, 1)
    target = batch["labels"][:, :3]
    lengths = torch.full((scores.shape[1],), len(scores))
    return F.ctc_loss(scores, target[target > 0], lengths, (target > 0).sum(-1), zero_infinity=True)


def batch() -> Batch:
    torch.manual_seed(0)
    return {"x": torch.randn(8, 12, 8), "labels": torch.randint(6, (8, 12))}


@pytest.mark.parametrize("loss", [masked, masked_in_the_middle, ctc])
def test_exact(loss: Callable[[nn.Module, Batch], Tensor]) -> None:
    row = run(loss.__name__, (Net(), batch(), loss), 4, 4, "1f1b")
    assert row.ok, row


def test_a_size_that_goes_into_an_operation_is_refused_and_the_remedy_helps() -> None:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return model(model.rows(batch["x"])).square().mean()

    with pytest.raises(CaptureError, match=rf"given a size that depends .*{__file__}.*rows = x.*opaque=\["):
        pipecompile.compile(Net(), batch(), stages=2, microbatches=2, costs="estimate", loss=loss)
    pipe = pipecompile.compile(Net(), batch(), stages=2, microbatches=2, costs="estimate", loss=loss, opaque=("rows",))
    assert pipe.step(batch()).isfinite()


class Explains(Net):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("the reason\nand a page that explains it")


def test_of_a_long_error_the_first_line_is_told() -> None:
    with pytest.raises(CaptureError, match=r"line \d+: raise .*: ValueError: the reason; make loss"):
        capture(Explains(), (torch.randn(2, 4, 8),))


class Dropping(Net):
    """Rows that a mask leaves out are never put back."""

    def forward(self, x: Tensor) -> Tensor:
        x = x[x[:, 0, 0] > -1]
        return super().forward(x)


class Zeroing(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.where((x[:, 0, 0] > -1)[:, None, None], x, 0))


def test_rows_that_are_dropped_for_good_are_told_by_line_and_the_remedy_helps() -> None:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["x"]).square().mean()

    with pytest.raises(
        PartitionError,
        match=rf"at most 1 are possible: the model itself .*size depends .*{__file__}, line \d+: x = x\[x.*torch.where",
    ):
        run("dropping", (Dropping(), batch(), loss), 4, 4, "1f1b")
    row = run("zeroing", (Zeroing(), batch(), loss), 4, 4, "1f1b")
    assert row.ok, row


class Scattered(nn.Module):
    """What a mask chooses is put back in place, so that its backward chooses again."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        found = x.clone()
        found[x.sum(-1) > 0] = self.inner(x[x.sum(-1) > 0])
        return found


def scattered(model: nn.Module, batch: Batch) -> Tensor:
    return model(model.rows(batch["x"])).square().mean()


def test_costs_of_a_masked_assignment_can_be_estimated() -> None:
    model = Net()
    model.rows = Scattered()
    pipe = pipecompile.compile(model, batch(), stages=3, microbatches=4, costs="estimate", loss=scattered)
    assert torch.allclose(pipe.step(batch()), pipe.reference(copy.deepcopy(model), batch()))


def test_a_loss_that_is_not_a_number_is_told_as_the_models_own() -> None:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["x"])[batch["labels"] > 9].mean()

    with pytest.raises(VerificationError, match="unsplit model's own loss of the first microbatch is nan"):
        pipecompile.compile(Net(), batch(), stages=2, microbatches=4, costs="estimate", loss=loss)
