"""A small random GPT-2 that learns one batch of repeating tokens: ``pipecompile examples/gpt2.py --stages 4``."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

VOCABULARY = 256
SAMPLES, LENGTH = 8, 32


def model() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=64,
        n_layer=8,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    made = GPT2LMHeadModel(config)
    made.loss_type = "ForCausalLM"  # what transformers takes too, with a warning
    return made


def batch() -> dict[str, Tensor]:
    """Each sample counts upwards from its own start."""
    start = torch.arange(SAMPLES)[:, None] * 17
    tokens = (start + torch.arange(LENGTH)) % VOCABULARY
    return {"input_ids": tokens, "labels": tokens}


def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-3)
