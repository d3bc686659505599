"""LSTMs in a row: each gives a tuple, and its last state starts the next."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.harness import Case
from tests.zoo.inputs import VOCABULARY, tokens


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.layers = nn.ModuleList(nn.LSTM(32, 32, batch_first=True) for _ in range(4))
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        hidden, state = self.embed(ids), None
        for layer in self.layers:
            hidden, state = layer(hidden, state)
        return self.head(hidden)


def family() -> Case:
    torch.manual_seed(0)
    return Recurrent(), (tokens(),), loss


def loss(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
    (ids,) = batch
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
