"""A U-Net as people write it: in-place ReLUs, skips kept in a list, concatenations."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.harness import Case
from tests.zoo.inputs import images


def block(given: int, made: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(given, made, 3, padding=1),
        nn.GroupNorm(4, made),
        nn.ReLU(inplace=True),
        nn.Conv2d(made, made, 3, padding=1),
        nn.ReLU(inplace=True),
    )


class UNet(nn.Module):
    def __init__(self, widths: tuple[int, ...] = (8, 16, 32)) -> None:
        super().__init__()
        self.down = nn.ModuleList(block(given, made) for given, made in zip((3, *widths), widths))
        self.up = nn.ModuleList(block(2 * w + (w if i else 0), w) for i, w in enumerate(widths[-2::-1], start=1))
        self.head = nn.Conv2d(widths[0], 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for layer in self.down:
            x = layer(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = F.interpolate(skips.pop(), scale_factor=1.0)
        for layer in self.up:
            x = layer(torch.cat([F.interpolate(x, scale_factor=2.0), skips.pop()], dim=1))
        return self.head(x)


def family() -> Case:
    torch.manual_seed(0)
    return UNet(), {"x": images(), "y": images()}, loss


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.mse_loss(model(batch["x"]), batch["y"])
