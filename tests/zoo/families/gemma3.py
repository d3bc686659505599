"""Gemma 3: layers of two kinds take turns, with a mask and rotary tables of their own; embeddings are tied."""

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from tests.zoo.harness import Case
from tests.zoo.inputs import VOCABULARY, language


def family() -> Case:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
        max_position_embeddings=32,
    )
    return Gemma3ForCausalLM(config), language(), None
