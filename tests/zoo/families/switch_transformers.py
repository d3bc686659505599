"""Switch Transformers: every other layer routes tokens to experts, whose shares depend on what is in them; left whole."""

import torch
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from tests.zoo.harness import Case
from tests.zoo.inputs import VOCABULARY, translation

OPAQUE = ("*.mlp.router", "*.mlp.experts")


def family() -> Case:
    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_sparse_encoder_layers=1,
        num_decoder_layers=2,
        num_sparse_decoder_layers=1,
        num_heads=4,
        num_experts=4,
        dropout_rate=0.0,
        router_jitter_noise=0.0,
        decoder_start_token_id=0,
    )
    return SwitchTransformersForConditionalGeneration(config), translation(), None
