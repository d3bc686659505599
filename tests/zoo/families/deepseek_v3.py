"""DeepSeek-V3: latent attention, dense layers first, then routed and shared experts."""

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from tests.zoo.harness import Case
from tests.zoo.inputs import VOCABULARY, language


def family() -> Case:
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_shared_experts=1,
        n_routed_experts=8,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        max_position_embeddings=32,
    )
    return DeepseekV3ForCausalLM(config), language(), None
