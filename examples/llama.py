"""A small random Llama that learns one batch of repeating tokens: ``pipecompile examples/llama.py --stages 4``."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 256
SAMPLES, LENGTH = 8, 32


def model() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
    )
    return LlamaForCausalLM(config)


def batch() -> dict[str, Tensor]:
    """Each sample counts upwards from its own start."""
    start = torch.arange(SAMPLES)[:, None] * 17
    tokens = (start + torch.arange(LENGTH)) % VOCABULARY
    return {"input_ids": tokens, "labels": tokens}


def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-3)
