"""ALBERT: one layer, called many times."""

import torch
from transformers import AlbertConfig, AlbertForMaskedLM

from tests.zoo.harness import Case
from tests.zoo.inputs import VOCABULARY, language


def family() -> Case:
    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=VOCABULARY,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        classifier_dropout_prob=0.0,
    )
    return AlbertForMaskedLM(config), language(), None
