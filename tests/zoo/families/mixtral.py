"""Mixtral: a mixture of experts, whose router logits leave every layer for an auxiliary loss."""

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from tests.zoo.harness import Case
from tests.zoo.inputs import VOCABULARY, language


def family() -> Case:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=32,
        output_router_logits=True,
        router_aux_loss_coef=0.1,
    )
    return MixtralForCausalLM(config), language(), None
