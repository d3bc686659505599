"""T5: the encoder's result is read by every decoder layer; one embedding serves both halves and the head."""

import torch
from transformers import T5Config, T5ForConditionalGeneration

from tests.zoo.harness import Case
from tests.zoo.inputs import VOCABULARY, translation


def family() -> Case:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=3,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config), translation(), None
