"""A model that returns a dict, with an auxiliary loss made in an early layer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.harness import Case
from tests.zoo.inputs import SAMPLES


class Auxiliary(nn.Module):
    def __init__(self, width: int = 24, layers: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.probe = nn.Linear(width, 1)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        auxiliary = x.new_zeros(())
        for index, layer in enumerate(self.layers):
            x = torch.tanh(layer(x))
            if index == 1:
                auxiliary = self.probe(x).pow(2).mean()
        logits = self.head(x)
        return {"logits": logits, "auxiliary": auxiliary, "loss": F.cross_entropy(logits, y) + 0.1 * auxiliary}


def family() -> Case:
    torch.manual_seed(0)
    return Auxiliary(), {"x": torch.randn(SAMPLES, 24), "y": torch.randint(4, (SAMPLES,))}, None
