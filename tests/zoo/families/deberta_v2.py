"""DeBERTa-v2: attention by content and by relative position, whose one table all layers read."""

import torch
from transformers import DebertaV2Config, DebertaV2ForMaskedLM

from tests.zoo.harness import Case
from tests.zoo.inputs import VOCABULARY, language


def family() -> Case:
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return DebertaV2ForMaskedLM(config), language(), None
