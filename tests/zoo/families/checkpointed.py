"""Activation checkpointing in the parent's forward: each block is run through ``checkpoint``."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.zoo.harness import Case
from tests.zoo.inputs import SAMPLES


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return x + scale * self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Checkpointed(nn.Module):
    def __init__(self, width: int = 24, blocks: int = 6) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            x = checkpoint(block, x, self.scale, use_reentrant=index % 2 == 1)
        return ((x - y) ** 2).mean()


def family() -> Case:
    torch.manual_seed(0)
    return Checkpointed(), {"x": torch.randn(SAMPLES, 5, 24), "y": torch.randn(SAMPLES, 5, 24)}, None
