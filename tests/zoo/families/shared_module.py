"""One module is used first and last, so the first and the last stage both hold it."""

import torch
from torch import Tensor, nn

from tests.zoo.harness import Case
from tests.zoo.inputs import SAMPLES


class Shared(nn.Module):
    def __init__(self, width: int = 24, layers: int = 6) -> None:
        super().__init__()
        self.mix = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(x)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.mix(x).square().mean()


def family() -> Case:
    torch.manual_seed(0)
    return Shared(), {"x": torch.randn(SAMPLES, 24)}, None
