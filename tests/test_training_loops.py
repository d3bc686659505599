"""What else a training loop does between steps, at four stages beside the same loop on the unsplit model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipecompile.errors import BuildError, RuntimeFault
from tests.test_step_options import accumulate, uneven
from tests.test_training import MICROBATCHES, WIDTH, Tied, assert_same_gradients, compiled, cross_entropy, tokens, words


def both(
    model: nn.Module, loss: Any = cross_entropy, **options: Any
) -> list[tuple[list[Any], Callable[[Any], Tensor]]]:
    """The pipeline and the unsplit model: their parameters by name, and what makes the gradients of a batch."""
    unsplit = copy.deepcopy(model)
    pipe = compiled(model, loss, **options)
    return [
        (pipe.named_parameters(), pipe.step),
        (list(unsplit.named_parameters()), lambda batch: accumulate(unsplit, batch, loss)),
    ]


def assert_close(one: list[Any], other: list[Any]) -> None:
    expected = dict(other)
    assert dict(one).keys() == expected.keys()
    for name, p in one:
        torch.testing.assert_close(p, expected[name], rtol=1e-5, atol=1e-6, msg=name)
        if p.grad is not None or expected[name].grad is not None:
            torch.testing.assert_close(p.grad, expected[name].grad, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize(("loss", "schedule"), [(cross_entropy, "zb-h1"), (tokens, "1f1b")])
@pytest.mark.parametrize("to_none", [True, False])
def test_optimizers_by_name_over_uneven_batches(loss: Any, schedule: str, to_none: bool) -> None:
    """Two optimizers, groups by name, decay of a tied table, rates that change, batches of which the last is short."""
    sides = both(Tied(), loss, schedule=schedule)
    loops = []
    for named, step in sides:
        inner = [p for name, p in named if name.startswith("blocks")]
        groups = [
            {"params": [p for name, p in named if name == "table.weight"], "weight_decay": 0.3},
            {"params": [p for name, p in named if name not in ("table.weight",) and not name.startswith("blocks")]},
        ]
        optimizers = [
            torch.optim.SGD(inner, lr=0.2, momentum=0.9),
            torch.optim.AdamW([group for group in groups if group["params"]], lr=0.01),
        ]
        rates = [
            torch.optim.lr_scheduler.ReduceLROnPlateau(optimizers[0], patience=0),
            torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizers[1], T_0=2),
        ]
        loops.append((step, optimizers, rates))
    for number in range(3):
        for step, optimizers, rates in loops:
            value = sum(step(uneven(rows + number)) for rows in (10, 8, 5))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=to_none)
            rates[0].step(value)
            rates[1].step()
        assert_close(sides[0][0], sides[1][0])
        assert all((p.grad is None) == to_none for _, p in sides[0][0])


def test_a_norm_that_is_not_finite() -> None:
    model = Tied()
    pipe = compiled(model)
    pipe.step(words())
    model.blocks[1][0].weight.grad[0, 0] = float("inf")
    unsplit = copy.deepcopy(model)
    for p, theirs in zip(model.parameters(), unsplit.parameters()):
        theirs.grad = p.grad.clone()
    with pytest.raises(RuntimeFault, match=r"the norm of order 2.0 of the gradients is inf, so they cannot be clipped"):
        pipe.clip_grad_norm_(1.0, error_if_nonfinite=True)
    assert_same_gradients(model, unsplit)
    pipe.clip_grad_norm_(1.0)
    torch.nn.utils.clip_grad_norm_(unsplit.parameters(), 1.0)
    for p, theirs in zip(model.parameters(), unsplit.parameters()):
        assert torch.equal(p.grad.nan_to_num(7.0), theirs.grad.nan_to_num(7.0))


class Experts(nn.Module):
    """Of its layers it runs those that the words name."""

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)] + [shared])

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        chosen = words % len(self.layers)
        rows = [self.layers[int(one)](row[None]) for one, row in zip(chosen, x)]
        return torch.cat(rows)


class Routed(nn.Module):
    """Four times some of three layers, and of a fourth that all have."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(11, WIDTH)
        shared = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Experts(shared) for _ in range(4))
        self.head = nn.Linear(WIDTH, 11)

    def forward(self, words: Tensor) -> Tensor:
        hidden = self.table(words)
        for block in self.blocks:
            hidden = hidden + block(hidden, words)
        return self.head(hidden)


def words_of(*chosen: int) -> dict[str, Tensor]:
    return {"words": torch.tensor([chosen[i % len(chosen)] for i in range(8)]), "next": torch.arange(8)}


def assert_none_stays_none(**options: Any) -> None:
    model = Routed()
    unsplit = copy.deepcopy(model)
    pipe = compiled(model, cross_entropy, words_of(0, 1, 2, 3), opaque=("blocks.*",), **options)
    for batch in (words_of(1), words_of(1, 2), words_of(0, 3)):
        pipe.step(batch)
        accumulate(unsplit, batch, cross_entropy)
        for name, p in pipe.named_parameters():
            theirs = unsplit.get_parameter(name).grad
            assert (p.grad is None) == (theirs is None), name
            if theirs is not None:
                torch.testing.assert_close(p.grad, theirs, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("options", [{}, {"schedule": "zb-h1"}, {"recompute": "calls"}], ids=str)
def test_a_parameter_without_a_gradient_has_none(options: dict[str, Any]) -> None:
    assert_none_stays_none(**options)


def assert_updates_meet_none(**options: Any) -> None:
    """A layer that several stages share, and that no word of the batch names, is not touched by the optimizer."""
    pipe = compiled(
        Routed(), cross_entropy, words_of(0, 1, 2, 3), opaque=("blocks.*",), schedule="pipedream", **options
    )
    shared = [p for name, p in pipe.named_parameters() if "layers.3" in name]
    optimizer = torch.optim.SGD(pipe.parameters(), lr=0.1, weight_decay=0.1)
    met: list[bool] = []
    optimizer.register_step_pre_hook(lambda *_: met.extend(p.grad is not None for p in shared))
    for chosen, expected in ((1, False), (3, True)):
        met.clear()
        pipe.step(words_of(chosen), optimizer)
        assert met.count(True) == expected * MICROBATCHES * len(shared)


def test_an_update_without_a_gradient_changes_nothing() -> None:
    assert_updates_meet_none()


def ranks_leave_none() -> None:
    assert_none_stays_none(schedule="interleaved-1f1b", ranks=2)
    assert_updates_meet_none(stages=2)


def test_layers_that_are_frozen_later() -> None:
    sides = both(Tied())
    for part in ("blocks.0", "blocks.3", "table"):
        for named, step in sides:
            for name, p in named:
                if name.startswith(part):
                    p.requires_grad_(False)
                p.grad = None
            step(words())
        assert_close(sides[0][0], sides[1][0])


def test_layers_that_are_trained_later_are_named() -> None:
    model = Tied()
    model.blocks[:2].requires_grad_(False)
    model.table.requires_grad_(False)
    pipe = compiled(model)
    pipe.step(words())
    model.blocks[1].requires_grad_(True)
    with pytest.raises(BuildError, match=r"parameter 'blocks.1.0.weight' was frozen .* compile again"):
        pipe.step(words())
    model.blocks[1].requires_grad_(False)
    pipe.step(words())


@pytest.mark.parametrize("way", ["blocks.1", "blocks"])
def test_parts_of_the_model_that_were_replaced_are_named(way: str) -> None:
    model = Tied()
    pipe = compiled(model)
    model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()})
    assert torch.equal(pipe.evaluate(words()), pipe.reference(copy.deepcopy(model), words()))
    before = model.get_submodule(way)
    model.set_submodule(way, copy.deepcopy(before))
    for run in (pipe.step, pipe.evaluate):
        with pytest.raises(
            BuildError, match=rf"'{way}' of the model was replaced after it was compiled, .* compile again"
        ):
            run(words())
    model.set_submodule(way, before)
    pipe.step(words())


def test_autocast_around_everything() -> None:
    model = Tied()
    unsplit = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        pipe = compiled(model)
        value = pipe.step(words())
        expected = accumulate(unsplit, words(), cross_entropy)
    torch.testing.assert_close(value, expected)
    for name, p in pipe.named_parameters():
        torch.testing.assert_close(p.grad, unsplit.get_parameter(name).grad, rtol=2e-2, atol=1e-3, msg=name)


def test_autocast_around_the_step_alone_is_named() -> None:
    pipe = compiled(Tied())
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(RuntimeFault, match="autocast is on around the step: put it into the loss"),
    ):
        pipe.step(words())


def test_gradients_that_were_there_before() -> None:
    sides = both(Tied(), tokens)
    for named, step in sides:
        for _, p in named:
            p.grad = torch.full_like(p, 0.5)
        step(words())
    assert_close(sides[0][0], sides[1][0])
