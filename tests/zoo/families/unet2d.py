"""UNet2D: every block of the way down is read again on the way up."""

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch import Tensor, nn

from tests.zoo.harness import Case
from tests.zoo.inputs import SAMPLES, images


def family() -> Case:
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    batch = {"sample": images(), "timestep": torch.randint(1000, (SAMPLES,)), "noise": images()}
    return model, batch, loss


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.mse_loss(model(batch["sample"], batch["timestep"]).sample, batch["noise"])
