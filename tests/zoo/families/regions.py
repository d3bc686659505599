"""A ``no_grad`` block and an ``autocast`` block around parts of a forward."""

import torch
from torch import Tensor, nn

from tests.zoo.harness import Case
from tests.zoo.inputs import SAMPLES


class Regions(nn.Module):
    def __init__(self, width: int = 24, layers: int = 6) -> None:
        super().__init__()
        self.teacher = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(layers))
        self.head = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.teacher(x) * 2
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for layer in self.layers[:3]:
                x = x + layer(x)
        for layer in self.layers[3:]:
            x = x + layer(x.float())
        return (self.head(x) - target).square().mean()


def family() -> Case:
    torch.manual_seed(0)
    return Regions(), {"x": torch.randn(SAMPLES, 24)}, None
