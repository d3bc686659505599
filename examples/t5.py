"""A small random T5 that learns to copy backwards: its encoder's result skips to every decoder layer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

VOCABULARY = 256
SAMPLES, LENGTH = 8, 24


def model() -> nn.Module:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=4,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def batch() -> dict[str, Tensor]:
    """Tokens, and the same tokens backwards as labels."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, VOCABULARY, (SAMPLES, LENGTH), generator=generator)
    return {"input_ids": tokens, "labels": tokens.flip(1)}


def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-3)
