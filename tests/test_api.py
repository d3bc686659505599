"""What a user calls in Python: compile, step, load, save, the decorator; batches and losses of every form."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pipecompile
from pipecompile.compare import gradients
from pipecompile.errors import BuildError, ProgramError, VerificationError


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(6, 6), nn.Tanh())]
    return nn.Sequential(*layers)


def mean_square(model: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(model(batch["x"]), batch["y"])


def pairs() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"x": torch.randn(8, 6), "y": torch.randn(8, 6)}


def assert_equal_step(pipe: pipecompile.Pipe, model: nn.Module, batch: Any) -> None:
    unsplit = copy.deepcopy(model)
    model.zero_grad()
    loss = pipe.step(batch)
    assert torch.equal(loss, pipe.reference(unsplit, batch))
    expected = gradients(unsplit)
    assert expected
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-8)


class Scalar(nn.Module):
    """Returns its loss; ``form`` says as what."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.net, self.form = net(), form

    def forward(self, x: Tensor, y: Tensor) -> Any:
        loss = F.mse_loss(self.net(x), y)
        return {"loss": loss, "other": x} if self.form == "dict" else loss


def test_a_dict_is_keywords_and_a_tuple_positions() -> None:
    batch = pairs()
    for given in (batch, tuple(batch.values()), list(batch.values())):
        model = Scalar("scalar")
        assert_equal_step(pipecompile.compile(model, given, stages=3, microbatches=4, costs="estimate"), model, given)


def test_a_loss_in_a_dict_is_found() -> None:
    model, batch = Scalar("dict"), pairs()
    assert_equal_step(pipecompile.compile(model, batch, stages=2, microbatches=2, costs="estimate"), model, batch)


def test_a_tensor_alone_is_a_batch() -> None:
    model, batch = net(), torch.randn(8, 6)
    pipe = pipecompile.compile(
        model, batch, stages=2, microbatches=2, costs="estimate", loss=lambda model, x: model(x).square().mean()
    )
    assert_equal_step(pipe, model, batch)


def test_a_sum_and_a_weight_give_the_mean_over_tokens() -> None:
    def loss(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        kept = batch["kept"].unsqueeze(1)
        return ((model(batch["x"]) - batch["y"]).square() * kept).sum(), kept.sum()

    model = net()
    batch = pairs() | {"kept": torch.tensor([1.0, 1, 1, 1, 1, 0, 0, 0])}
    pipe = pipecompile.compile(model, batch, stages=4, microbatches=4, costs="estimate", loss=loss)
    unsplit = copy.deepcopy(model)
    total, weight = loss(unsplit, batch)
    (total / weight).backward()
    value = pipe.step(batch)
    torch.testing.assert_close(value, (total / weight).detach())
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, gradients(unsplit)[name], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(pipe.reference(copy.deepcopy(model), batch), value)


def test_what_a_pipe_tells(tmp_path: Path) -> None:
    model, batch = net(), pairs()
    pipe = pipecompile.compile(model, batch, stages=4, microbatches=8, loss=mean_square, costs="estimate")
    assert len(pipe.plan.stages) == 4
    assert pipe.plan.microbatches == 8
    assert pipe.forecast.step_ms > 0
    assert len(pipe.forecast.bubble) == 4
    assert str(pipe.program).startswith("0F0 0SEND_F0>1")
    assert "class Stage2(Stage):" in pipe.source(2)
    keys = [key for index in range(4) for key in pipe.stage(index).state_dict()]
    assert sorted(keys) == sorted(model.state_dict())
    assert {id(p) for p in pipe.parameters()} == {id(p) for p in model.parameters()}
    with pytest.raises(BuildError, match="there is no stage 4; stages go from 0 to 3"):
        pipe.source(4)


def test_a_saved_build_trains_like_the_pipe_it_was_saved_from(tmp_path: Path) -> None:
    model, batch = net(), pairs()
    pipe = pipecompile.compile(model, batch, stages=2, microbatches=4, loss=mean_square, costs="estimate")
    pipe.save(tmp_path / "build")
    other = copy.deepcopy(model)
    loaded = pipecompile.load(tmp_path / "build", other, mean_square)
    assert torch.equal(loaded.step(batch), pipe.step(batch))
    assert all(torch.equal(gradients(other)[name], gradient) for name, gradient in gradients(model).items())
    assert loaded.plan == pipe.plan
    assert loaded.program == pipe.program


def test_the_decorator_compiles_once_for_each_model() -> None:
    calls = []

    @pipecompile.pipeline(stages=2, microbatches=4, costs="estimate")
    def loss(model: nn.Module, batch: Any) -> Tensor:
        calls.append(None)
        return mean_square(model, batch)

    model, other, batch = net(), net(), pairs()
    with pytest.raises(VerificationError, match="has not been compiled yet; call the loss function with it first"):
        loss.pipeline(model)
    first = loss(model, batch)
    count = len(calls)
    torch.testing.assert_close(loss(model, batch), first)
    assert len(calls) == count, "a compiled step does not call the loss function again"
    loss(other, batch)
    assert loss.pipeline(model) is not loss.pipeline(other)
    assert loss.pipeline(model).plan.microbatches == 4


def test_gradients_add_up_over_steps_and_optimizers_work() -> None:
    model, batch = net(), pairs()
    pipe = pipecompile.compile(model, batch, stages=4, microbatches=2, loss=mean_square, costs="estimate")
    optimizer = torch.optim.SGD(pipe.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        losses.append(float(pipe.step(batch)))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    pipe.step(batch)
    once = gradients(model)
    pipe.step(batch)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, 2 * once[name])


def test_compiling_leaves_model_gradients_and_random_state_as_they_were() -> None:
    model, batch = nn.Sequential(net(), nn.BatchNorm1d(6), nn.Dropout(0.1)), pairs()
    mean_square(model, batch).backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grads, state = gradients(model), torch.get_rng_state()
    pipecompile.compile(model, batch, stages=2, microbatches=2, loss=mean_square, costs="measure")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(grads[name], gradient) for name, gradient in gradients(model).items())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_loaded_program_is_proved_before_it_runs(tmp_path: Path) -> None:
    model, batch = net(), pairs()
    pipe = pipecompile.compile(model, batch, stages=2, microbatches=4, loss=mean_square, costs="estimate")
    pipe.save(tmp_path / "build")
    file = tmp_path / "build/program.json"
    program = json.loads(file.read_text())
    gone = program["programs"][1].pop(0)
    assert gone["op"] == "RECV_F"
    file.write_text(json.dumps(program))
    with pytest.raises(ProgramError, match=r"1F0|SEND_F0"):
        pipecompile.load(tmp_path / "build", model, trust=True)
