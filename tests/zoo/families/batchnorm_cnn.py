"""A residual CNN with BatchNorm: every forward changes buffers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.harness import Case
from tests.zoo.inputs import classes, images


class CNN(nn.Module):
    def __init__(self, width: int = 16, blocks: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
            for _ in range(blocks)
        )
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean(dim=(2, 3)))


def family() -> Case:
    torch.manual_seed(0)
    return CNN(), {"images": images(), "labels": classes()}, loss


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["images"]), batch["labels"])
