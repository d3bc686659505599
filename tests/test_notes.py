"""What the plan tells a user before training: each thing once, with what to do."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pipecompile
from pipecompile.cli import main
from tests.zoo.harness import compiled, families


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.head, self.dropout = nn.Linear(8, 1), nn.Dropout(dropout)

    def body(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.dropout(torch.tanh(layer(x)))
        return x

    def forward(self, x: Tensor) -> Any:
        return self.body(x).square().mean()


def notes(model: nn.Module, loss: Any = None, stages: int = 2) -> tuple[str, ...]:
    return compiled((model, {"x": torch.randn(8, 8)}, loss), stages, stages, "1f1b").plan.notes


def starting(found: tuple[str, ...], words: str) -> list[str]:
    return [note for note in found if note.startswith(words)]


def test_a_plain_model_has_none() -> None:
    assert notes(Net()) == ()


def test_a_contrastive_loss() -> None:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        z = F.normalize(model.body(batch["x"]), dim=-1)
        return F.cross_entropy(z @ z.T, torch.arange(len(z)))

    (note,) = starting(notes(Net(), loss), "the loss couples samples")
    assert "matmul in the model or loss itself" in note
    assert "use fewer and larger microbatches" in note


def test_batch_norm_only_while_it_trains() -> None:
    model, batch, loss = families()["batchnorm_cnn"]()
    words = "stem.1 and 5 more: BatchNorm normalises over the samples"
    assert len(starting(compiled((model, batch, loss), 2, 2, "1f1b").plan.notes, words)) == 1
    found = compiled((model.eval(), batch, loss), 2, 2, "1f1b").plan.notes
    assert not [note for note in found if "BatchNorm" in note]


def test_batch_norm_inside_of_an_opaque_module() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.BatchNorm1d(8)), nn.Linear(8, 1))
    pipe = pipecompile.compile(
        model,
        (torch.randn(8, 8),),
        stages=2,
        microbatches=2,
        costs="estimate",
        loss=lambda model, batch: model(*batch).square().mean(),
        opaque=("1",),
    )
    assert len(starting(pipe.plan.notes, "1.0: BatchNorm")) == 1


class WithHead(Net):
    def forward(self, x: Tensor) -> Any:
        x = self.body(x)
        return {"loss": x.square().mean(), "extra": self.head(x)}


class WithLoss(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.body(x)
        return {"loss": h.square().mean(), "auxiliary": h.abs().mean(), "hidden": h * 2}


class WithBoth(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.body(x)
        auxiliary = h.abs().mean()
        return {"loss": h.square().mean() + auxiliary, "auxiliary": auxiliary}


def test_an_output_whose_parameters_get_no_gradient() -> None:
    (note,) = notes(WithHead())
    assert note.startswith(
        'the model\'s output ["extra"] is not part of the loss: head.bias, head.weight get no gradient'
    )
    assert "add it in loss(model, batch), or freeze them" in note


def test_an_auxiliary_loss_that_is_left_out() -> None:
    (note,) = notes(WithLoss())
    assert note.startswith('the model\'s output ["auxiliary"] is not part of the loss and trains nothing; add it')
    assert notes(WithBoth()) == ()


def test_dropout() -> None:
    (note,) = notes(Net(dropout=0.1))
    assert note.startswith("random numbers (dropout) follow the seed, the step, the microbatch and the call")
    assert "pipe.reference" in note


def test_frozen_stages() -> None:
    model = Net()
    model.layers[:3].requires_grad_(False)
    (note,) = notes(model)
    assert note.startswith("stage 0 is frozen: none of its parameters requires a gradient; and nothing before it is")
    assert "its backward does nothing" in note
    model = Net()
    model.layers[1:].requires_grad_(False)
    (note,) = notes(model)
    assert note.startswith("stage 1 is frozen")
    assert "its backward only passes gradients on to earlier stages" in note


class Checkpointed(nn.Module):
    def __init__(self, recompute: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.recompute = recompute
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=False) if self.recompute else block(x))
        return x.square().mean()


def bytes_kept(pipe: pipecompile.Pipe, batch: Any) -> Counter[int]:
    """What each stage's forwards of a step store for their backwards, in bytes."""
    kept: Counter[int] = Counter()
    for index, stage in pipe.stages.items():
        forward = stage.forward

        def counting(*args: Any, index: int = index, forward: Any = forward) -> Any:
            def pack(tensor: Tensor) -> Tensor:
                kept[index] += 0 if isinstance(tensor, nn.Parameter) else tensor.nbytes
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                return forward(*args)

        stage.forward = counting
    pipe.step(batch)
    return kept


@pytest.mark.parametrize("stages", [2, 4])
def test_checkpointing_is_kept_and_keeps_fewer_bytes(stages: int) -> None:
    batch = {"x": torch.randn(8, 8)}
    kept = {}
    for recompute in (True, False):
        pipe = compiled((Checkpointed(recompute), batch, None), stages, stages, "1f1b")
        found = starting(pipe.plan.notes, "activation checkpointing is kept in blocks.0, blocks.1, blocks.2 and 1 more")
        assert len(found) == recompute
        kept[recompute] = bytes_kept(pipe, batch)
    for stage in range(stages):
        assert 100 * kept[True][stage] < kept[False][stage]


MODEL = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

def batch():
    return (torch.randn(8, 4),)

def loss(model, batch):
    z = model(*batch)
    return (z @ z.T).softmax(-1).square().mean()
"""


def test_the_command_line_prints_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file.py").write_text(MODEL)
    command = [str(tmp_path / "file.py"), "--stages", "2", "--costs", "estimate", "--out", str(tmp_path / "build")]
    assert main(command) == 0
    assert capsys.readouterr().out.count("note: the loss couples samples: matmul in the model or loss itself") == 1


def test_functional_batch_norm() -> None:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.batch_norm(model.body(batch["x"]), None, None, training=True).square().mean()

    (note,) = notes(Net(), loss)
    assert note.startswith("the loss: BatchNorm normalises over the samples")
