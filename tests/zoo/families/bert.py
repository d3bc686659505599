"""BERT, masked language modelling with a padded attention mask."""

import torch
from transformers import BertConfig, BertForMaskedLM

from tests.zoo.harness import Case
from tests.zoo.inputs import VOCABULARY, language


def family() -> Case:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    batch = language()
    mask = torch.ones_like(batch["input_ids"])
    mask[1::2, -4:] = 0
    batch["labels"][:, ::2] = -100
    return BertForMaskedLM(config), batch | {"attention_mask": mask}, None
