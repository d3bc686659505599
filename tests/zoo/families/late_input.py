"""A model one of whose inputs is first read in a late layer."""

import torch
from torch import Tensor, nn

from tests.zoo.harness import Case
from tests.zoo.inputs import SAMPLES


class Late(nn.Module):
    def __init__(self, width: int = 24, layers: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.condition = nn.Linear(7, width)

    def forward(self, x: Tensor, late: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        x = x + self.condition(late)
        return self.layers[-1](x).square().mean()


def family() -> Case:
    torch.manual_seed(0)
    return Late(), {"x": torch.randn(SAMPLES, 24), "late": torch.randn(SAMPLES, 7)}, None
