"""A variational autoencoder: torch.distributions checks its arguments, and samples by reparametrisation."""

import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from tests.zoo.harness import Case
from tests.zoo.inputs import SAMPLES


class Autoencoder(nn.Module):
    def __init__(self, width: int = 32, code: int = 4) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, width), nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.mean, self.spread = nn.Linear(width, code), nn.Linear(width, code)
        self.decoder = nn.Sequential(nn.Linear(code, width), nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.head = nn.Linear(width, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.encoder(x)
        code = Normal(self.mean(hidden), nn.functional.softplus(self.spread(hidden)))
        return self.head(self.decoder(code.rsample())), kl_divergence(code, Normal(0.0, 1.0))


def family() -> Case:
    torch.manual_seed(0)
    return Autoencoder(), {"x": torch.randn(SAMPLES, 16)}, loss


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    made, distance = model(batch["x"])
    return distance.sum(-1).mean() - Normal(made, 1.0).log_prob(batch["x"]).mean()
