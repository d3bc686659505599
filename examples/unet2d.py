"""A small random diffusion UNet with a loss function of its own: each way down is read again on the way up."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch import Tensor, nn

SAMPLES, SIZE, STEPS = 8, 16, 1000


def model() -> nn.Module:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )


def batch() -> dict[str, Tensor]:
    """Images of one colour each, with noise mixed in: the more, the later the timestep."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(SAMPLES, 3, 1, 1, generator=generator).expand(SAMPLES, 3, SIZE, SIZE) * 2 - 1
    noise = torch.randn(SAMPLES, 3, SIZE, SIZE, generator=generator)
    timestep = torch.arange(SAMPLES) * STEPS // SAMPLES
    share = (timestep / STEPS)[:, None, None, None]
    return {"noisy": (1 - share).sqrt() * image + share.sqrt() * noise, "timestep": timestep, "noise": noise}


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.mse_loss(model(batch["noisy"], batch["timestep"]).sample, batch["noise"])


def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=2e-3)
