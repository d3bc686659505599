"""nn.Transformer: torch's own encoder and decoder."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.harness import Case
from tests.zoo.inputs import VOCABULARY, tokens


class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.body = nn.Transformer(32, 4, 3, 3, dim_feedforward=64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.head(self.body(self.embed(source), self.embed(target), tgt_mask=mask, tgt_is_causal=True))


def family() -> Case:
    torch.manual_seed(0)
    return Translator(), {"source": tokens(10), "target": tokens(8)}, loss


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(batch["source"], batch["target"][:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), batch["target"][:, 1:].flatten())
