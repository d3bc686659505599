"""Llama with tied embeddings and a padded attention mask."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.zoo.harness import Case
from tests.zoo.inputs import VOCABULARY, language


def family() -> Case:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )
    batch = language()
    mask = torch.ones_like(batch["input_ids"])
    mask[::2, -3:] = 0
    return LlamaForCausalLM(config), batch | {"attention_mask": mask}, None
