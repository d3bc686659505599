"""ModernBERT: global and local attention take turns."""

import torch
from transformers import ModernBertConfig, ModernBertForMaskedLM

from tests.zoo.harness import Case
from tests.zoo.inputs import VOCABULARY, language


def family() -> Case:
    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=32,
        global_attn_every_n_layers=2,
        local_attention=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    )
    return ModernBertForMaskedLM(config), language(), None
