"""A spiking network: neurons fire by a custom autograd function, and keep a potential over the steps of time."""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.harness import Case
from tests.zoo.inputs import SAMPLES, classes


class Fire(torch.autograd.Function):
    """A step, with the gradient of a steep sigmoid."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient / (1 + 2 * x.abs()) ** 2


class Neurons(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.leak = nn.Parameter(torch.tensor(0.8))

    def forward(self, current: Tensor) -> Tensor:
        potential, spikes = torch.zeros_like(current[:, 0]), []
        for now in current.unbind(1):
            potential = self.leak * potential + now
            spikes.append(Fire.apply(potential - 0.5))
            potential = potential * (1 - spikes[-1])
        return torch.stack(spikes, 1)


class Spiking(nn.Module):
    def __init__(self, width: int = 24) -> None:
        super().__init__()
        sizes = (16, *([width] * 5))
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(given, made), Neurons()) for given, made in pairwise(sizes))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def family() -> Case:
    torch.manual_seed(0)
    return Spiking(), {"x": 2 * torch.randn(SAMPLES, 6, 16), "labels": classes()}, loss


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["labels"])
