"""Llama 3.1 405B on the meta device, for planning: ``pipecompile examples/llama_405b.py --costs estimate --machine h100``.

pipecompile examples/llama_405b.py --stages 16 --ranks 8 --schedule interleaved-1f1b --costs estimate --machine h100
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

SEQUENCE = 8192
MICROBATCHES = 16


def model() -> nn.Module:
    config = LlamaConfig(
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=126,
        num_attention_heads=128,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=SEQUENCE,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        dtype="bfloat16",
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.bfloat16)


def batch() -> dict[str, Tensor]:
    tokens = torch.empty(MICROBATCHES, SEQUENCE, dtype=torch.int64, device="meta")
    return {"input_ids": tokens, "labels": tokens}
