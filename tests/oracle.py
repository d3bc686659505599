"""The oracle of everything: gradient accumulation on the unsplit model, written apart from the code under test."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipecompile import Pipe
from pipecompile.compare import Tensors, buffers, differences, gradients
from tests.models import MODELS, Loss

SUMMED = 1e-6
"""The relative difference that a gradient may show where several stages' parts of it are summed."""


@dataclass(frozen=True)
class Outcome:
    """What one training step leaves behind."""

    loss: Tensor
    gradients: Tensors
    buffers: Tensors

    @staticmethod
    def of(model: nn.Module, loss: Tensor) -> Outcome:
        return Outcome(loss.detach().clone(), gradients(model), buffers(model))

    def only(self, names: set[str]) -> Outcome:
        """Of what has one of these names."""
        kept = [
            {name: tensor for name, tensor in all.items() if name in names} for all in (self.gradients, self.buffers)
        ]
        return Outcome(self.loss, *kept)


def parts(batch: Any, count: int) -> list[Any]:
    """A dict or tuple of tensors cut along dimension 0."""
    if isinstance(batch, dict):
        rows = zip(*(tensor.chunk(count) for tensor in batch.values()))
        return [dict(zip(batch, row)) for row in rows]
    return list(zip(*(tensor.chunk(count) for tensor in batch)))


def accumulate(model: nn.Module, batch: Any, loss: Loss | None, microbatches: int) -> Outcome:
    """The mean loss of the microbatches and its gradients on the unsplit model."""
    total = torch.zeros(())
    for part in parts(batch, microbatches):
        value = (loss(model, part) if loss else model(**part).loss) / microbatches
        value.backward()
        total = total + value.detach()
    return Outcome.of(model, total)


@functools.cache
def unsplit(name: str, microbatches: int) -> Outcome:
    """The first step of one of the six models."""
    model, batch, loss = MODELS[name]()
    for module in model.modules():
        if hasattr(module, "config"):
            module.config.use_cache = False  # compile does the same, and the plan says so
    return accumulate(model, batch, loss, microbatches)


def summed_over_stages(pipe: Pipe) -> set[str]:
    """Parameters whose gradient several stages' parts make up: shared ones, and those at or before the maker of a value
    that several stages read. Their parts may be added in another order than the unsplit model's."""
    plans = pipe.plan.stages
    found = {fqn for plan in plans for names in plan.shared.items() for fqn in names}
    forks = {
        plan.index for plan in plans for port in plan.outputs if port.spec.gradient and _readers(pipe, plan, port) > 1
    }
    while True:
        before = {port.source for s in forks for port in plans[s].inputs if port.spec.gradient}
        if before <= forks:
            break
        forks |= before
    return found | {fqn for s in forks for fqn in pipe.plan.holds[s]}


def _readers(pipe: Pipe, plan: Any, port: Any) -> int:
    """The stages that read an output, its own included."""
    lines = pipe.source(plan.index).partition("class ")[2].splitlines()
    uses = [line for line in lines if port.name in line and not line.strip().startswith((f"{port.name} = ", "return"))]
    return len(port.targets) + bool(uses)


def assert_same(pipe: Pipe, got: Outcome, expected: Outcome) -> None:
    """Loss and buffers bit-equal; gradients too, but for those that several stages' parts make up."""
    assert torch.equal(got.loss, expected.loss), f"loss {got.loss} instead of {expected.loss}"
    loose = summed_over_stages(pipe)
    names = {difference.name: difference for difference in differences(got.gradients, expected.gradients, "gradient")}
    assert len(names) == len(expected.gradients)
    for name, difference in names.items():
        allowed = SUMMED if name.removeprefix("gradient ") in loose else 0.0
        assert difference.error <= allowed, f"{name} differs by {difference.error:.1e}, allowed {allowed:.0e}"
    assert got.buffers.keys() == expected.buffers.keys()
    for name, buffer in expected.buffers.items():
        assert torch.equal(got.buffers[name], buffer), f"buffer {name} differs"
