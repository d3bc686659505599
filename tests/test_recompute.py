"""Recomputation: the same numbers to the last bit, fewer bytes kept, and a plan that says both."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pipecompile
from pipecompile.cli.compile import recompute_modes
from pipecompile.compare import buffers, gradients
from pipecompile.errors import MemoryLimitError, RuntimeFault, ScheduleError
from pipecompile.runtime import recompute
from tests.compiled import case, files
from tests.test_training import WIDTH, Tied, autocast_loss, compiled, cross_entropy, tokens, words

MIXED = {0: "stage", 1: "calls", 3: "stage"}


def assert_equal(model: nn.Module, unsplit: nn.Module) -> None:
    for kind in (gradients, buffers):
        expected = kind(unsplit)
        assert expected.keys() == kind(model).keys()
        for name, tensor in kind(model).items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7, msg=name)


def assert_step_is_exact(pipe: pipecompile.Pipe, model: nn.Module, batch: Any) -> None:
    unsplit = copy.deepcopy(model)
    for _ in range(2):  # buffers of the first step are read by the second
        assert torch.equal(pipe.step(batch), pipe.reference(unsplit, batch))
        assert_equal(model, unsplit)


@pytest.mark.parametrize(
    ("mode", "schedule"),
    [("stage", "1f1b"), ("stage", "zb-h1"), ("calls", "zb-h1"), ("calls", "interleaved-1f1b"), (MIXED, "1f1b")],
    ids=str,
)
def test_noise_and_batch_statistics_are_those_of_the_first_run(mode: Any, schedule: str) -> None:
    model = Tied(noisy=True)
    ranks = 2 if schedule == "interleaved-1f1b" else 4
    pipe = compiled(model, tokens, schedule=schedule, ranks=ranks, recompute=mode)
    assert {plan.recompute for plan in pipe.plan.stages} - {"none"}
    assert_step_is_exact(pipe, model, words())


@pytest.mark.parametrize(("mode", "schedule"), [("stage", "zb-h1"), ("calls", "1f1b")])
def test_autocast_is_that_of_the_first_run(mode: str, schedule: str) -> None:
    model = Tied(noisy=True)
    pipe = compiled(model, autocast_loss, schedule=schedule, recompute=mode)
    assert_step_is_exact(pipe, model, words())


@pytest.mark.parametrize(("name", "mode"), [("gpt2", "stage"), ("llama", "calls")])
def test_models(name: str, mode: str) -> None:
    model, batch, loss = case(name)
    pipe = pipecompile.Pipe(files(name, 4, 4, 4, recompute=(mode,) * 4), model, loss)
    marks = {"stage": "@recomputed", "calls": "= recompute(self."}
    assert sum(marks[mode] in pipe.source(s) for s in range(4)) >= 2, pipe.source(0)
    assert_step_is_exact(pipe, model, batch)


class Counted(nn.Module):
    """Scales by how often it was called: a buffer that decides about the result."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.in_place = in_place
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.inner(x).sigmoid() * (self.calls + 0)
        if self.in_place:
            h += x
        return h.exp().tanh()


@pytest.mark.parametrize("mode", ["stage", "calls"])
def test_buffers_and_changes_in_place(mode: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Counted(index % 2 == 0) for index in range(4)))
    batch = torch.randn(8, WIDTH)
    pipe = compiled(model, lambda model, x: model(x).square().mean(), batch, recompute=mode)
    assert_step_is_exact(pipe, model, batch)
    assert model[0].calls == 8, "once for each microbatch of two steps"


class Live(TorchDispatchMode):
    """The most bytes that the storages made by operations hold at once."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.live = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and id(storage) not in self.known and storage._cdata not in before:
                self.known.add(id(storage))
                self.live += storage.nbytes()
                weakref.finalize(storage, self.forget, id(storage), storage.nbytes())
        self.most = max(self.most, self.live)
        return result

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def deep(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def wide_model() -> tuple[nn.Module, Tensor]:
    """Blocks that save far more than they are given."""
    torch.manual_seed(0)
    block = [nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)]
    return nn.Sequential(*(nn.Sequential(*copy.deepcopy(block)) for _ in range(8))), torch.randn(512, 8)


def test_fewer_bytes_are_kept_and_forecast() -> None:
    held, forecast, time = {}, {}, {}
    for mode in ("none", "calls", "stage"):
        model, batch = wide_model()
        pipe = compiled(model, deep, batch, schedule="gpipe", recompute=mode)
        pipe.step(batch)
        for p in model.parameters():
            p.grad = None
        with Live() as live:
            pipe.step(batch, ran=[])  # watched, so in the order of the schedule: all microbatches are alive at once
        held[mode], forecast[mode], time[mode] = live.most, max(pipe.forecast.peak_bytes), pipe.forecast.step_ms
    assert held["stage"] < held["none"] / 2
    assert held["calls"] < held["none"] / 2
    always = 4 * max(cost.parameter_bytes for cost in pipe.plan.costs)  # weights, gradients, two moments
    assert forecast["stage"] - always < (forecast["none"] - always) / 2
    assert forecast["calls"] - always < (forecast["none"] - always) / 2
    assert time["stage"] > 1.2 * time["none"], "the forward runs twice"


def test_the_split_backward_still_defers_what_is_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipecompile.runtime import executor, split_backward

    monkeypatch.setattr(split_backward, "WORTH", 1)
    waited: list[int] = []
    monkeypatch.setattr(executor, "weight_half", lambda rest: (waited.append(len(rest)), real(rest))[1])
    from pipecompile.runtime.split_backward import weight_half as real

    model, batch = wide_model()
    pipe = compiled(model, deep, batch, schedule="zb-h1", recompute="stage")
    pipe.step(batch)
    assert all(waited), "each stage has matrix products whose weights wait"


def test_a_plan_says_what_is_recomputed() -> None:
    model = Tied()
    pipe = compiled(model, recompute=MIXED)
    text = str(pipe.plan)
    assert "recomputed before the backward: all of stages 0, 3" in text
    assert "recomputed before the backward: the large module calls of stage 1" in text
    assert [plan["recompute"] for plan in pipe.plan.to_json()["stages"]] == ["stage", "calls", "none", "stage"]
    assert pipecompile.api.Pipe(pipe._files, model, cross_entropy).plan == pipe.plan


def test_without_room_the_error_says_what_recomputation_gives() -> None:
    model, batch = wide_model()
    peaks = {
        m: compiled(model, deep, batch, schedule="gpipe", recompute=m).forecast.peak_bytes for m in ("none", "stage")
    }
    room = (max(peaks["none"]) + max(peaks["stage"])) // 2
    with pytest.raises(
        MemoryLimitError, match=r"would hold .* with --recompute calls, .* with --recompute stage, which fits"
    ):
        compiled(model, deep, batch, schedule="gpipe", memory=room)
    pipe = compiled(model, deep, batch, schedule="gpipe", memory=room, recompute="stage")
    assert max(pipe.forecast.peak_bytes) <= room


@pytest.mark.parametrize("mode", ["calls", {0: "stage"}], ids=str)
def test_stages_are_cut_for_what_they_recompute(mode: Any) -> None:
    """The last stage, which keeps everything, must be small; calls fit in a limit in which nothing fits without them."""
    model, batch = wide_model()
    options: dict[str, Any] = {"stages": 2, "schedule": "gpipe", "recompute": mode}
    quick = compiled(model, deep, batch, **options)
    room = int(0.75 * max(quick.forecast.peak_bytes))
    if mode == "calls":
        with pytest.raises(MemoryLimitError):
            compiled(model, deep, batch, **{**options, "memory": room, "recompute": "none"})
        room = int(max(quick.forecast.peak_bytes))
    pipe = compiled(model, deep, batch, memory=room, **options)
    assert max(pipe.forecast.peak_bytes) <= room
    assert_step_is_exact(pipe, model, batch)


def test_a_plan_says_that_calls_are_not_split() -> None:
    model, batch = wide_model()
    pipe = compiled(model, deep, batch, schedule="zb-h1", recompute={1: "calls", 2: "stage"})
    assert "stage 1, whose weight gradients are made in the first half of the backward" in str(pipe.plan)
    weight_ms = [cost.weight_ms for cost in pipe.plan.costs]
    assert 2 * weight_ms[1] < min(weight_ms[0], *weight_ms[2:]), "what the recomputed call would add waits for nothing"


def test_bad_choices() -> None:
    with pytest.raises(ScheduleError, match="recompute is 'all' for stage 0, expected one of none, calls, stage"):
        compiled(Tied(), recompute="all")
    with pytest.raises(ScheduleError, match="recompute names stage 9, but stages go from 0 to 3"):
        compiled(Tied(), recompute={9: "stage"})
    assert recompute_modes("0=stage,2=calls") == {0: "stage", 2: "calls"}
    assert recompute_modes("stage") == "stage"


def test_what_cannot_be_computed_again_is_refused() -> None:
    layer = nn.Linear(2, 2)
    x = torch.randn(3, 2)
    made = recompute(layer, x)
    x.mul_(2)
    with pytest.raises(RuntimeFault, match="what Linear was given has been changed in place since"):
        made.sum().backward()

    class Fickle(nn.Module):
        again = False

        def forward(self, x: Tensor) -> Tensor:
            again, self.again = self.again, True
            return x.exp() if again else x.exp().tanh()

    made = recompute(Fickle(), torch.randn(3, requires_grad=True))
    with pytest.raises(RuntimeFault, match="Fickle saved other tensors when it was computed again"):
        made.sum().backward()


def test_without_gradients_nothing_is_noted() -> None:
    layer = nn.BatchNorm1d(2)
    with torch.no_grad():
        assert recompute(layer, torch.randn(3, 2)).grad_fn is None
    assert layer.num_batches_tracked == 1
