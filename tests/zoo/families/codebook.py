"""A VQ-VAE: a codebook in buffers that every forward moves, and a straight-through gradient around it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.harness import Case
from tests.zoo.inputs import SAMPLES


class Codebook(nn.Module):
    def __init__(self, size: int = 8, width: int = 4) -> None:
        super().__init__()
        self.register_buffer("entries", torch.randn(size, width))
        self.register_buffer("counts", torch.ones(size))
        self.register_buffer("sums", self.entries.clone())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        chosen = torch.cdist(x, self.entries).argmin(-1)
        nearest = self.entries[chosen]
        if self.training:
            with torch.no_grad():
                hot = F.one_hot(chosen, len(self.entries)).to(x.dtype)
                self.counts.lerp_(hot.sum(0), 0.1)
                self.sums.lerp_(hot.t() @ x, 0.1)
                self.entries.copy_(self.sums / self.counts[:, None])
        return x + (nearest - x).detach(), F.mse_loss(x, nearest)


class Quantised(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 4))
        self.codebook = Codebook()
        self.decoder = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 16))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        code, commitment = self.codebook(self.encoder(x))
        return self.decoder(code), commitment


def family() -> Case:
    torch.manual_seed(0)
    return Quantised(), {"x": torch.randn(SAMPLES, 16)}, loss


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    made, commitment = model(batch["x"])
    return F.mse_loss(made, batch["x"]) + 0.25 * commitment
